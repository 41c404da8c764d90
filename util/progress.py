"""Progress through an epoch: a loader's batches, their losses and rates, read from the device now and then."""

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from util.dist import Dist, mean_over_ranks
from util.errors import NonFiniteLossError
from util.log import log


@dataclass
class Part:
    """How much of an epoch is done: `iteration` batches, and the sums and counts that its means are made of."""

    iteration: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Throughput:
    """What turns the seconds of a step into rates: images per step and peak over all devices, operations per image."""

    images_per_step: int
    flops_per_image: float
    peak_flops: float | None = None

    def rates(self, step_seconds: float) -> dict[str, float]:
        """`images_per_second` and, where the peak is known, `mfu`: the share of it that the model's arithmetic took."""
        images_per_second = self.images_per_step / step_seconds
        if self.peak_flops is None:
            return {"images_per_second": images_per_second}
        mfu = images_per_second * self.flops_per_image / self.peak_flops
        return {"images_per_second": images_per_second, "mfu": mfu}


class Progress:
    """Iterates over a loader, keeps each step's values on the device, and reads them once every `every` steps.

    Between two reads the device never waits for the host. On a terminal it draws a bar; elsewhere each read is a line.
    `done` is the part of the epoch that the loader leaves out, because an earlier process did it. `judge` decides what
    happens where a loss or gradient is not finite; without it, and with `reduce`, such a loss raises.
    """

    def __init__(
        self,
        loader: DataLoader,
        header: str,
        every: int,
        env: Dist,
        reduce: bool = True,
        throughput: Throughput | None = None,
        done: Part | None = None,
        judge: Callable[[str, list[tuple[int, dict[str, float], float]]], None] | None = None,
    ) -> None:
        done = done or Part()
        self.judge = judge
        self.loader, self.header, self.every, self.env, self.reduce = loader, header, every, env, reduce
        self.throughput = throughput
        self.rates: dict[str, float] = {}  # of the steps of the last read
        self.total = len(loader)
        self.pending: list[tuple[int, dict[str, float], dict[str, torch.Tensor], bool]] = []
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

    def add(
        self,
        iteration: int,
        loss: torch.Tensor,
        grad_norm: torch.Tensor | None = None,
        judged: bool = False,
        **values: float,
    ) -> None:
        """Note one step: its loss and gradient norm, left on the device, and numbers that the host already knows.

        `judged`: whether a norm that is not finite is a fault.
        """
        on_device = {"loss": loss} if grad_norm is None else {"loss": loss, "grad_norm": grad_norm}
        self.pending.append((iteration, values, on_device, judged))

    def due(self, iteration: int) -> bool:
        """True every `every` steps and at the last one."""
        return iteration % self.every == 0 or iteration == self.total - 1

    def read(self) -> list[tuple[int, dict[str, float]]]:
        """Wait for the device, average the noted tensors over ranks, log a line; returns [(iteration, values), ...].

        Raises NonFiniteLossError on all ranks together: a NaN on one of them makes the mean NaN.
        """
        rows = torch.stack([torch.stack([value.float() for value in row.values()]) for _, _, row, _ in self.pending])
        if self.reduce:
            rows = mean_over_ranks(rows)
        steps = [
            (iteration, {**values, **dict(zip(on_device, row, strict=True))})
            for (iteration, values, on_device, _), row in zip(self.pending, rows.tolist(), strict=True)
        ]
        judged = [
            (iteration, values, values["grad_norm"] if is_judged else 0.0)
            for (iteration, values), (*_, is_judged) in zip(steps, self.pending, strict=True)
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
        if self.judge:
            self.judge(self.header, judged)
        else:
            self._check_finite(steps)
        self._log_line(steps[-1][0], len(steps))
        return steps

    def part(self) -> Part:
        """What is done of the epoch, up to the last read."""
        return Part(self.read_to, dict(self.sums), dict(self.counts))

    def averages(self) -> dict[str, float]:
        """Name -> mean over all steps read so far."""
        return {name: self.sums[name] / self.counts[name] if self.counts[name] else math.nan for name in self.sums}

    def _check_finite(self, steps: list[tuple[int, dict[str, float]]]) -> None:
        bad = [iteration for iteration, values in steps if not math.isfinite(values["loss"])]
        if bad and self.reduce:
            raise NonFiniteLossError(
                f"{self.header} the loss became non-finite at iteration {bad[0]} of {self.total} (read at iterations "
                f"{steps[0][0]} to {steps[-1][0]}; lr {steps[0][1].get('lr', math.nan):.3g}). Nothing was saved since. "
                "Resume from the last checkpoint with a lower --blr, a longer --warmup_epochs or --amp off"
            )

    def _log_line(self, iteration: int, n_steps: int) -> None:
        now = time.perf_counter()
        # the host runs ahead of the device, so single steps can't be timed: these are means since the last read
        step_seconds = (now - self.last_read) / n_steps
        data_seconds = self.data_seconds / n_steps
        self.last_read, self.data_seconds = now, 0.0
        eta = timedelta(seconds=int((now - self.start) / (iteration + 1 - self.first) * (self.total - iteration - 1)))
        parts = [f"{self.header}  [{iteration:>{len(str(self.total))}}/{self.total}]", f"eta: {eta}"]
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
