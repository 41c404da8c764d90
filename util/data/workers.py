"""Loader workers: how many there are, what they send, and what it means when one dies."""

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._C import _error_if_any_worker_fails
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from util.dist import SIGNALS, Dist, available_cores
from util.errors import FailedError, UserError
from util.log import log

SMALL_SHM = (
    "/dev/shm, where loader workers leave their batches, is too small or full: give the container more (docker run "
    "--shm-size=8g, or --ipc=host), or pass --num_workers 0, which needs none"
)
_END = object()


def available_workers(num_workers: int, env: Dist) -> int:
    """`num_workers` per process, capped at this process's share of the machine's cores, with a line saying so."""
    cores = available_cores()
    share = max(cores // env.local_world_size, 1)
    if num_workers > share:
        log.info(f"--num_workers {num_workers} capped at {share}: {cores} cores, {env.local_world_size} processes here")
    return min(num_workers, share)


def worker_options(num_workers: int, pin_mem: bool, device: torch.device, timeout_seconds: float) -> dict[str, Any]:
    """Options for `open_loader`. Workers that send nothing for `timeout_seconds` (0: any time) raise FailedError."""
    # a fork server, Python 3.14's default, starts workers with threads, which no worker can keep from obeying SIGTERM
    fork = num_workers > 0 and sys.platform == "linux"
    return {
        "multiprocessing_context": "fork" if fork else None,
        "num_workers": num_workers,
        "pin_memory": pin_mem and device.type == "cuda",
        "worker_init_fn": leave_signals_to_the_trainer,
        "timeout": timeout_seconds if num_workers else 0,
    }


def open_loader(dataset: Dataset, options: dict[str, Any], collate: Callable = default_collate, **more) -> DataLoader:
    """A DataLoader whose batches `batches` yields. An iterable dataset gives lists of samples, one a batch."""
    if isinstance(dataset, IterableDataset):
        return DataLoader(_Stream(dataset, collate), batch_size=None, collate_fn=_as_it_is, **options, **more)
    return DataLoader(_Samples(dataset, collate), collate_fn=_as_it_is, **options, **more)


class _Samples(Dataset):
    """Key -> sample, in batches."""

    def __init__(self, dataset: Dataset, collate: Callable) -> None:
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list) -> Any:
        return _batch(lambda: [self.dataset[key] for key in keys], self.collate)


class _Stream(IterableDataset):
    def __init__(self, dataset: IterableDataset, collate: Callable) -> None:
        self.dataset, self.collate = dataset, collate

    def __iter__(self) -> Iterator:
        samples = iter(self.dataset)
        while (batch := _batch(lambda: next(samples, _END), self.collate)) is not _END:
            yield batch


def _batch(read: Callable[[], list], collate: Callable) -> Any:
    """The batch; or the error that is meant for users, for torch would let nothing of it through but a traceback."""
    try:
        samples = read()
        return samples if samples is _END else collate(samples)
    except UserError as error:
        return error
    except RuntimeError as error:
        if "/torch_" not in str(error):  # the names of what torch keeps in shared memory: it has no type for this
            raise
        return FailedError(f"{SMALL_SHM} ({error})")


def _as_it_is(batch: Any) -> Any:
    return batch


def batches(loader: Iterable) -> Iterator:
    """What `loader` yields. Raises UserError as it was raised in a worker, and FailedError where a worker has died.

    torch itself tells of a death by an exception from a signal handler, wherever the trainer is just then: in the midst
    of a checkpoint, say, whose file that would break. Here it waits until the next batch is asked for.
    """
    iterator = None
    while True:
        try:
            with _deaths_raise():
                iterator = iter(loader) if iterator is None else iterator
                batch = next(iterator, _END)
        except (RuntimeError, OSError, EOFError) as error:
            if (reason := _reason(error)) is error:
                raise
            raise reason from error
        if batch is _END:
            return
        if isinstance(batch, UserError | FailedError):
            raise batch
        yield batch


@contextlib.contextmanager
def _deaths_raise() -> Iterator[None]:
    """Inside, a worker's death, or one before, raises RuntimeError at once, as torch's own handler does everywhere."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    deaths = []

    def raise_death(*_) -> None:
        try:
            _error_if_any_worker_fails()
        except RuntimeError as death:
            deaths.append(death)  # torch tells of it once, and Python drops what is raised while a destructor runs
            raise

    signal.signal(signal.SIGCHLD, raise_death)
    try:
        _error_if_any_worker_fails()
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's comes with the first workers
        if deaths:
            raise deaths[0]


def _reason(error: Exception) -> Exception:
    """`error`, or, of what torch says in words alone about its workers, a FailedError with the remedy."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # of a queue's locks
        return FailedError(f"{SMALL_SHM} ({error})")
    if not isinstance(error, RuntimeError):  # the connection to a dead worker breaks a moment before its death is seen
        end = time.monotonic() + 2
        try:
            while time.monotonic() < end:
                _error_if_any_worker_fails()
                time.sleep(0.02)
        except RuntimeError as death:
            error = death
    text = str(error).split("\n")[0].strip()
    if text.startswith("DataLoader timed out"):
        return FailedError(f"no image came ({text}): the disk stalls; mend it, or raise --loader_timeout")
    if text.startswith("DataLoader worker (pid"):
        # not always does torch know the signal, so both remedies are named
        memory = "most often memory ran out; lower --num_workers or --batch_size"
        return FailedError(f"a loader worker died ({text}): {memory}. After a bus error, {SMALL_SHM}")
    return error


def leave_signals_to_the_trainer(_worker: int) -> None:
    """For a loader's worker: only the trainer obeys signals, which a batch system sends to all processes of a job.

    Else a worker would be gone before the step that needs its images. SIGTERM from the trainer itself still ends it.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    trainer = multiprocessing.parent_process().pid  # not os.getppid(): that may be a fork server

    def obey_trainer() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
            pass
        os._exit(0)

    threading.Thread(target=obey_trainer, daemon=True).start()
