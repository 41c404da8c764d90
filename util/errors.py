"""The exceptions whose message is meant for the user and not for the developer, and how it shows what is not ours."""


def printable(text: object) -> str:
    """A file's name, or words of a library -> the same with control characters, and bytes that are no UTF-8, escaped.

    Names on disk are bytes: a terminal obeys some of them, and a log of UTF-8 loses the line that holds others.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


def _escaped(c: str) -> str:
    if "\udc80" <= c <= "\udcff":  # how Python keeps a byte that is no UTF-8
        return f"\\x{ord(c) - 0xDC00:02x}"
    return c.encode("unicode_escape").decode()


class UserError(ValueError):
    """Bad input: the message names the value and the remedy. Scripts print it without a traceback and exit with 2.

    `message` is the text alone: a loader worker's exception arrives with the worker's traceback in front of it.
    """

    rank_0_tells = False  # True on the other ranks, where all of them raise what rank 0 has met

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message.rsplit("UserError: ", 1)[-1].strip()


class NotSavedError(OSError):
    """The end of a run could not be saved. Scripts print the message without a traceback and exit with 1."""


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the message names the steps between which it happened."""
