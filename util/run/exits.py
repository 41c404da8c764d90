"""How a run ends: signals that ask it to leave, its exit code, and its last words on the terminal and in train.log.

Signals are noted when they come, and obeyed by all ranks together after an optimizer step.
"""

import argparse
import atexit
import contextlib
import gc
import hashlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from datetime import timedelta

import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from util.dist import SIGNALS, Dist, shutdown, sum_over_ranks
from util.errors import EXIT_BAD_INPUT, FailedError, NonFiniteLossError, NotSavedError, UserError, say, silence
from util.log import log

EXIT_FAILED = 1
EXIT_NOT_FINITE = 3
EXIT_SAVED = 75  # EX_TEMPFAIL of sysexits.h: all is saved, start again with --resume auto
ASK_SECONDS = 2.0  # how long a signal may wait until the ranks ask one another, where steps are that fast
ASK_STEPS = 20  # and the most steps between two questions

_ends_process: ContextVar[bool] = ContextVar("_ends_process", default=False)  # inside `run`


class Stopped(Exception):
    """A signal ended the run, on all ranks together. `exit_code` is 75 where its state is saved, else 1."""

    def __init__(self, signals: set[int], saved: bool) -> None:
        names = " and ".join(sorted(signal.Signals(number).name for number in signals))
        what = "all is saved; --resume auto continues" if saved else "its last steps are NOT saved"
        super().__init__(f"stopped by {names}: {what}")
        self.signals, self.exit_code = signals, EXIT_SAVED if saved else EXIT_FAILED


class Signals:
    """Notes the signals that come inside its `with`, and tells all ranks of them.

    A second Ctrl-C, 3 seconds or more after the first, ends the process at once. After the `with`, signals do what they
    did before it; in a script they change its exit code no more.
    """

    def __init__(self, env: Dist) -> None:
        self.env = env
        self.seen: dict[int, float] = {}  # signal -> when it came first
        self.steps, self.interval, self.asked = 0, 1, time.monotonic()

    def __enter__(self) -> "Signals":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # the only one that Python lets handle signals
            # a signal that is ignored, as nohup and a shell's background do, stays so
            wanted = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            if not _ends_process.get():
                signal.signal(number, handler)
            elif number != signal.SIGINT:  # which must still end a process that hangs
                # as soon as one rank is gone, srun sends the others SIGTERM. As the process ends, Python puts default
                # handlers back, but what is ignored stays ignored
                signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, _frame) -> None:
        if number == signal.SIGINT and time.monotonic() - self.seen.get(number, time.monotonic()) > 3:
            raise KeyboardInterrupt
        self.seen.setdefault(number, time.monotonic())

    def ask(self, save: bool, now: bool = False) -> tuple[set[int], bool]:
        """What any rank was told to do, after a step: (signals, whether rank 0 wants to save).

        All ranks call it after each step and get the same answer. Several processes ask one another every 20 steps, or
        about every 2 seconds where steps are slower, and with `now` at once: only then does the device wait for the
        host.
        """
        if self.env.world_size == 1:
            return set(self.seen), save
        self.steps += 1
        if self.steps < self.interval and not now:
            return set(), False
        seconds = time.monotonic()
        step_seconds = (seconds - self.asked) / self.steps
        votes = [number in self.seen for number in SIGNALS]
        votes += [save, step_seconds] if self.env.is_main else [0, 0]  # rank 0's clock counts
        votes = torch.tensor(votes, dtype=torch.float32, device=self.env.device)
        *votes, save, step_seconds = sum_over_ranks(votes).tolist()
        self.interval = max(1, min(ASK_STEPS, int(ASK_SECONDS / max(step_seconds, 1e-6))))
        self.steps, self.asked = 0, seconds
        return {number for number, vote in zip(SIGNALS, votes, strict=True) if vote}, bool(save)


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Call `main(args)`; what it raises for users ends the process with a message alone.

    Exit codes: 2 for a UserError, 3 for a loss that is not finite, 75 after a signal where the state is saved; else 1.
    """
    _open_streams()
    code, here = 0, _ends_process.set(True)
    try:
        main(args)
    except BaseException as error:
        code = _say_last_words(error)
        _end_workers()  # while the traceback keeps the run's loaders
        if code is None:
            raise
    else:
        _end_workers()
    finally:
        _ends_process.reset(here)
    # here nothing of the run is referred to any more, but in circles: threads of a process group that lives until the
    # interpreter ends may abort it (pytorch issue 190489)
    gc.collect()
    if code:
        sys.exit(code)


def _say_last_words(error: BaseException) -> int | None:
    """The exit code; None where the interpreter is to say it."""
    if isinstance(error, UserError):
        _tell(error)
        return EXIT_BAD_INPUT
    if isinstance(error, NonFiniteLossError):  # all ranks raise it together
        if _rank() == 0:
            _last_words(str(error))
        shutdown()
        return EXIT_NOT_FINITE
    if isinstance(error, NotSavedError | FailedError):
        _last_words(str(error))
        return EXIT_FAILED
    if isinstance(error, Stopped):
        log.info(str(error))
        shutdown()
        return error.exit_code
    if isinstance(error, Exception):
        _to_train_log("".join(traceback.format_exception(error)))
    return None


def _tell(error: UserError) -> None:
    """The message; of an error that all ranks raise, rank 0 alone speaks.

    Where each meets it by itself, bad input for one, others keep silent if rank 0 meets the same.
    """
    if _rank() == 0:
        _last_words(error.message)
        _spare_others(error.message)
    elif not error.told and not _is_spared(error.message):
        _last_words(error.message)


def _spare_others(message: str) -> None:
    """On rank 0, which has said `message`: keep the others from saying it too, if they are about to.

    Takes 3 seconds: what keeps the note may go with this process, and launchers end the others once one is gone.
    """
    if torch.distributed.is_initialized():
        with contextlib.suppress(Exception):  # the store is gone, and with it the others
            _store().set(_note(message), "")
            time.sleep(3)


def _is_spared(message: str) -> bool:
    """On other ranks: whether rank 0 says `message`, within 2 seconds."""
    try:
        _store().wait([_note(message)], timedelta(seconds=2))
    except Exception:  # it does not, or the store is gone
        return False
    return True


def _store() -> torch.distributed.Store:
    return torch.distributed.distributed_c10d._get_default_store()


def _note(message: str) -> str:
    return f"said/{hashlib.sha256(message.encode()).hexdigest()}"


def _last_words(message: str) -> None:
    say(f"[rank {rank}] error: {message}" if (rank := _rank()) else f"error: {message}")
    _to_train_log(f"error: {message}")


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _to_train_log(text: str) -> None:
    """To the file alone, where the run has come to have one: the terminal has it on stderr."""
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, text, (), None)
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def _end_workers() -> None:
    """End what is left of loader workers, those in the midst of a batch after half a second.

    Left to garbage collection, they would miss torch's word to leave, and torch waits 5 seconds for each that does.
    """
    if not (children := multiprocessing.active_children()):
        return
    late = threading.Timer(0.5, lambda: [child.terminate() for child in children])
    late.start()
    for iterator in [thing for thing in gc.get_objects() if type(thing) is _MultiProcessingDataLoaderIter]:
        with contextlib.suppress(AttributeError):  # of one that could not start them all
            iterator._shutdown_workers()
    late.cancel()


def _open_streams() -> None:
    """Give a process that was started without stdout or stderr (`>&-`) one, and see that neither spoils its end."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    atexit.register(_flush_streams)


def _flush_streams() -> None:
    """What a closed pipe or a full disk does not take would else make the exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            silence(stream)
