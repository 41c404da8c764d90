"""What a run leaves to be read and drawn: log.txt, a JSON object an epoch, log.jsonl, one a log line, and curves."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from util.dist import Dist
from util.log import log
from util.run.progress import Progress
from util.run.report import Row


class _Lines:
    """A file of JSON objects, one a line; a full or vanished disk stops no training: lines wait for the next ones."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.waiting = path, ""

    def append(self, values: dict) -> None:
        if self.path:
            self.waiting += json.dumps(values) + "\n"
            try:
                with self.path.open("a") as file:
                    file.write(self.waiting)
                self.waiting = ""
            except OSError as error:
                log.error(f"{self.path} CANNOT BE WRITTEN ({error}): the next lines will try again")

    def keep(self, wanted: Callable[[dict], bool]) -> None:
        """Take out the other lines, and half a line of a process that was killed."""
        if self.path and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _is_wanted(line, wanted)]
            if kept != lines:
                temporary = self.path.with_suffix(".tmp")
                temporary.write_text("".join(kept))
                temporary.replace(self.path)


class RunLog:
    """log.txt and log.jsonl in `output_dir`, and `reports` (see `open_reports`); on rank 0.

    A run that starts after `iteration` batches of `start_epoch` takes out the lines of what it does again.
    `images_per_step`: of all processes, in a forward pass.
    """

    def __init__(
        self, env: Dist, output_dir: str = "", reports: Sequence = (), start_epoch: int = 0, iteration: int = 0,
        images_per_step: int = 0,
    ) -> None:  # fmt: skip
        here = env.is_main and bool(output_dir)
        self.epochs = _Lines(Path(output_dir) / "log.txt" if here else None)
        self.lines = _Lines(Path(output_dir) / "log.jsonl" if here else None)
        self.reports, self.last, self.rows = reports, {}, []
        self.start, self.cut = (start_epoch, iteration), False
        self.images_per_step, self.images_per_epoch = images_per_step, 0
        self.epochs.keep(lambda line: line["epoch"] < start_epoch)

    def write(self, stats: dict[str, float], more: dict[str, float] | None = None) -> None:
        """Append one line to log.txt, and show it, with `more`, as the last figures."""
        self.last = stats
        self.epochs.append(stats)
        self._show()
        figures = {name: value for name, value in stats.items() if name != "epoch"} | (more or {})
        for report in self.reports:
            report.figures(figures)

    def add_to_last(self, more: dict[str, float]) -> None:
        """Put what was found out since into the last line of log.txt."""
        if more and not self.epochs.waiting:
            self.epochs.keep(lambda line: line["epoch"] < self.last["epoch"])
            self.write({**self.last, **more})

    def steps(
        self, epoch: int, done: int, n: int, steps: list[tuple[int, dict[str, float]]], progress: Progress,
        loss_name: str,
    ) -> dict[str, float | None]:  # fmt: skip
        """What was read of an epoch of `n` batches, of which `done` are, [(iteration, values), ...] and their rates, to
        log.jsonl and the reports. Returns the line of log.jsonl.
        """
        self._cut(n)
        x = 0
        for i, values in steps:
            x = _place(epoch, i, n)
            self.scalar(loss_name, values["loss"], x)
            self.scalar("lr", values["lr"], x)
            self.scalar("grad_norm", values["grad_norm"], x)
            if self.rows:
                self.rows[-1].epoch = epoch + (i + 1) / n
        for name, value in progress.rates.items():
            self.scalar(name, value, x)
        self._show()

        def mean(name: str) -> float:
            finite = [values[name] for _, values in steps if math.isfinite(values[name])]
            return sum(finite) / len(finite) if finite else math.nan

        images = epoch * self.images_per_epoch + done * self.images_per_step
        line = {"epoch": epoch, "step": done, "steps": n, "images": images, "passes": len(steps), "loss": mean("loss")}
        line |= {"lr": steps[-1][1]["lr"], "grad_norm": mean("grad_norm"), **progress.rates}
        line["time"] = round(progress.step_seconds, 6)
        line = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self.lines.append(line)
        return line

    def _cut(self, n: int) -> None:
        """Before the first line: take out those of what is done again. Steps of another batch size are converted."""
        self.images_per_epoch = n * self.images_per_step
        if not self.cut:
            self.cut, (start, iteration) = True, self.start
            self.lines.keep(
                lambda line: (
                    line["epoch"] < start or (line["epoch"] == start and line["step"] * n <= iteration * line["steps"])
                )
            )
            if start or iteration:
                for report in self.reports:
                    report.cut(_place(start, iteration, n))

    def scalar(self, tag: str, value: float, x: int) -> None:
        """One point of a curve, at the place `x` of TensorBoard: thousandths of an epoch, or epochs. Shown with the
        next line of log.txt or of steps.
        """
        if self.reports:
            if not self.rows or self.rows[-1].x != x or tag in self.rows[-1].values:
                self.rows.append(Row(x, x + 1))
            self.rows[-1].values[tag] = value

    def image(self, tag: str, picture: Image.Image, epoch: int) -> None:
        """A picture, made after `epoch`."""
        for report in self.reports:
            report.image(tag, picture, Row(epoch, epoch + 1, (epoch + 1) * self.images_per_epoch))

    def _show(self) -> None:
        rows, self.rows = self.rows, []
        for row in rows:
            row.images = round(row.epoch * self.images_per_epoch)
        for report in self.reports if rows else ():
            report.points(rows)

    def close(self, state: str = "done") -> None:
        """Show what is waiting; `state`: done, stopped or failed."""
        self._show()
        for report in self.reports:
            report.close(state)


def _place(epoch: int, iteration: int, n: int) -> int:
    """Where TensorBoard has a step: the same scale for every batch size."""
    return int(1000 * (epoch + iteration / n))


def _is_wanted(line: str, wanted: Callable[[dict], bool]) -> bool:
    try:
        return wanted(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return False  # half a line, of a process that was killed
