"""One epoch of masked pretraining."""

from torch import nn

from util import rng
from util.dist import Dist
from util.loader import DeviceLoader
from util.log import RunLog
from util.lr_sched import Schedule, adjust_learning_rate
from util.progress import Part, Progress, Throughput
from util.saving import Saver
from util.step import Step


def train_one_epoch(
    model: nn.Module,
    loader: DeviceLoader,
    step: Step,
    schedule: Schedule,
    epoch: int,
    *,
    mask_ratio: float,
    seed: int,
    env: Dist,
    run_log: RunLog,
    throughput: Throughput | None = None,
    done: Part | None = None,
    saver: Saver | None = None,
) -> dict[str, float]:
    """Train on every batch of `loader`; returns the epoch's mean `loss` and `lr`, over all ranks.

    The number of batches is a multiple of `step.accum_iter`. `done` is the part of the epoch that the loader leaves
    out. Raises NonFiniteLossError, and through `saver` Stopped after a signal, on all ranks together.
    """
    model.train()
    n = len(loader)
    progress = Progress(loader, f"Epoch: [{epoch}]", every=20, env=env, throughput=throughput, done=done)
    if saver is not None:
        saver.begin(epoch, progress, step)
    for i, (imgs, _) in progress:
        if i % step.accum_iter == 0:
            lr = adjust_learning_rate(step.optimizer, epoch + i / n, schedule)
        rng.seed_step(seed, epoch * n + i, env.rank)  # decides the masks
        update = (i + 1) % step.accum_iter == 0
        loss = step(lambda: model(imgs, mask_ratio=mask_ratio, loss_only=True), update)  # noqa: B023

        judged = update and step.skips
        progress.add(i, lr=lr, loss=loss, grad_norm=step.grad_norm, judged=judged)
        saving = update and saver is not None and saver.due()
        if progress.due(i) or saving:
            steps = progress.read()  # the host waits for the device; of several processes also in saver.due
            run_log.steps(epoch, n, steps, progress.rates, loss_name="train_loss")
        if saving:
            saver.save_part()
    return progress.averages()
