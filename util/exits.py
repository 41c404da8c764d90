"""How a script ends: its exit code, and its last words on the terminal and in train.log."""

import argparse
import gc
import logging
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch.distributed

from util.dist import is_spared, shutdown, spare_others
from util.errors import NonFiniteLossError, NotSavedError, UserError
from util.log import log
from util.signals import Signals, Stopped
from util.workers import explain

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2  # as argparse does
EXIT_NOT_FINITE = 3


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Call `main(args)`; what it raises for users ends the process with a message alone.

    Exit codes: 2 for a UserError, 3 for a loss that is not finite, 75 after a signal where the state is saved; else 1.
    """
    Signals.process_ends_too = True  # as soon as one rank is gone, srun sends the others SIGTERM: codes stay
    try:
        code = _run(main, args)
    finally:
        Signals.process_ends_too = False
    # here nothing of the run is referred to any more, but in circles: threads of a process group that lives until the
    # interpreter ends may abort it (pytorch issue 190489)
    gc.collect()
    if code:
        sys.exit(code)


def _run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Call `main(args)`; returns the exit code."""
    try:
        main(args)
    except UserError as error:
        _tell(error)
        return EXIT_BAD_INPUT
    except NonFiniteLossError as error:
        _last_words(str(error), rank_0_tells=True)  # all ranks raise it together
        shutdown()
        return EXIT_NOT_FINITE
    except NotSavedError as error:
        _last_words(str(error))
        return EXIT_FAILED
    except Stopped as stopped:
        log.info(str(stopped))
        shutdown()
        return stopped.exit_code
    except Exception as error:
        if (message := explain(error)) is None:
            _to_train_log(traceback.format_exc())
            raise
        _last_words(message)
        return EXIT_FAILED
    return 0


def fail(error: UserError) -> NoReturn:
    """Leave with the message alone and exit code 2."""
    _tell(error)
    sys.exit(EXIT_BAD_INPUT)


def _tell(error: UserError) -> None:
    """The message; of an error that all ranks raise, rank 0 alone speaks.

    Where each meets it by itself, bad input for one, others keep silent if rank 0 meets the same.
    """
    if _rank() == 0:
        _last_words(error.message)
        spare_others(error.message)
    elif not error.rank_0_tells and not is_spared(error.message):
        _last_words(error.message)


def _last_words(message: str, rank_0_tells: bool = False) -> None:
    rank = _rank()
    if rank == 0 or not rank_0_tells:
        print(f"[rank {rank}] error: {message}" if rank else f"error: {message}", file=sys.stderr, flush=True)
        _to_train_log(f"error: {message}")


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _to_train_log(text: str) -> None:
    """To the file alone, where the run has come to have one: the terminal has it on stderr."""
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, text, (), None)
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
