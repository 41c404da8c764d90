"""Where images come from: files on disk, decoded, transformed, in an order set by (seed, epoch)."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from util import rng
from util.decode import decode
from util.dist import Dist
from util.errors import UserError
from util.log import log


def list_images(root: str | Path) -> list[tuple[str, int]]:
    """Folder -> [(path, -1), ...]: all images below it, at any depth, in sorted order; no labels.

    Raises UserError where the folder is missing or holds no image.
    """
    root = _existing_folder(root)
    files = [(path, -1) for path in _image_paths(root)]
    if not files:
        raise UserError(f"no images below {root}: expected files ending in {' '.join(IMG_EXTENSIONS)}")
    return files


def list_classes(root: str | Path) -> tuple[list[tuple[str, int]], list[str]]:
    """Folder of class folders -> ([(path, label), ...], class names); labels count the sorted class names.

    Raises UserError where the folder is missing, has no class folder, or one of them holds no image.
    """
    root = _existing_folder(root)
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"no class folders in {root}: expected {root}/<class>/<image>")
    labels = {name: label for label, name in enumerate(classes)}
    files = [(path, label) for name, label in labels.items() for path in _image_paths(root / name)]
    empty = sorted(set(classes) - {classes[label] for _, label in files})
    if empty:
        raise UserError(
            f"{len(empty)} class folders of {root} hold no image, such as {empty[0]!r}: fill or remove them"
        )
    return files, classes


def _contains(folder: str, inner: str) -> bool:
    return inner == folder or inner.startswith(os.path.join(folder, ""))


def _image_paths(root: Path) -> Iterator[str]:
    """All image files below `root`, in sorted order; hidden files and folders left out."""
    for folder, subfolders, names in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        subfolders[:] = sorted(
            name
            for name in subfolders
            # a link to a folder above would bring all images again and again
            if not name.startswith(".") and not _contains(os.path.realpath(os.path.join(folder, name)), here)
        )
        for name in sorted(names):
            if has_file_allowed_extension(name, IMG_EXTENSIONS) and not name.startswith("."):
                yield os.path.join(folder, name)


def classification_files(
    data_path: str | None, nb_classes: int, with_train: bool
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Folder with train/ and val/ -> (train files, val files); train is empty without `with_train`.

    Raises UserError where a split is missing or empty, or the class folders don't fit each other or `nb_classes`.
    """
    if not data_path:
        raise UserError("--data_path is not given: name a folder with train/<class>/ and val/<class>/")
    val_files, classes = list_classes(Path(data_path) / "val")
    train_files, train_classes = list_classes(Path(data_path) / "train") if with_train else ([], classes)
    _check_classes(train_classes, classes, nb_classes)
    return train_files, val_files


def _check_classes(train: list[str], val: list[str], nb_classes: int) -> None:
    if train != val:
        only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
        raise UserError(
            f"train and val have different class folders: {len(only_train)} only in train {only_train[:3]}, "
            f"{len(only_val)} only in val {only_val[:3]}"
        )
    if len(train) != nb_classes:
        raise UserError(f"--nb_classes {nb_classes}, but the data has {len(train)} class folders: pass that number")


def _existing_folder(root: str | Path) -> Path:
    root = Path(root)
    if not os.path.isdir(root):  # unlike Path.is_dir, this takes names that are too long
        raise UserError(f"no folder {root}: --data_path must hold train/ and val/ (pretraining: any folder of images)")
    return root


