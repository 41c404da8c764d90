"""One epoch of masked pretraining."""

from torch import nn

from util import rng
from util.data.loader import DeviceLoader
from util.lr_sched import Schedule, adjust_learning_rate
from util.run.run import Run
from util.step import Step


def train_one_epoch(
    model: nn.Module, loader: DeviceLoader, step: Step, schedule: Schedule, epoch: int, run: Run, *, mask_ratio: float,
    seed: int,
) -> dict[str, float]:  # fmt: skip
    """Train on every batch of `loader`; returns the epoch's mean `loss` and `lr`, over all ranks.

    The number of batches is a multiple of `step.accum_iter`. Raises NonFiniteLossError, and after a signal Stopped, on
    all ranks together.
    """
    model.train()  # the masks are all the noise there is: no dropout, no stochastic depth (appendix A.1)
    n = len(loader)
    for i, (imgs, _) in run.epoch(epoch, loader, loss_name="train_loss"):
        # the rate follows the fraction of the epoch, not whole epochs: warm-up is smooth whatever their number of steps
        if i % step.accum_iter == 0:
            lr = adjust_learning_rate(step.optimizer, epoch + i / n, schedule)
        # masks are a function of (seed, step, rank): a run that goes on here draws what it would have drawn
        rng.seed_step(seed, epoch * n + i, run.env.rank)
        update = (i + 1) % step.accum_iter == 0  # else gradients add up, and ranks don't exchange them yet
        # the mean over removed patches, of each image and then of the batch: all images remove equally many
        loss = step(lambda: model(imgs, mask_ratio)[0], update)  # noqa: B023
        # the host waits for the device in here, at log points, and nowhere else: else the GPU would idle in each step
        run.after_step(i, loss=loss, lr=lr)
    return run.means()
