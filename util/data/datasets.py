"""Where images come from: files on disk, decoded, transformed, in an order set by (seed, epoch)."""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS

from util import rng
from util.data.decode import decode, pixel_limit
from util.dist import Dist
from util.errors import UserError, printable
from util.log import log

# those of torchvision's ImageFolder, which the original trains from: others would change its labels and counts
ENDINGS = " ".join(IMG_EXTENSIONS)


def list_images(root: str | Path) -> list[tuple[str, int]]:
    """Folder -> [(path, -1), ...]: all images below it, at any depth, in sorted order; no labels.

    Raises UserError where the folder is missing, holds no image, or a folder in it may not be read.
    """
    listing = _Listing()
    files = [(path, -1) for path in listing.images(_existing_folder(root))]
    listing.report(root)
    if not files:
        raise UserError(f"no images below {printable(root)}: images are files ending in {ENDINGS}")
    return files


def list_classes(root: str | Path) -> tuple[list[tuple[str, int]], list[str]]:
    """Folder of class folders -> ([(path, label), ...], class names); labels count the sorted class names.

    Raises UserError where the folder is missing, has no class folder, one of them holds no image, or may not be read.
    """
    listing = _Listing()
    found = listing.classes(_existing_folder(root))
    listing.report(root)
    return _filled(root, *found)


def _filled(root: str | Path, files: list[tuple[str, int]], classes: list[str]) -> tuple[list, list[str]]:
    """The same, or UserError where there are no classes or some are empty."""
    if not classes:
        raise UserError(f"no class folders in {printable(root)}: expected {printable(root)}/<class>/<image>")
    empty = sorted(set(range(len(classes))) - {label for _, label in files})
    if empty:
        words = f"{len(empty)} class folders of {printable(root)} hold no image, such as {classes[empty[0]]!r}"
        raise UserError(f"{words}: fill or remove them; images are files ending in {ENDINGS}")
    return files, classes


class _Listing:
    """Lists images below folders, and remembers what is no image and what may not be read."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        self.unreadable: list[str] = []

    def images(self, root: str | Path) -> Iterator[str]:
        """Image files below `root`: of each folder in sorted order, then its folders' in sorted order.

        Links are followed, but each real folder is listed once, and none above `root`. Hidden files and folders are
        left out, and whatever is no regular file: a pipe would block its reader.
        """
        seen, waiting = {os.stat(folder)[1:3] for folder in Path(root).resolve().parents}, [str(root)]
        while waiting:
            folder = waiting.pop()
            entries, identity = self._look_into(folder)
            if identity in seen:
                self.left_out["folders that have another name"] += 1
                continue
            seen.add(identity)
            folders = []
            for entry in entries:
                if self._is_folder(entry):
                    folders.append(entry.path)
                elif self._is_image(entry):
                    yield entry.path
            waiting += reversed(folders)

    def classes(self, root: str | Path) -> tuple[list[tuple[str, int]], list[str]]:
        """`root` -> ([(path, label), ...], class names)."""
        folders = []
        for entry in self._look_into(str(root))[0]:
            if self._is_folder(entry):
                folders.append(entry)
            elif self._is_image(entry):
                self.left_out["images in no class folder"] += 1
        files = [(path, label) for label, entry in enumerate(folders) for path in self.images(entry.path)]
        return files, [entry.name for entry in folders]

    def report(self, root: str | Path) -> None:
        """Log what was left out. Raises UserError that names the folders that could not be read."""
        if self.unreadable:
            names = ", ".join(self.unreadable[:20]) + (", ..." if len(self.unreadable) > 20 else "")
            raise UserError(f"{len(self.unreadable)} folders cannot be read: {names}. Allow it, or remove them")
        if left_out := +self.left_out:
            counts = [f"{n:,} {what}" for what, n in left_out.most_common(12)] + ["..."] * (len(left_out) > 12)
            log.info(f"left out below {printable(root)}: {', '.join(counts)}. Images are files ending in {ENDINGS}")

    def _look_into(self, folder: str) -> tuple[list[os.DirEntry], tuple[int, int] | None]:
        """(What is in it and not hidden, sorted; which folder it really is)."""
        try:
            identity = os.stat(os.path.join(folder, "."))[1:3]  # inode and device; asks for the right to enter, too
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            self.unreadable.append(f"{printable(folder)} ({error.strerror})")
            return [], None
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        self.left_out["hidden"] += len(entries) - len(visible)
        return visible, identity

    def _is_folder(self, entry: os.DirEntry) -> bool:
        try:
            return entry.is_dir()
        except OSError as error:  # of a link
            if isinstance(error, PermissionError):
                self.unreadable.append(f"{printable(entry.path)} ({error.strerror})")
            return False

    def _is_image(self, entry: os.DirEntry) -> bool:
        ending = os.path.splitext(entry.name)[1].lower()
        if ending not in IMG_EXTENSIONS:
            self.left_out[f"ending in {printable(ending)[:16]}" if ending else "without an ending"] += 1
            return False
        if entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path) or not os.path.exists(entry.path):
            return True  # or a link to nowhere, which is told when it is read
        self.left_out["pipes, sockets or devices"] += 1
        return False


def classification_files(
    data_path: str | None, nb_classes: int, with_train: bool
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Folder with train/ and val/ -> (train files, val files); train is empty without `with_train`.

    Raises UserError where a split is missing or empty, or the class folders don't fit each other or `nb_classes`.
    """
    if not data_path:
        raise UserError("--data_path is not given: name a folder with train/<class>/ and val/<class>/")
    splits = [Path(data_path) / name for name in ("val", "train")[: 1 + with_train]]
    listing = _Listing()
    found = [listing.classes(_existing_folder(split)) for split in splits]
    listing.report(data_path)
    (val_files, classes), *train = [_filled(split, *there) for split, there in zip(splits, found, strict=True)]
    train_files, train_classes = train[0] if train else ([], classes)
    if train_classes != classes:
        only_train, only_val = sorted(set(train_classes) - set(classes)), sorted(set(classes) - set(train_classes))
        raise UserError(
            f"train and val have different class folders: {len(only_train)} only in train {only_train[:3]}, "
            f"{len(only_val)} only in val {only_val[:3]}"
        )
    if len(classes) != nb_classes:
        raise UserError(f"--nb_classes {nb_classes}, but the data has {len(classes)} class folders: pass that number")
    return train_files, val_files


