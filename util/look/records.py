"""A classifier on one part after another: what is kept of each image, exact for any number of processes; the time."""

import sys
import time
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from util.data.loader import DeviceLoader
from util.data.parts import Part
from util.dist import Dist, gather_on_all
from util.errors import NonFiniteLossError, UserError
from util.log import log


@torch.no_grad()
def evaluate(
    model: nn.Module, part: Part, batches: Iterator, n_batches: int, env: Dist, dtype: torch.dtype | None,
    full: int,
) -> tuple[dict[str, np.ndarray], int]:  # fmt: skip
    """Take this process's `n_batches` of a part; returns all processes' record of it (util/look/results.py), in the
    order of the images, and how many could not be decoded. A batch is filled up to `full` images, which compiled code
    needs. Raises NonFiniteLossError, on all ranks together, where a logit is not finite.
    """
    allowed = None if part.allowed is None else part.allowed.to(env.device)
    labels = {name: table.to(env.device) for name, table in part.labels.items()}
    rows, last = [], None
    for _ in range(n_batches):
        imgs, index = next(batches)
        if len(imgs) < full:
            imgs = torch.cat([imgs, imgs[:1].expand(full - len(imgs), -1, -1, -1)])
        try:
            with torch.autocast(env.device.type, dtype=dtype, enabled=dtype is not None):
                logits = model(imgs)[: len(index)].float()
        except torch.OutOfMemoryError as error:
            text = f"--batch_size {len(imgs)} does not fit into the device's memory: halve it"
            raise UserError(text) from error
        scored = score(logits, index, labels, allowed)
        if last:  # one batch behind, so that the device has work while the host waits
            rows.append({name: values.cpu().numpy() for name, values in last.items()})
        last = scored
    rows += [{name: values.cpu().numpy() for name, values in last.items()}] if last else []
    rows = [row for rank_rows in gather_on_all(rows) for row in rank_rows]
    record = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    good = record["index"] >= 0
    order = np.flatnonzero(good)[np.argsort(record["index"][good])]
    record = {name: values[order] for name, values in record.items()}
    if not record["finite"].all():
        worst = part.files[int(record["index"][~record["finite"]][0])][0]
        raise NonFiniteLossError(f"{part.key}: the logits of {worst} are not finite: try --amp off, or other weights")
    del record["finite"]
    return record, int((~good).sum())


def score(
    logits: torch.Tensor, index: torch.Tensor, labels: dict[str, torch.Tensor], allowed: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Logits [n, C] of images [n] -> what is kept of each: its best `allowed` classes, their probabilities, its losses.

    `labels`, [N, M] of all images of the part, -1 fills up: a loss is -log of the probability of all labels together.
    """
    finite = logits.isfinite().all(dim=1)
    if allowed is not None:
        logits = torch.full_like(logits, -torch.inf).index_copy(1, allowed, logits[:, allowed])
    log_probabilities = logits.log_softmax(dim=1)
    best = log_probabilities.topk(min(5, logits.shape[1] if allowed is None else len(allowed)))
    scored = {"index": index, "finite": finite, "top": best.indices, "probability": best.values.exp()}
    for name, table in labels.items():
        own = table[torch.where(index < 0, 0, index)]
        of_labels = log_probabilities.gather(1, own.clamp(min=0)).masked_fill(own < 0, -torch.inf)
        scored[f"loss/{name}"] = -of_labels.logsumexp(dim=1)
    return scored


class Watch:
    """A bar over the batches of all parts with the time left, and lines; where the time went."""

    def __init__(self, total: int, env: Dist) -> None:
        hidden = not (env.is_main and sys.stdout.isatty())
        self.bar = tqdm(total=total, desc="Test:", unit=" batches", disable=hidden, dynamic_ncols=True, file=sys.stdout)
        self.total, self.done, self.waited, self.start = total, 0, 0.0, time.perf_counter()
        self.told = self.start

    def batches(self, loader: DeviceLoader) -> Iterator:
        """What `loader` yields, counted and timed."""
        iterator = iter(loader)
        while self.done < self.total:
            before = time.perf_counter()
            batch = next(iterator)
            now = time.perf_counter()
            self.waited += now - before
            self.done += 1
            self.bar.update()
            yield batch
            if now - self.told > 30:
                self.tell(f"batch {self.done} of {self.total}")

    def tell(self, text: str) -> None:
        """A line with the time left, and the share of the time that went by in waiting for images."""
        self.told = time.perf_counter()
        seconds = self.told - self.start
        left = timedelta(seconds=int(seconds / max(self.done, 1) * (self.total - self.done)))
        log.debug(f"{text}  eta: {left}  waited for images: {100 * self.waited / seconds:.1f} % of the time")

    def close(self) -> None:
        """End the bar."""
        self.bar.close()
