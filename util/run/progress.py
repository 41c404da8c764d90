"""Progress through an epoch: a loader's batches, their losses and rates, read from the device now and then."""

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from util.dist import Dist, mean_over_ranks
from util.flops import Throughput
from util.log import log


@dataclass
class Part:
    """How much of an epoch is done: `iteration` batches, and the sums and counts that its means are made of."""

    iteration: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)


class Progress:
    """Iterates over a loader, keeps each step's values on the device, and reads them once every `every` steps.

    Between two reads the device never waits for the host. On a terminal it draws a bar; elsewhere each read is a line.
    `done` is the part of the epoch that the loader leaves out, because an earlier process did it.
    """

    def __init__(
        self,
        loader: DataLoader,
        header: str,
        every: int,
        env: Dist,
        throughput: Throughput | None = None,
        done: Part | None = None,
    ) -> None:
        done = done or Part()
        self.loader, self.header, self.every, self.env, self.throughput = loader, header, every, env, throughput
        self.rates: dict[str, float] = {}  # of the steps of the last read
        self.step_seconds = math.nan  # of the same
        self.total = len(loader)
        self.pending: list[tuple[int, dict[str, float], dict[str, torch.Tensor]]] = []
        self.windows: dict[str, deque[float]] = {}
        self.first, self.sums, self.counts = done.iteration, dict(done.sums), dict(done.counts)
        self.read_to = self.first  # batches of the epoch that sums and counts hold
        self.data_seconds = 0.0

    def __iter__(self) -> Iterator[tuple[int, object]]:
        """Yield (iteration, batch)."""
        bar_hidden = not (self.env.is_main and sys.stdout.isatty())
        self.bar = tqdm(
            total=self.total, desc=self.header, disable=bar_hidden, dynamic_ncols=True, leave=False, file=sys.stdout,
            initial=self.first,
        )  # fmt: skip
        self.start = self.last_read = time.perf_counter()
        waiting_since = self.start
        for iteration, batch in enumerate(self.loader, self.first):
            self.data_seconds += time.perf_counter() - waiting_since
            yield iteration, batch
            self.bar.update()
            waiting_since = time.perf_counter()
        self.bar.close()
        elapsed = time.perf_counter() - self.start
        total = timedelta(seconds=int(elapsed))
        log.info(f"{self.header} Total time: {total} ({elapsed / max(self.total - self.first, 1):.4f} s / it)")

    def add(self, iteration: int, loss: torch.Tensor, grad_norm: torch.Tensor | None = None, **values: float) -> None:
        """Note one step: its loss and gradient norm, left on the device, and numbers that the host already knows."""
        on_device = {"loss": loss} if grad_norm is None else {"loss": loss, "grad_norm": grad_norm}
        self.pending.append((iteration, values, on_device))

    def due(self, iteration: int) -> bool:
        """True every `every` steps and at the last one."""
        return iteration % self.every == 0 or iteration == self.total - 1

    def read(self, over_ranks: bool = False) -> list[tuple[int, dict[str, float]]]:
        """Wait for the device; returns [(iteration, values), ...] of the steps since the last read. `over_ranks`: means
        over all processes, which all call this.
        """
        rows = torch.stack([torch.stack([value.float() for value in row.values()]) for _, _, row in self.pending])
        if over_ranks:
            rows = mean_over_ranks(rows)
        steps = [
            (iteration, {**values, **dict(zip(on_device, row, strict=True))})
            for (iteration, values, on_device), row in zip(self.pending, rows.tolist(), strict=True)
        ]
        self.pending.clear()
        for _, values in steps:
            for name, value in values.items():
                window = self.windows.setdefault(name, deque(maxlen=20))
                self.sums.setdefault(name, 0.0)
                self.counts.setdefault(name, 0)
                if math.isfinite(value):  # what is left out of the weights is left out of the means
                    window.append(value)
                    self.sums[name] += value
                    self.counts[name] += 1
        self.read_to = steps[-1][0] + 1
        return steps

    def part(self) -> Part:
        """What is done of the epoch, up to the last read."""
        return Part(self.read_to, dict(self.sums), dict(self.counts))

    def averages(self) -> dict[str, float]:
        """Name -> mean over all steps read so far."""
        return {name: self.sums[name] / self.counts[name] if self.counts[name] else math.nan for name in self.sums}

    def log_line(self, n_steps: int) -> None:
        """Say where the epoch is, after the read of `n_steps` steps."""
        now = time.perf_counter()
        # the host runs ahead of the device, so single steps can't be timed: these are means since the last read
        self.step_seconds = step_seconds = (now - self.last_read) / n_steps
        data_seconds = self.data_seconds / n_steps
        self.last_read, self.data_seconds = now, 0.0
        left, done = self.total - self.read_to, self.read_to - self.first
        eta = timedelta(seconds=int((now - self.start) / done * left))
        parts = [f"{self.header}  [{self.read_to - 1:>{len(str(self.total))}}/{self.total}]", f"eta: {eta}"]
        for name, window in self.windows.items():
            if name == "loss":
                median = statistics.median(window) if window else math.nan
                parts.append(f"loss: {median:.4f} ({self.averages()[name]:.4f})")
            elif name != "grad_norm" and window:
                parts.append(f"{name}: {window[-1]:.6f}")
        parts += [f"time: {step_seconds:.4f}", f"data: {data_seconds:.4f}"]
        if self.env.device.type == "cuda":
            parts.append(f"max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}")
        if self.throughput:
            self.rates = self.throughput.rates(step_seconds)
            names = {"images_per_second": "img/s: {:.1f}", "mfu": "mfu: {:.3f}"}
            parts += [names[name].format(value) for name, value in self.rates.items()]
        if self.windows.get("grad_norm"):
            parts.append(f"grad_norm: {statistics.median(self.windows['grad_norm']):.4f}")
        log.debug("  ".join(parts))
        self.bar.set_postfix_str("  ".join(parts[2:4]), refresh=False)
