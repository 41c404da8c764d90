"""How fast images get from disk to the device: python -m benchmarks.dataloader

Photographs (scikit-image's, written as 500 x 375 JPEGs; or those of --data_path) go through the pretraining
augmentation (or --recipe finetune) to 224 pixels, by
  plain         the libraries' recipe: Pillow decodes, RandomResizedCrop (bicubic), flip, ToTensor, Normalize
  timm          timm's loader: Pillow decodes, crops and flips; the device normalises
  ours, uint8   the loader processes' part of ours: pixels decoded, cropped and resized, in batches on the host
  ours          this project's loader: the device also mirrors and normalises
  ours, GPU     the same with --decode cuda (on CUDA alone)
  decode alone  the limit: the same files decoded as ours does, and nothing else
in the same number of processes; then
  ours + step, synthetic + step   a pretraining step of --model, fed by our loader and by one batch on the device.
Figures are images/s, medians over rounds that take the rows in turn. A measurement is one pass over the images, without
each process's first batch: an epoch waits for these once, whatever its length. Take 10 batches a process or more.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

import models_mae
from benchmarks import common
from benchmarks.rivals import RANDAUGMENT, plain_recipe, pretraining_step
from util.data import datasets, listing
from util.data.decode import decode
from util.data.loader import train_loader
from util.dist import Dist, available_cores
from util.transforms import finetune_transform, posterize_to_black, pretrain_transform

SIDE = 224
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field", "immunohistochemistry")


def main() -> None:
    """Measure all rows, print the table."""
    args = get_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        root = args.data_path or write_photographs(Path(folder), args.images)
        loaders = make_loaders(args.recipe, root, args.batch_size, args.num_workers, device)
        measure = functools.partial(one_pass, args.num_workers)
        rivals = {name: functools.partial(measure, *loader) for name, loader in loaders.items()}
        if args.model:
            step = pretraining_step(args.model, device)
            loader, set_epoch = loaders["ours"]
            rivals["ours + step"] = functools.partial(measure, loader, set_epoch, step)
            synthetic = Synthetic(len(loader), args.batch_size, device)
            rivals["synthetic + step"] = functools.partial(measure, synthetic, None, step)
        figures = common.measure_in_turn(rivals, args.rounds)
    rates = {name: common.median(values) for name, values in figures.items()}
    rows = []
    for name, rate in rates.items():
        plain, limit = (None, "synthetic + step") if name.endswith("step") else (rates["plain"], "decode alone")
        share = rate and rates[limit] and rate / rates[limit]
        rows.append({"loader": name, "images/s": rate, "x plain": rate and plain and rate / plain,
                     "share of the limit": share})  # fmt: skip
    common.report(rows, {**common.machine(device), "loader processes": str(args.num_workers)}, args.json)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, or the words of another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_path", type=Path, help="folder of class folders of images (default: scikit-image's photographs)")
    add("--images", type=int, default=512, help="photographs to write where --data_path is not given (default: 512)")
    add("--recipe", default="pretrain", choices=["pretrain", "finetune"],
        help="the augmentation; finetune has RandAugment and random erasing (default: pretrain)")  # fmt: skip
    add("--batch_size", type=int, default=64, help="images in a batch (default: 64)")
    add("--num_workers", type=int, default=available_cores(),
        help="loader processes; 0: the main process, as one core (default: the machine's cores)")  # fmt: skip
    add("--model", default="", choices=["", *models_mae.MODELS], metavar="NAME",
        help="measure this model's pretraining step too, such as mae_vit_large_patch16 (default: none)")  # fmt: skip
    common.add_options(parser, rounds=7)
    return parser.parse_args(argv)


def write_photographs(root: Path, n_images: int) -> Path:
    """Class folders of 500 x 375 JPEGs, quality 92 (about 60 kB each); returns `root`."""
    for i in range(n_images):
        name = PHOTOS[i % len(PHOTOS)]
        path = root / name / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        if i < len(PHOTOS):
            Image.fromarray(getattr(skimage.data, name)()).convert("RGB").resize((500, 375)).save(path, quality=92)
        else:
            path.write_bytes((root / name / f"{i % len(PHOTOS)}.jpg").read_bytes())
    return root


class Decoded(Dataset):
    """Files decoded to pixels, of which only the number travels."""

    def __init__(self, files: list[tuple[str, int]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> int:
        return decode(torch.from_numpy(np.fromfile(self.files[index][0], np.uint8))).numel()


class Synthetic:
    """The same batch of noise, on the device already."""

    def __init__(self, n_batches: int, batch_size: int, device: torch.device) -> None:
        self.batches = [torch.randn(batch_size, 3, SIDE, SIDE, device=device)] * n_batches

    def __iter__(self):
        return ((imgs, None) for imgs in self.batches)


TIMM_OPTIONS = {
    "pretrain": {"scale": (0.2, 1.0)},
    "finetune": {"auto_augment": RANDAUGMENT, "re_prob": 0.25, "re_mode": "pixel"},
}
Loader = tuple[Iterable, Callable[[int], None] | None]


def make_loaders(recipe: str, root: Path, batch_size: int, num_workers: int, device: torch.device) -> dict[str, Loader]:
    """Name -> (what yields batches, what tells it the epoch)."""
    workers = {"batch_size": batch_size, "num_workers": num_workers, "persistent_workers": num_workers > 0}
    shuffled = {"pin_memory": device.type == "cuda", "drop_last": True, "shuffle": True}
    plain = DataLoader(ImageFolder(str(root), plain_recipe(recipe, SIDE)), **workers, **shuffled)
    timm_loader = create_loader(
        ImageDataset(str(root)), (3, SIDE, SIDE), batch_size, is_training=True, color_jitter=None, device=device,
        interpolation="bicubic", num_workers=num_workers, persistent_workers=num_workers > 0,
        pin_memory=device.type == "cuda", **TIMM_OPTIONS[recipe],
    )  # fmt: skip
    posterize_to_black(timm_loader.dataset.transform)
    files, _ = listing.list_classes(root)
    loaders: dict[str, Loader] = {"plain": (plain, None), "timm": (timm_loader, None)}
    sampler = datasets.TrainSampler(len(files), batch_size, 1, Dist(device), seed=0)
    finetune = recipe == "finetune"
    transform = finetune_transform(SIDE, None, RANDAUGMENT) if finetune else pretrain_transform(SIDE, 0.2, 0.5)
    images = datasets.Images(files, transform)
    ours = train_loader(images, sampler, num_workers, pin_mem=True)
    loaders["ours, uint8"] = (ours.loader, sampler.set_epoch)
    loaders["ours"] = (ours, sampler.set_epoch)
    if device.type == "cuda" and recipe == "pretrain":
        on_gpu = train_loader(images, sampler, num_workers, pin_mem=True, decode="cuda")
        loaders["ours, GPU"] = (on_gpu, sampler.set_epoch)
    loaders["decode alone"] = (DataLoader(Decoded(files), **workers, drop_last=True), None)
    return loaders


passes = 0


def one_pass(
    n_first: int, loader: Iterable, set_epoch: Callable[[int], None] | None,
    step: Callable[[torch.Tensor], None] | None = None,
) -> float:  # fmt: skip
    """Images/s of one pass over `loader` after its `n_first` batches, each on the device and, if given, through `step`.

    Raises ValueError where there are no more batches.
    """
    global passes
    passes += 1
    if set_epoch:
        set_epoch(passes)  # each pass draws other crops
    n_images, start, i = 0, time.perf_counter(), -1
    for i, batch in enumerate(loader):
        imgs = batch[0] if isinstance(batch, list | tuple) else batch
        if imgs.dtype == torch.float32 and torch.cuda.is_available():
            imgs = imgs.cuda(non_blocking=True)  # of the plain recipe; others are there
        if step:
            step(imgs)
        n_images += len(imgs)
        if i + 1 == n_first:
            _wait()
            n_images, start = 0, time.perf_counter()
    _wait()
    if not n_images or i < n_first:
        raise ValueError(f"{i + 1} batches are too few for {n_first} loader processes: raise --images")
    return n_images / (time.perf_counter() - start)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
