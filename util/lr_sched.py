"""The learning-rate schedule: linear warm-up, then half a cosine."""

import math
from dataclasses import dataclass

import torch

from util.log import log


@dataclass(frozen=True)
class Schedule:
    """`lr` and `min_lr` are absolute learning rates; `warmup_epochs` and `epochs` are in epochs."""

    lr: float
    min_lr: float
    warmup_epochs: float
    epochs: float

    def __post_init__(self) -> None:
        if self.warmup_epochs >= self.epochs:
            log.info(
                f"--warmup_epochs {self.warmup_epochs:g} is not below --epochs {self.epochs:g}: the learning rate "
                "rises to the end, and may never reach its full value; a short run wants a short warm-up"
            )


def scaled_lr(lr: float | None, blr: float, effective_batch: int) -> float:
    """The absolute learning rate: `lr` where given, else blr * effective batch / 256 (Goyal et al. 2017).

    Effective batch: images per optimizer step, over all devices.
    """
    return blr * effective_batch / 256 if lr is None else lr


def adjust_learning_rate(optimizer: torch.optim.Optimizer, epoch: float, args: Schedule) -> float:
    """Set the rate of every group for the fractional `epoch`, times the group's `lr_scale`; return the unscaled rate.

    `args` is anything with lr, min_lr, warmup_epochs and epochs. Source: paper, tables 8 and 9.
    """
    if epoch < args.warmup_epochs:
        lr = args.lr * epoch / args.warmup_epochs
    else:
        progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
        lr = args.min_lr + (args.lr - args.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr
