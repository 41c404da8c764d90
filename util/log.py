"""What a run says, on the terminal and in train.log. The lines about steps are made in util/progress.py."""

import logging
import sys
from pathlib import Path

from util.dist import Dist
from util.errors import UserError

log = logging.getLogger("mae")


def setup_logging(env: Dist, output_dir: str) -> None:
    """Rank 0 writes messages to the terminal and to `output_dir`/train.log; other ranks write their warnings only."""
    for handler in log.handlers[:]:  # of an earlier run in the same process
        log.removeHandler(handler)
        handler.close()
    log.propagate = False
    log.setLevel(logging.DEBUG if env.is_main else logging.WARNING)
    console = logging.StreamHandler(sys.stdout)
    # on a terminal a bar shows the steps, and the lines about them go to the file alone
    console.setLevel(logging.INFO if sys.stdout.isatty() else logging.DEBUG)
    console.setFormatter(logging.Formatter("%(message)s" if env.is_main else f"[rank {env.rank}] %(message)s"))
    log.addHandler(console)
    if env.is_main and output_dir:
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(Path(output_dir) / "train.log")
        except OSError as error:
            raise UserError(f"--output_dir {output_dir} cannot be written ({error}): name another folder") from error
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        file.handleError = lambda record: None  # a full disk: the console has the line, and this file later
        log.addHandler(file)
