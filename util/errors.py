"""The exceptions whose message is meant for the user and not for the developer."""


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