class PackedFiles(Sequence):
    """[(path, label), ...] -> the same, in arrays.

    A list's objects change with each look at them, since Python counts references inside: a loader worker that was
    forked would copy page after page, to 250 MB of its own for ImageNet's 1.28 million files.
    """

    def __init__(self, files: Sequence[tuple[str, int]]) -> None:
        paths = [os.fsencode(path) for path, _ in files]
        self.paths = np.frombuffer(b"".join(paths), np.uint8)
        self.ends = np.cumsum([0, *map(len, paths)])
        self.labels = np.array([label for _, label in files], np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        path = self.paths[self.ends[index] : self.ends[index + 1]].tobytes()
        return os.fsdecode(path), int(self.labels[index])


class Images(Dataset):
    """Images from files: (uint8 [H, W, 3], to be mirrored, label). `transform`: see util/transforms.py.

    Item (epoch, index) is augmented by (seed, epoch, index); item `index` draws nothing.
    A file that can't be decoded raises UserError with its name; with `skip_bad` the next good one takes its place, and
    `take_bad()` lists it.
    """

    def __init__(
        self, files: Sequence[tuple[str, int]], transform: Callable, seed: int = 0, skip_bad: bool = False
    ) -> None:
        self.files = PackedFiles(files) if isinstance(files, list) else files
        self.transform, self.seed, self.skip_bad = transform, seed, skip_bad
        # a flag a file, in memory that loader workers share with the trainer
        self.bad = torch.zeros(len(files), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, bool, int]:
        epoch, index = key if isinstance(key, tuple) else (None, key)
        pixels, label = self._load(index)
        if epoch is not None:
            rng.seed_sample(self.seed, epoch, index)
        return *self.transform(pixels), label

    def read(self, index: int) -> tuple[torch.Tensor, int]:
        """The file's content [n_bytes] uint8, and its label."""
        path, label = self.files[index]
        return torch.from_numpy(np.fromfile(path, np.uint8)), label

    def name(self, index: int) -> str:
        """Where the image is, for messages."""
        return self.files[index][0]

    def _load(self, index: int) -> tuple[torch.Tensor, int]:
        for offset in range(len(self)):
            try:
                data, label = self.read((index + offset) % len(self))
                return _not_a_line(decode(data)), label
            except UserError:
                raise
            except Exception as error:  # decoders raise whatever they like
                if not self.skip_bad:
                    raise UserError(
                        f"cannot decode {self.name(index)} ({type(error).__name__}: {error}): mend or remove it, "
                        "or pass --skip_bad_images"
                    ) from error
                self.bad[(index + offset) % len(self)] = 1
        raise UserError(f"none of the {len(self)} images can be decoded, such as {self.name(0)}")

    def take_bad(self) -> list[str]:
        """Paths of the files skipped since the last call."""
        paths = [self.name(i) for i in self.bad.nonzero().flatten().tolist()]
        self.bad.zero_()
        return paths


def _not_a_line(pixels: torch.Tensor) -> torch.Tensor:
    """[3, H, W] -> the same. Raises ValueError for what would take gigabytes once its shorter side is resized."""
    height, width = pixels.shape[1:]
    if max(height, width) > 1000 * min(height, width):
        raise ValueError(f"{width} x {height} pixels: one side is over 1000 times the other")
    return pixels


def report_bad(dataset: Images) -> None:
    """Log the files that were skipped in this epoch, if any."""
    paths = dataset.take_bad()
    if paths:
        shown = "\n  ".join(paths[:20]) + ("\n  ..." if len(paths) > 20 else "")
        log.warning(f"skipped {len(paths)} images that cannot be decoded:\n  {shown}")


class TrainSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys for one rank; the order comes from (seed, epoch).

    Each optimizer step takes the next batch_size * accum_iter * world_size images of the order, whichever way these
    three make up the product; what does not fill a step at the end is dropped. Raises UserError where nothing does.
    """

    def __init__(self, n_images: int, batch_size: int, accum_iter: int, env: Dist, seed: int) -> None:
        self.n_images, self.batch_size, self.env, self.seed = n_images, batch_size, env, seed
        effective_batch = batch_size * accum_iter * env.world_size
        self.n_batches = n_images // effective_batch * accum_iter
        if self.n_batches == 0:
            raise UserError(
                f"{n_images} training images do not fill one step of {effective_batch} (batch_size {batch_size} x "
                f"accum_iter {accum_iter} x {env.world_size} processes): lower --batch_size"
            )
        self.epoch = self.first = 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch that the next pass over the sampler belongs to, and the batch that it starts at."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the pass starts."""
        return self.n_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = rng.image_order(self.seed, self.epoch, self.n_images)
        for i in range(self.first, self.n_batches):
            first = (i * self.env.world_size + self.env.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[first : first + self.batch_size]]
