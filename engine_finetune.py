"""One epoch of supervised training, for fine-tuning and for the linear probe; and evaluation."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import nn

from util import rng
from util.data.loader import DeviceLoader, Labelled
from util.dist import Dist, share_buffers, shutdown, sum_over_ranks
from util.log import log
from util.lr_sched import Schedule, adjust_learning_rate
from util.run.progress import Progress
from util.run.run import Run
from util.step import Step
from util.weights import checkpoint


def train_one_epoch(
    model: nn.Module, criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], loader: DeviceLoader, step: Step,
    schedule: Schedule, epoch: int, run: Run, *, erase: RandomErasing | None = None, mixup: Mixup | None = None,
    seed: int,
) -> dict[str, float]:  # fmt: skip
    """Train on every batch of `loader`; returns the epoch's mean `loss` and `lr`, over all ranks.

    `criterion` takes logits [N, classes] and labels [N], or soft targets [N, classes] where `mixup` is given. The
    number of batches is a multiple of `step.accum_iter`. Raises NonFiniteLossError, and after a signal Stopped, on all
    ranks together.
    """
    model.train()
    n = len(loader)
    for i, (imgs, targets) in run.epoch(epoch, loader):
        if i % step.accum_iter == 0:  # by fractions of an epoch: each layer's group keeps its own share of the rate
            lr = adjust_learning_rate(step.optimizer, epoch + i / n, schedule)
        # erasing, mixing and stochastic depth are functions of (seed, step, rank)
        rng.seed_step(seed, epoch * n + i, run.env.rank)
        # on the device, after normalisation: erased pixels are noise of the scale of normalised ones (appendix A.1)
        if erase is not None:
            imgs = erase(imgs)
        if mixup is not None:  # and labels become soft
            imgs, targets = mixup(imgs, targets)
        update = (i + 1) % step.accum_iter == 0  # else gradients add up, and ranks don't exchange them yet
        # softmax and its logarithm in float32 whatever the model computes in: bf16 keeps 3 digits of a logit
        loss = step(lambda: criterion(model(imgs).float(), targets), update)  # noqa: B023
        run.after_step(i, loss=loss, lr=lr)  # the host waits for the device in here, and nowhere else
    return run.means()


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DeviceLoader, env: Dist, dtype: torch.dtype | None, sharded: bool, run: Run | None = None
) -> dict[str, float]:
    """Mean cross-entropy `loss` and accuracies `acc1`, `acc5` (%, the latter top-min(5, classes)) over all images.

    `sharded`: the ranks hold disjoint shares of the images, which are added up; else each rank has them all. Within a
    `run`, a signal ends it with Stopped.
    """
    model.eval()
    share_buffers(model)  # the probe's BatchNorm: each rank has kept statistics of its own batches
    # sums over 50,000 images: float32 would round each addition of a loss to 3 digits
    exact = torch.float32 if env.device.type == "mps" else torch.float64  # mps has no float64
    totals = torch.zeros(4, dtype=exact, device=env.device)  # images, loss, correct in 1, correct in 5
    progress = Progress(loader, "Test:", every=10, env=env)
    for i, (imgs, labels) in progress:
        if run is not None and run.told:
            break
        with torch.autocast(env.device.type, dtype=dtype, enabled=dtype is not None):
            logits = model(imgs).float()  # the loss below in float32: bf16 keeps 3 digits
        losses = F.cross_entropy(logits, labels, reduction="none")
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        per_image = [torch.ones_like(losses), losses, hits[:, 0], hits.sum(dim=1)]
        totals += torch.stack([values.to(exact).sum() for values in per_image])
        progress.add(i, loss=losses.mean())  # stays on the device until a line is due
        if progress.due(i):
            progress.log_line(len(progress.read()))
    if run is not None:
        run.leave_if_told()  # all ranks together: each may have another number of batches
    n_images, loss, top1, top5 = (sum_over_ranks(totals) if sharded else totals).tolist()
    stats = {"loss": loss / n_images, "acc1": 100 * top1 / n_images, "acc5": 100 * top5 / n_images}
    log.info("* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}".format(**stats))
    log.info(f"Accuracy of the network on the {n_images:.0f} test images: {stats['acc1']:.1f}%")
    return stats


def evaluate_and_leave(
    model: nn.Module, weights: dict[str, torch.Tensor], name: str, data: Labelled, env: Dist,
    dtype: torch.dtype | None, sharded: bool,
) -> None:  # fmt: skip
    """--eval: load `weights`, of the file `name`, evaluate them once, and leave the process group."""
    checkpoint.load_strictly(model, weights, name)
    checkpoint.warn_of_other_classes(name, data.val_set.classes)
    evaluate(model.to(env.device), data.val_loader, env, dtype, sharded)
    data.report_bad()
    shutdown()
