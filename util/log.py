"""What a run says: messages, log.txt and TensorBoard. The lines about steps are made in util/progress.py."""

import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

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


class RunLog:
    """log.txt (a JSON object a line) in `output_dir`, and TensorBoard in `log_dir`; on rank 0, where each is given.

    A run that starts at `start_epoch` takes out the lines of epochs that it does again. A full or vanished disk stops
    no training: lines wait for the next epoch, and curves end, with an error in the log.
    """

    def __init__(self, env: Dist, output_dir: str, log_dir: str, start_epoch: int = 0) -> None:
        self.path = Path(output_dir) / "log.txt" if env.is_main and output_dir else None
        try:
            self.writer = SummaryWriter(log_dir) if env.is_main and log_dir else None
        except (OSError, ValueError, ImportError) as error:  # ValueError, ImportError: of addresses such as s3://…
            raise UserError(f"--log_dir {log_dir} cannot be written ({error}): name another folder, or ''") from error
        self.waiting = ""
        if self.path and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _epoch_of(line) < start_epoch]
            if kept != lines:
                temporary = self.path.with_suffix(".tmp")
                temporary.write_text("".join(kept))
                temporary.replace(self.path)

    def write(self, stats: dict[str, float]) -> None:
        """Append one line to log.txt."""
        if self.path:
            self.waiting += json.dumps(stats) + "\n"
            try:
                with self.path.open("a") as file:
                    file.write(self.waiting)
                self.waiting = ""
            except OSError as error:
                log.error(f"{self.path} CANNOT BE WRITTEN ({error}): the next epoch will try again")

    def classifier_epoch(
        self, epoch: int, train_stats: dict[str, float], test_stats: dict[str, float], n_parameters: int
    ) -> None:
        """An epoch of fine-tuning or probing, to log.txt and TensorBoard."""
        for name in ("acc1", "acc5", "loss"):
            self.scalar(f"perf/test_{name}", test_stats[name], epoch)
        train = {f"train_{name}": train_stats[name] for name in ("lr", "loss")}
        test = {f"test_{name}": test_stats[name] for name in ("loss", "acc1", "acc5")}
        self.write({**train, **test, "epoch": epoch, "n_parameters": n_parameters})

    def steps(
        self, epoch: int, n: int, steps: list[tuple[int, dict[str, float]]], rates: dict[str, float], loss_name: str
    ) -> None:
        """What was read of an epoch of `n` batches, [(iteration, values), ...] and their rates, to TensorBoard."""
        for i, values in steps:
            x = int(1000 * (epoch + i / n))  # the same scale for every batch size
            self.scalar(loss_name, values["loss"], x)
            self.scalar("lr", values["lr"], x)
            self.scalar("grad_norm", values["grad_norm"], x)
        for name, value in rates.items():
            self.scalar(name, value, x)

    def scalar(self, tag: str, value: float, x: int) -> None:
        """One point of a TensorBoard curve."""
        if self.writer:
            self._try(lambda: self.writer.add_scalar(tag, value, x))

    def image(self, tag: str, picture: Image.Image, x: int) -> None:
        """A picture for TensorBoard."""
        if self.writer:
            self._try(lambda: self.writer.add_image(tag, np.asarray(picture), x, dataformats="HWC"))

    def close(self) -> None:
        """Write what is buffered."""
        if self.writer:
            self._try(self.writer.close)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            log.error(f"TensorBoard's files CANNOT BE WRITTEN ({error}): the curves end here")
            self.writer = None


def _epoch_of(line: str) -> float:
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line, of a process that was killed
