"""The one exception that is meant for the user and not for the developer."""


class UserError(ValueError):
    """Bad input: the message names the value and the remedy. Scripts print it without a traceback and exit with 2.

    `message` is the text alone: a loader worker's exception arrives with the worker's traceback in front of it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message.rsplit("UserError: ", 1)[-1].strip()
