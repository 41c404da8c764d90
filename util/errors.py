"""The exceptions whose message is meant for the user and not for the developer, and how a message is said."""

import contextlib
import os
import sys
from typing import NoReturn, TextIO

EXIT_BAD_INPUT = 2  # as argparse does
LONGEST = 20_000  # characters of a message: lists of files may be long, and nobody reads more


class UserError(ValueError):
    """Bad input: the message names the value and the remedy. Scripts print it without a traceback and exit with 2.

    `message` is the text in one printable line, since much of what it quotes comes from elsewhere. `told`: another
    process says it already.
    """

    def __init__(self, message: str, told: bool = False) -> None:
        self.message = _cut(printable(_cut(message.strip())))
        self.told = told
        super().__init__(self.message)


class FailedError(RuntimeError):
    """What a run depends on failed: a loader worker, another process. Scripts print the message and exit with 1."""


class NotSavedError(OSError):
    """The end of a run could not be saved. Scripts print the message without a traceback and exit with 1."""


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the message names the steps between which it happened."""


def printable(text: object, keep: str = "") -> str:
    """A file's name, or words of a library -> the same with control characters, and bytes that are no UTF-8, escaped.

    Names on disk are bytes: a terminal obeys some of them, and a log of UTF-8 loses the line that holds others. `keep`:
    characters that stay.
    """
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in str(text))


def _escaped(c: str) -> str:
    if "\udc80" <= c <= "\udcff":  # how Python keeps a byte that is no UTF-8
        return f"\\x{ord(c) - 0xDC00:02x}"
    return c.encode("unicode_escape").decode()


def shown(value: object, longest: int = 80) -> str:
    """Whatever a file from elsewhere holds -> a few words for a message; never its full length, depth or escapes."""
    if isinstance(value, int) and abs(value) >= 2**128:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, str):
        text = printable(value[: longest + 1])
        return f"'{text}'" if len(text) <= longest else f"'{text[:longest]}…'"
    if isinstance(value, list | tuple) and len(value) <= 4 and not any(isinstance(v, list | tuple) for v in value):
        return f"[{', '.join(shown(item, longest // 4) for item in value)}]"
    return f"a {type(value).__name__[:longest]}"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 500]} … {text[-400:]}"


def say(text: str) -> None:
    """Print to stderr, if there is one that takes it."""
    if sys.stderr is not None:  # print would take stdout instead
        with contextlib.suppress(OSError, ValueError):
            print(printable(text, keep="\n\t"), file=sys.stderr, flush=True)


def silence(stream: TextIO) -> None:
    """Let what is written to a stream that takes nothing go nowhere, which else would raise now and as Python ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(error: UserError) -> NoReturn:
    """End a command of one process with the message alone."""
    say(f"error: {error.message}")
    sys.exit(EXIT_BAD_INPUT)
