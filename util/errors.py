"""The exceptions whose message is meant for the user and not for the developer, and how it shows what is not ours."""

LONGEST = 20_000  # characters of a message: lists of files may be long, and nobody reads more


def printable(text: object) -> str:
    """A file's name, or words of a library -> the same with control characters, and bytes that are no UTF-8, escaped.

    Names on disk are bytes: a terminal obeys some of them, and a log of UTF-8 loses the line that holds others.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


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


class UserError(ValueError):
    """Bad input: the message names the value and the remedy. Scripts print it without a traceback and exit with 2.

    `message` is the text alone, in one printable line: a loader worker's exception arrives with the worker's traceback
    in front of it, and much of what messages quote comes from elsewhere.
    """

    rank_0_tells = False  # True on the other ranks, where all of them raise what rank 0 has met

    def __init__(self, message: str) -> None:
        self.message = _cut(printable(_cut(message.rsplit("UserError: ", 1)[-1].strip())))
        super().__init__(self.message)


class NotSavedError(OSError):
    """The end of a run could not be saved. Scripts print the message without a traceback and exit with 1."""


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the message names the steps between which it happened."""
