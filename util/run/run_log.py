"""What a run leaves to be read and drawn: log.txt, a JSON object an epoch, TensorBoard's curves, and runs.jsonl."""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from util.dist import Dist, gather_on_all
from util.errors import UserError
from util.log import log

PACKAGES = ("torchvision", "timm", "numpy", "pillow", "tensorboard")
ROOT = Path(__file__).resolve().parents[2]


class RunLog:
    """log.txt (a JSON object a line) in `output_dir`, and TensorBoard in `log_dir`; on rank 0, where each is given.

    A run that starts at `start_epoch` takes out the lines of epochs that it does again. A full or vanished disk stops
    no training: lines wait for the next epoch, and curves end, with an error in the log.
    """

    def __init__(self, env: Dist, output_dir: str = "", log_dir: str = "", start_epoch: int = 0) -> None:
        self.path = Path(output_dir) / "log.txt" if env.is_main and output_dir else None
        self.writer, self.waiting, self.last = None, "", {}
        if env.is_main and log_dir:
            try:
                from torch.utils.tensorboard import SummaryWriter  # late: it takes a second

                self.writer = SummaryWriter(log_dir)
            except (OSError, ValueError, ImportError) as error:  # ValueError, ImportError: of addresses such as s3://…
                raise UserError(
                    f"--log_dir {log_dir} cannot be written ({error}): name another folder, or ''"
                ) from error
        self._keep_before(start_epoch)

    def _keep_before(self, epoch: int) -> None:
        if self.path and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _epoch_of(line) < epoch]
            if kept != lines:
                temporary = self.path.with_suffix(".tmp")
                temporary.write_text("".join(kept))
                temporary.replace(self.path)

    def write(self, stats: dict[str, float]) -> None:
        """Append one line to log.txt."""
        self.last = stats
        if self.path:
            self.waiting += json.dumps(stats) + "\n"
            try:
                with self.path.open("a") as file:
                    file.write(self.waiting)
                self.waiting = ""
            except OSError as error:
                log.error(f"{self.path} CANNOT BE WRITTEN ({error}): the next epoch will try again")

    def add_to_last(self, more: dict[str, float]) -> None:
        """Put what was found out since into the last line of log.txt."""
        if more and not self.waiting:
            self._keep_before(self.last["epoch"])
            self.write({**self.last, **more})

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


# what was started


def record_start(env: Dist, args: argparse.Namespace) -> None:
    """Append this start to runs.jsonl: command, options (seed included), versions, git revision, hosts and devices.

    All ranks call it; rank 0 writes, where --output_dir is not empty.
    """
    hosts = gather_on_all(f"{socket.gethostname()}: {_device(env)}")
    if not (env.is_main and args.output_dir):
        return
    record = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "args": plain(args),
        "git": _git(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # with the CUDA that it was built for
            **{name: _version(name) for name in PACKAGES},
        },
        "hosts": hosts,  # one a rank
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    path = Path(args.output_dir) / "runs.jsonl"
    try:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        log.error(f"{path} CANNOT BE WRITTEN ({error})")


def plain(args: argparse.Namespace) -> dict[str, object]:
    """Options as a dict of what JSON and a checkpoint may hold: paths become text."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def _device(env: Dist) -> str:
    return torch.cuda.get_device_name(env.device) if env.device.type == "cuda" else env.device.type


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, str | bool] | None:
    """Revision of this code, and whether tracked files differ from it; None where there is no git or no repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
