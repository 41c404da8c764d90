"""What pretraining shows beside its loss: pictures, nearest neighbours, and a warning where nothing is learned."""

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from models_mae import MaskedAutoencoderViT
from util.data import lists, readers, transfer
from util.data.bands import collate
from util.data.datasets import Images
from util.data.listing import list_images
from util.data.loader import DeviceLoader, eval_loader, normalise
from util.data.readers import Files, Stream
from util.dist import Dist, gather, gather_on_all
from util.errors import UserError
from util.log import log
from util.look.features import knn_accuracy, mean_features
from util.look.visualize import picture_range, reconstruct, sheet, strategy_noise
from util.run.run_log import RunLog
from util.step import autocast_dtype
from util.transforms import Size, eval_transform

N_PICTURES = 8
N_MEAN = 256  # images that the mean image is computed from
N_TRAIN, N_VAL = 20_000, 5_000  # images for nearest neighbours, at most
PATIENCE = 10  # epochs; small data sets rest at the mean image for some before they learn


class Watch:
    """Looks at the model after each epoch, once that is saved; changes nothing of the training, and never ends it: what
    raises an exception, as pictures do of a model that predicts no pixels, is off from there on, with a warning.

    `picture_every` and `knn_every` are in epochs, 0 for never. `root` (--data_path), `name` (--dataset) and `val_path`
    are where the training images and those to look at are; see readers.py. Raises UserError where nearest neighbours
    are asked for and images have no labels, or are too few. Of a stream it shows nothing.
    """

    def __init__(
        self, env: Dist, root: str | None, dataset: Images | Stream, size: Size, *, mask_ratio: float, amp: str,
        picture_every: int, knn_every: int, num_workers: int, name: str = "", val_path: str | None = None,
    ) -> None:  # fmt: skip
        self.env, self.dataset, self.size, self.mask_ratio = env, dataset, size, mask_ratio
        self.dtype, self.num_workers = autocast_dtype(amp, env.device), num_workers
        self.picture_every, self.knn_every = picture_every, knn_every
        source = root, name, val_path, dataset
        self.knn_files = _labelled_files(*source, env.world_size) if knn_every else None
        self.pictured = None if isinstance(dataset, Stream) else self._pictured(*source)
        self.mean_image_loss: float | None = None
        self.losses: list[float] = []
        self.off: set[str] = set()

    def _pictured(self, root: str | None, name: str, val_path: str | None, dataset: Images) -> Dataset:
        """A few images of those to validate on, or else of what is trained on."""
        images, files = _view(dataset, eval_transform(self.size)), None
        if self.knn_files:
            files = self.knn_files[1]
        elif val_path:
            files = lists.unlabelled(val_path, dataset.skip_bad)
        elif root and not name:
            with contextlib.suppress(UserError):  # no such folder, or an empty one
                files = list_images(Path(root) / "val", dataset.bands.endings)
        if files:
            images = Images(files, eval_transform(self.size), skip_bad=True, bands=dataset.bands)
        return Subset(images, _evenly(range(len(images)), N_PICTURES))

    def after_epoch(self, epoch: int, model: MaskedAutoencoderViT, loss: float, run_log: RunLog) -> dict[str, float]:
        """`loss`: the epoch's mean. All ranks call this. Returns what log.txt should have beside it."""
        seen = {}

        def neighbours() -> None:
            if self.knn_every and (epoch + 1) % self.knn_every == 0:
                seen["knn_acc1"] = self._nearest_neighbours(model)
                run_log.scalar("perf/knn_acc1", seen["knn_acc1"], epoch)

        def pictures() -> None:
            if self.picture_every and (epoch + 1) % self.picture_every == 0 and run_log.reports:
                run_log.image("reconstructions", self._draw(model), epoch)

        # other shapes than training's are not worth a compilation
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            if self.env.is_main and self.pictured:  # a stream would have to be read from its start
                self._look("comparison with the mean image", lambda: self._compare_with_mean(model, loss))
                self._look("pictures", pictures)
            self._look("nearest neighbours", neighbours)
        model.train()
        return seen

    def _look(self, name: str, look: Callable[[], None]) -> None:
        if name in self.off:
            return
        try:
            look()
        except Exception as error:
            reason = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {str(error)[:300]}"
            log.warning(f"no {name} from here on: {reason}")
            self.off.add(name)

    def _draw(self, model: MaskedAutoencoderViT) -> Image.Image:
        imgs = torch.cat([imgs for imgs, _ in self._batches(self.pictured, sharded=False)])
        noise = strategy_noise(model, len(imgs), self.mask_ratio, seed=0).to(imgs.device)
        colours = picture_range(self.dataset.bands.mean, self.dataset.bands.std)
        return sheet(reconstruct(model, imgs, self.mask_ratio, noise, **colours), across=2)

    def _batches(self, images: Dataset, sharded: bool) -> DeviceLoader:
        return eval_loader(images, 64, self.env, sharded, min(self.num_workers, len(images) // 64), pin_mem=True)

    def _features(self, model: MaskedAutoencoderViT, files: Files) -> tuple[torch.Tensor, torch.Tensor]:
        """Of this rank's share: (features [n, D], labels [n])."""
        images = Images(files, eval_transform(self.size), skip_bad=True, bands=self.dataset.bands)
        with torch.autocast(self.env.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            features, labels = mean_features(model, self._batches(images, sharded=True))
        return features.to(self.env.device), labels.to(self.env.device)

    def _nearest_neighbours(self, model: MaskedAutoencoderViT) -> float:
        own, failure = [], None
        try:
            own = [self._features(model, files) for files in self.knn_files]
        except Exception as error:
            failure = error
        # decided by all together: a rank that failed would leave the others waiting for its features
        if failures := [error for error in gather_on_all(failure) if error]:
            raise failures[0]
        splits = [tuple(gather(part) for part in split) for split in own]
        (train, _), (_, labels) = splits
        n_classes = int(labels.max()) + 1
        k = max(min(20, len(train) // n_classes), 1)
        accuracy = knn_accuracy(*splits, k)
        log.info(
            f"* k-NN Acc@1 {accuracy:.3f} (k {k}, {len(train)} training and {len(labels)} validation images; chance "
            f"{100 / n_classes:.3f})"
        )
        return accuracy

    def _compare_with_mean(self, model: MaskedAutoencoderViT, loss: float) -> None:
        if self.mean_image_loss is None:
            self.mean_image_loss = mean_image_loss(model, self._training_images())
            if not math.isnan(self.mean_image_loss):
                log.info(
                    "to compare the loss with: the mean image, predicted for every image, gives "
                    f"{self.mean_image_loss:.4f}"
                )
        self.losses.append(loss)
        stands = len(self.losses) > PATIENCE and loss > 0.98 * self.losses[-1 - PATIENCE]
        if stands and loss > 0.95 * self.mean_image_loss:
            log.warning(
                f"the loss is {loss:.4f}, after {self.losses[-1 - PATIENCE]:.4f} {PATIENCE} epochs ago, and the mean "
                f"image, predicted without a look at any, gives {self.mean_image_loss:.4f}: nothing is learned yet. If "
                "it stays so, try another --blr (lower, or higher if it is tiny), a longer --warmup_epochs or --amp "
                "off; look at the images"
            )
            self.losses.clear()  # the next warning after as many epochs

    def _training_images(self) -> torch.Tensor:
        images = _view(self.dataset, self.dataset.transform)
        pixels, mirror, _ = collate([images[0, i] for i in _evenly(range(len(images)), N_MEAN)])
        return normalise(pixels, mirror, self.dataset.bands).to(self.env.device)


def mean_image_loss(model: MaskedAutoencoderViT, imgs: torch.Tensor) -> float:
    """Normalised images [n, C, H, W] -> the model's own loss, were the mean target of the others predicted for each;
    NaN, which compares with nothing, for fewer than two images and for a target of ids, which have no mean.

    For the mean squared error no prediction that is the same for every image does better. With norm_pix_loss it is near
    1, less where images resemble each other.
    """
    n, target = len(imgs), model.target(model.patchify(imgs).float())
    if n < 2 or not target.is_floating_point():
        return math.nan
    mean_of_others = (target.sum(dim=0) - target) / (n - 1)
    return model.forward_loss(imgs, mean_of_others, torch.ones(target.shape[:2], device=imgs.device)).item()


def _labelled_files(
    root: str | None, name: str, val_path: str | None, dataset: Images | Stream, world_size: int
) -> tuple[Files, Files]:
    """(Images to compare with, images to judge), at most N_TRAIN and N_VAL, as many for each rank."""
    if name and name not in transfer.SETS:
        raise UserError(
            f"--knn_every needs class folders, lists with labels or one of {', '.join(transfer.SETS)}, not --dataset "
            f"{name}: leave it out"
        )
    if not (name or val_path or lists.is_list(root) or all((Path(root) / part).is_dir() for part in ("train", "val"))):
        raise UserError(f"--knn_every needs class folders, {root}/train/<class>/ and {root}/val/<class>/: leave it out")
    try:
        train, val, _ = readers.labelled_files(
            root, name, ("train", "val"), None, True, dataset.skip_bad, val_path, dataset.bands.endings
        )
    except UserError as error:
        raise UserError(f"--knn_every: {error.message}") from error
    if min(len(train), len(val)) < world_size:
        raise UserError(
            f"--knn_every needs an image for each of {world_size} processes, but there are {len(train)} to train on "
            f"and {len(val)} to validate on: leave it out, or add images"
        )
    # the same number for each rank
    sizes = (min(n, len(files)) // world_size * world_size for n, files in ((N_TRAIN, train), (N_VAL, val)))
    return tuple(_evenly(files, n) for n, files in zip(sizes, (train, val), strict=True))


def _view(dataset: Images, transform: Callable) -> Images:
    """The same images under another transform, passing over broken ones without a note of them."""
    view = copy.copy(dataset)
    view.transform, view.skip_bad, view.bad = transform, True, torch.zeros_like(dataset.bad)
    return view


def _evenly(items: Sequence, n: int) -> list:
    """At most n of them, evenly spaced, so that all classes have their share."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]
