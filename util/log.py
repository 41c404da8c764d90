"""What a run says, on the terminal and in train.log. The lines about steps are made in util/run/progress.py."""

import logging
import sys
from pathlib import Path

from util.dist import Dist
from util.errors import UserError, printable, silence

log = logging.getLogger("mae")


class _Printable(logging.Formatter):
    """Escapes what a file's name or a library's words may hold to trouble a terminal; lines and tabs stay."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


class _Console(logging.StreamHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Where nobody reads any more (`| head`) or a disk is full, training goes on; train.log has every line."""
        if not isinstance(error := sys.exc_info()[1], OSError):
            return super().handleError(record)
        silence(self.stream)
        log.warning(f"stdout takes no more lines ({error}): from here on they are in train.log alone")


def setup_logging(env: Dist, output_dir: str) -> None:
    """Rank 0 writes messages to the terminal and to `output_dir`/train.log; other ranks write their warnings only."""
    for handler in log.handlers[:]:  # of an earlier run in the same process
        log.removeHandler(handler)
        handler.close()
    log.propagate = False
    log.setLevel(logging.DEBUG if env.is_main else logging.WARNING)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a terminal that is not UTF-8, and for names that are not
    console = _Console(sys.stdout)
    # on a terminal a bar shows the steps, and the lines about them go to the file alone
    console.setLevel(logging.INFO if sys.stdout.isatty() else logging.DEBUG)
    console.setFormatter(_Printable("%(message)s" if env.is_main else f"[rank {env.rank}] %(message)s"))
    log.addHandler(console)
    if env.is_main and output_dir:
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(Path(output_dir) / "train.log", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(f"--output_dir {output_dir} cannot be written ({error}): name another folder") from error
        file.setFormatter(_Printable("%(asctime)s %(message)s"))
        file.handleError = lambda record: None  # a full disk: the console has the line, and this file later
        log.addHandler(file)
