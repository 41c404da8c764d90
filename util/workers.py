"""Loader workers: how many there are, how they start, and what it means when one dies."""

import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from util.dist import Dist, available_cores
from util.log import log
from util.signals import leave_signals_to_the_trainer

_waiting = False  # for a batch: nowhere else may a worker's death interrupt the trainer
_torch_handler = None


def available_workers(num_workers: int, env: Dist) -> int:
    """`num_workers` per process, capped at this process's share of the machine's cores, with a line saying so."""
    cores = available_cores()
    share = max(cores // env.local_world_size, 1)
    if num_workers > share:
        log.info(f"--num_workers {num_workers} capped at {share}: {cores} cores, {env.local_world_size} processes here")
    return min(num_workers, share)


def worker_options(num_workers: int, pin_mem: bool, device: torch.device, timeout_seconds: float) -> dict[str, Any]:
    """Options of a DataLoader. Workers that send nothing for `timeout_seconds` (0: any time) raise RuntimeError."""
    # a fork server, Python 3.14's default, starts workers with threads, which no worker can keep from obeying SIGTERM
    fork = num_workers > 0 and sys.platform == "linux"
    return {
        "multiprocessing_context": "fork" if fork else None,
        "num_workers": num_workers,
        "pin_memory": pin_mem and device.type == "cuda",
        "worker_init_fn": leave_signals_to_the_trainer,
        "timeout": timeout_seconds if num_workers else 0,
    }


def batches(loader: Iterable) -> Iterator:
    """What `loader` yields. Raises RuntimeError, which `explain` puts into words, where one of its workers has died.

    torch itself tells of a death by an exception from a signal handler, wherever the trainer is just then: in the midst
    of a checkpoint, say, whose file that would break. Here it waits until the next batch is asked for.
    """
    global _waiting
    iterator = iter(loader)
    while True:
        _waiting = True
        try:
            _look_for_deaths()
            batch = next(iterator)
        except StopIteration:
            return
        except (OSError, EOFError):  # the connection to a dead worker breaks a moment before its death can be seen
            end = time.monotonic() + 2
            while time.monotonic() < end:
                _look_for_deaths()
                time.sleep(0.02)
            raise
        finally:
            _waiting = False
            _defer_deaths()
        yield batch


def _look_for_deaths() -> None:
    if _torch_handler is not None:
        _torch_handler(signal.SIGCHLD, None)


def _defer_deaths() -> None:
    """Put this module's handler before torch's, which is there from the first loader with workers on."""
    global _torch_handler
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(signal.SIGCHLD)
    if callable(handler) and handler is not _on_death:
        _torch_handler = handler
        signal.signal(signal.SIGCHLD, _on_death)


def _on_death(number: int, frame: Any) -> None:
    if _waiting:
        _torch_handler(number, frame)


def explain(error: Exception) -> str | None:
    """What to do about an error of the loader's workers; None for other errors."""
    text = str(error).split("\n")[0].strip()
    if "DataLoader timed out" in text:
        return f"no image came ({text}): the disk stalls; mend it, or raise --loader_timeout"
    if "DataLoader worker (pid" in text:  # "Caught IndexError in DataLoader worker process 0" is an error like others
        return f"a loader worker died ({text}): most often memory ran out; lower --num_workers or --batch_size"
    return None
