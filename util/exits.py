"""How a script ends: its exit code, and its last words on the terminal and in train.log."""

import argparse
import logging
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch.distributed

from util.dist import is_said_by_rank_0, shutdown
from util.errors import NonFiniteLossError, NotSavedError, UserError
from util.loader import explain
from util.log import log
from util.signals import Stopped

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2  # as argparse does
EXIT_NOT_FINITE = 3


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Call `main(args)`; what it raises for users ends the process with a message alone.

    Exit codes: 2 for a UserError, 3 for a loss that is not finite, 75 after a signal where the state is saved; else 1.
    """
    try:
        main(args)
    except UserError as error:
        fail(error)
    except NonFiniteLossError as error:
        _last_words(str(error), rank_0_tells=True)  # all ranks raise it together
        shutdown()
        sys.exit(EXIT_NOT_FINITE)
    except NotSavedError as error:
        _last_words(str(error))
        sys.exit(EXIT_FAILED)
    except Stopped as stopped:
        # srun tells the others to leave as soon as one has: that must not change the exit codes of those on their way
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        log.info(str(stopped))
        shutdown()
        sys.exit(stopped.exit_code)
    except Exception as error:
        if (message := explain(error)) is None:
            _to_train_log(traceback.format_exc())
            raise
        _last_words(message)
        sys.exit(EXIT_FAILED)


def fail(error: UserError) -> NoReturn:
    """Leave with the message alone and exit code 2; of an error that all ranks raise, rank 0 alone speaks."""
    _last_words(error.message, error.rank_0_tells or is_said_by_rank_0(error.message))
    sys.exit(EXIT_BAD_INPUT)


def _last_words(message: str, rank_0_tells: bool = False) -> None:
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if rank == 0 or not rank_0_tells:
        print(f"[rank {rank}] error: {message}" if rank else f"error: {message}", file=sys.stderr, flush=True)
        _to_train_log(f"error: {message}")


def _to_train_log(text: str) -> None:
    """To the file alone, where the run has come to have one: the terminal has it on stderr."""
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, text, (), None)
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