def _existing_folder(root: str | Path) -> Path:
    try:
        if stat.S_ISDIR(os.stat(root).st_mode):
            return Path(root)
        reason = "it is a file"
    except (OSError, ValueError) as error:  # of a name that is too long, too
        reason = getattr(error, "strerror", error)
    raise UserError(f"no folder {printable(root)} ({reason}): --data_path holds train/ and val/ (pretraining: images)")


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

    def read(self, index: int) -> tuple[torch.Tensor, int]:
        """The file's content [n_bytes] uint8, and its label."""
        path, label = self[index]
        return torch.from_numpy(np.fromfile(path, np.uint8)), label

    def name(self, index: int) -> str:
        """Where the image is, for messages."""
        return printable(self[index][0])

    def digest(self) -> str:
        """Of all paths, from the folder on that holds them all, and labels, in their order."""
        ends = self.ends.tolist()
        paths = [bytes(path) for path in map(memoryview(self.paths).__getitem__, map(slice, ends, ends[1:]))]
        common = os.path.commonprefix([min(paths), max(paths)]).rfind(os.sep.encode()) + 1 if paths else 0
        digest = hashlib.sha256(b"\0".join([path[common:] for path in paths]))
        digest.update(self.labels.tobytes())
        return digest.hexdigest()[:16]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        path = self.paths[self.ends[index] : self.ends[index + 1]].tobytes()
        return os.fsdecode(path), int(self.labels[index])


class Images(Dataset):
    """Images from a source: (uint8 [H, W, 3], to be mirrored, label). `transform`: see util/transforms.py.

    A source has a length, `read(index)` -> (an image file's bytes [n] uint8, its label or -1) and `name(index)`, for
    messages. PackedFiles is one; a list of (path, label) becomes one. Item (epoch, index) is augmented by (seed, epoch,
    index); item `index` draws nothing. What can't be decoded raises UserError with its name; with `skip_bad` the next
    good one takes its place, and `take_bad()` lists it. `classes`: names in label order, where who made it knows them.
    """

    classes: list[str] | None = None

    def __init__(self, source, transform: Callable, seed: int = 0, skip_bad: bool = False) -> None:
        self.source = PackedFiles(source) if isinstance(source, list) else source
        self.transform, self.seed, self.skip_bad = transform, seed, skip_bad
        pixel_limit()  # a wrong one is told now
        # a flag a file, in memory that loader workers share with the trainer
        self.bad = torch.zeros(len(self.source), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, bool, int]:
        epoch, index = key if isinstance(key, tuple) else (None, key)
        pixels, label = self._load(index)
        if epoch is not None:
            rng.seed_sample(self.seed, epoch, index)
        return *self.transform(pixels), label

    def digest(self) -> str:
        """What tells these images, and their order, from others, wherever they lie."""
        if hasattr(self.source, "digest"):
            return f"{len(self)} images {self.source.digest()}"
        names = [self.source.name(i) for i in range(0, len(self), max(len(self) // 100, 1))]
        return f"{len(self)} images {hashlib.sha256(repr(names).encode()).hexdigest()[:16]}"

    def _load(self, index: int) -> tuple[torch.Tensor, int]:
        for offset in range(len(self)):
            try:
                data, label = self.source.read((index + offset) % len(self))
                return decode(data), label
            except UserError:
                raise
            except Exception as error:  # decoders raise whatever they like
                if not self.skip_bad:
                    raise UserError(
                        f"cannot decode {self.source.name(index)} ({type(error).__name__}: {printable(error)[:300]}): "
                        "mend or remove it, or pass --skip_bad_images"
                    ) from error
                self.bad[(index + offset) % len(self)] = 1
        raise UserError(f"none of the {len(self)} images can be decoded, such as {self.source.name(0)}")

    def take_bad(self) -> list[str]:
        """Paths of the files skipped since the last call."""
        paths = [self.source.name(i) for i in self.bad.nonzero().flatten().tolist()]
        self.bad.zero_()
        return paths


def report_bad(dataset: Images) -> None:
    """Log the files that were skipped in this epoch, if any."""
    paths = dataset.take_bad()
    if paths:
        shown = "\n  ".join(map(printable, paths[:20])) + ("\n  ..." if len(paths) > 20 else "")
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
