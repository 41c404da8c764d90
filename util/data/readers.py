"""--dataset: images from timm's readers: WebDataset shards, Hugging Face or TensorFlow datasets, tar files.

Readers of the first kind give any image by its number (tar, hfds/NAME) and are treated like files in folders. Streams
(wds/NAME, hfids/NAME, tfds/NAME) are read from one end to the other, each process and loader worker its own part:
their order and augmentation come from (seed, epoch), but change with the number of processes and workers.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from timm.data.readers import create_reader
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torchvision.datasets.folder import IMG_EXTENSIONS

from util import rng
from util.data import lists, transfer
from util.data.bands import RGB, Bands
from util.data.datasets import Images
from util.data.decode import pixel_limit
from util.data.listing import classification_files, list_images
from util.dist import Dist
from util.errors import UserError, printable
from util.log import log

STREAMS = ("wds", "hfids", "tfds")
KINDS = ("tar", "hfds", *STREAMS)
Files = Sequence[tuple[str, int]]  # (path, label)


class ReaderSource:
    """The images of a reader that gives any of them by its number. Labels from `nb_classes` on raise UserError."""

    def __init__(self, reader: Reader, nb_classes: int | None) -> None:
        self.reader, self.nb_classes = reader, nb_classes

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> tuple[torch.Tensor, int]:
        """The image's file [n_bytes] uint8, and its label."""
        file, label = self.reader[index]
        with file:
            data = torch.from_numpy(np.frombuffer(bytearray(file.read()), np.uint8))
        check_label(label, self.nb_classes)
        return data, -1 if label is None else int(label)

    def name(self, index: int) -> str:
        """Where the image is, for messages."""
        return printable(self.reader.filename(index))


class Stream:
    """Images that come in the order of a reader, for one process of `world_size`; see `iterate`.

    `open_reader(seed)` opens it anew, which happens once for each worker and epoch, so that nothing is carried along.
    """

    classes: list[str] | None = None
    bands: Bands = RGB

    def __init__(
        self, open_reader: Callable[[int], Reader], transform: Callable, seed: int, training: bool,
        nb_classes: int | None, rank: int, world_size: int,
    ) -> None:  # fmt: skip
        self.open_reader, self.transform, self.seed, self.training = open_reader, transform, seed, training
        self.nb_classes, self.rank, self.world_size = nb_classes, rank, world_size
        pixel_limit()  # Pillow's, which the readers obey
        reader = open_reader(seed)
        self.n_images = reader.num_samples or 0
        if not training:
            _keep_own_share(reader, rank, world_size)  # or say now that there is none

    def __len__(self) -> int:
        """Images over all processes, as the dataset itself says; 0 where it does not."""
        return self.n_images

    def digest(self) -> str:
        """What tells these images from others, beside --dataset and the split: their number."""
        return f"{len(self)} images"

    def iterate(self, epoch: int) -> Iterator[tuple[torch.Tensor, bool, int]]:
        """This process's (and this loader worker's) images: (pixels [h, w, C], to be mirrored, label)."""
        info = torch.utils.data.get_worker_info()
        worker, n_workers = (info.id, info.num_workers) if info else (0, 1)
        reader = self.open_reader(self.seed)
        reader.dist_rank, reader.dist_num_replicas = self.rank, self.world_size
        reader.worker_seed = rng.stream_generator(self.seed, epoch).initial_seed()  # loader workers have their own
        if not self.training:
            _keep_own_share(reader, self.rank, self.world_size)
        reader.set_epoch(epoch)
        for count, (image, label) in enumerate(reader):
            check_label(label, self.nb_classes)
            rng.seed_sample(self.seed, epoch, (count * n_workers + worker) * self.world_size + self.rank)
            try:
                pixels = self.bands.of_image(image)
            except ValueError as error:
                raise UserError(f"image {count} of worker {worker} of the stream has {error}") from error
            yield *self.transform(pixels), int(label)

    def take_bad(self) -> list[str]:
        """None: the readers skip what they cannot decode and say so themselves."""
        return []


def pretraining_images(
    root: str | None, name: str, split: str, transform: Callable, env: Dist, seed: int, skip_bad: bool,
    endings: tuple[str, ...] = IMG_EXTENSIONS,
) -> Images | Stream:  # fmt: skip
    """All images of `root`/train, below `root` or of the list `root`; with `name`, those of `split` of a dataset.

    Labels don't matter. Raises UserError where there are no images.
    """
    if name in transfer.SETS:
        return Images(transfer.unlabelled(name, root, split, skip_bad), transform, seed, skip_bad)
    if name:
        return _open(name, root, split, transform, env, seed, skip_bad, training=True)
    _check_splits((split, "val"))
    if not root:
        raise UserError("--data_path is not given: name a folder of images, such as --data_path /data/imagenet")
    if lists.is_list(root):
        log.info(f"training on the images that {printable(root)} lists")
        return Images(lists.unlabelled(root, skip_bad), transform, seed, skip_bad)
    folder = Path(root) / "train"
    if not os.path.lexists(folder):  # a link that leads nowhere is an error, not val/ as well
        folder = Path(root)
    log.info(f"training on the images below {printable(folder)}")
    return Images(list_images(folder, endings), transform, seed, skip_bad)


def labelled_images(
    root: str | None, name: str, splits: tuple[str, str], transforms: tuple[Callable | None, Callable],
    nb_classes: int, env: Dist, sharded: bool, seed: int, skip_bad: bool, val_path: str | None = None,
    endings: tuple[str, ...] = IMG_EXTENSIONS,
) -> tuple[Images | Stream | None, Images | Stream]:  # fmt: skip
    """(To train on, to validate): `root`/train and val, the lists `root` and `val_path`, or two `splits` of `name`.

    The former is None where it has no transform; the latter has `classes`, names in label order, where they are known.
    `sharded` evaluation takes its own part in each process. Raises UserError where images are missing, or the classes
    do not fit one another or `nb_classes`.
    """
    train_transform, val_transform = transforms
    if not name or name in transfer.SETS:
        with_train = train_transform is not None
        train_files, val_files, classes = labelled_files(
            root, name, splits, nb_classes, with_train, skip_bad, val_path, endings
        )
        train_set = Images(train_files, train_transform, seed, skip_bad) if with_train else None
        val_set = Images(val_files, val_transform, seed, skip_bad)
        val_set.classes = classes
        return train_set, val_set
    _check_val_path(name, val_path)
    options = {"seed": seed, "skip_bad": skip_bad, "nb_classes": nb_classes}
    val_env = env if sharded else Dist(env.device)
    val_set = _open(name, root, splits[1], val_transform, val_env, training=False, **options)
    if train_transform is None:
        return None, val_set
    return _open(name, root, splits[0], train_transform, env, training=True, **options), val_set


def labelled_files(
    root: str | None, name: str, splits: tuple[str, str], nb_classes: int | None, with_train: bool, skip_bad: bool,
    val_path: str | None = None, endings: tuple[str, ...] = IMG_EXTENSIONS,
) -> tuple[Files | None, Files, list[str]]:  # fmt: skip
    """(Files to train on, None or empty unless `with_train`; to validate on; class names in label order), from folders,
    lists or, with `name`, two `splits` of a published set; see `labelled_images`. `nb_classes` None: as many as there
    are.
    """
    _check_val_path(name, val_path)
    if name:
        return transfer.labelled(name, root, splits, nb_classes, with_train, skip_bad)
    _check_splits(splits)
    if val_path or lists.is_list(root):
        return lists.labelled(root, val_path, nb_classes, with_train, skip_bad)
    return _labelled_folders(root, nb_classes, with_train, endings)


def _check_val_path(name: str, val_path: str | None) -> None:
    if name and val_path:
        raise UserError("--val_path is a list beside another, and --dataset has its own splits: leave one of them out")


def _check_splits(splits: tuple[str, str]) -> None:
    """Raise UserError where the splits of a --dataset are named and there is none: val/ would be taken for them."""
    for option, split, own in zip(("--train_split", "--val_split"), splits, ("train", "val"), strict=True):
        if split != own:
            raise UserError(f"{option} {split} is for --dataset: folders are train/ and val/, lists their own")


def _labelled_folders(
    root: str | None, nb_classes: int | None, with_train: bool, endings: tuple[str, ...]
) -> tuple[list, list, list[str]]:
    """Folder with train/ and val/ -> (files to train on; to validate on; class names in label order)."""
    train_files, val_files = classification_files(root, nb_classes, with_train, endings)
    folder = Path(root) / "val"
    names = {label: Path(path).relative_to(folder).parts[0] for path, label in val_files}
    return train_files, val_files, [names[label] for label in sorted(names)]


def _open(
    name: str, root: str | None, split: str, transform: Callable, env: Dist, seed: int, skip_bad: bool,
    training: bool, nb_classes: int | None = None,
) -> Images | Stream:  # fmt: skip
    """One split of a dataset. Raises UserError with the reader's own words where it cannot be opened."""
    kind = name.split("/")[0].lower()
    if kind not in KINDS or (kind == "tar") != (name == "tar"):
        forms = ["tar", *(f"{other}/NAME" for other in KINDS[1:]), *transfer.SETS]
        raise UserError(f"--dataset {name} is not known: use one of {', '.join(forms)}")
    try:
        if kind in STREAMS:
            opener = _StreamOpener(name, root, split, training)
            stream = Stream(opener, transform, seed, training, nb_classes, env.rank, env.world_size)
            if training and not len(stream):
                raise ValueError("it does not tell its number of images")
            return stream
        reader = ReaderImageInTar(_tar_root(root, split)) if kind == "tar" else create_reader(name, root, split=split)
    except UserError:
        raise
    except Exception as error:  # each library raises what it likes
        raise UserError(
            f"--dataset {name} (--data_path {root}, split {split!r}) cannot be opened: {type(error).__name__}: {error}"
        ) from error
    if len(reader) == 0:
        raise UserError(f"--dataset {name} (--data_path {root}, split {split!r}) holds no images")
    images = Images(ReaderSource(reader, nb_classes), transform, seed, skip_bad)
    # each reader has its own name for it
    places = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    if isinstance(places, dict) and set(places.values()) == set(range(nb_classes or 0)):
        images.classes = [str(name) for name in sorted(places, key=places.get)]
    return images


def _keep_own_share(reader: Reader, rank: int, world_size: int) -> None:
    """Leave to a reader, in evaluation, nothing but its process's share.

    By themselves WebDataset's and TensorFlow's make the processes' shares equally long, so some images would count
    twice; alone in the world, they do not. Raises UserError where WebDataset's shards are fewer than processes.
    """
    kind = type(reader).__name__  # their modules need packages that are optional here
    if kind == "ReaderWds":
        shards = reader.split_info.filenames
        if len(shards) < world_size:
            raise UserError(
                f"--dist_eval needs a shard for each of {world_size} processes, but there are {len(shards)} to "
                "validate on: write smaller shards, or leave --dist_eval out"
            )
        reader.split_info.filenames = shards[rank::world_size]
    elif kind == "ReaderTfds":
        import tensorflow_datasets as tfds

        reader.split = tfds.even_splits(reader.split, world_size)[rank]
        reader.split_info = reader.builder.info.splits[reader.split]
    else:
        return
    reader.dist_rank, reader.dist_num_replicas = 0, 1


class _StreamOpener:
    """seed -> reader; a class, so that spawned workers can be given it."""

    def __init__(self, name: str, root: str | None, split: str, training: bool) -> None:
        self.options = {"name": name, "root": root, "split": split, "is_training": training}
        if not name.startswith("tfds"):  # which TensorFlow decodes: 8 bits at most
            self.options["input_img_mode"] = ""  # values as they are, for `to_rgb`
        if name.lower().startswith("wds"):
            self.options["input_key"] = ";".join(ending[1:] for ending in IMG_EXTENSIONS)  # timm's: jpg, png, webp

    def __call__(self, seed: int) -> Reader:
        return create_reader(**self.options, seed=seed)


def _tar_root(root: str | None, split: str) -> str:
    """FOLDER/train.tar with class folders inside, or FOLDER/train/ with one tar file a class."""
    for path in (Path(root or "") / f"{split}.tar", Path(root or "") / split):
        if root and path.exists():
            return str(path)
    raise FileNotFoundError(f"there is neither {split}.tar nor a folder {split}")


def check_label(label: int | None, nb_classes: int | None) -> None:
    """Raise UserError for a label that the classifier has no class for. `nb_classes` None takes any."""
    if nb_classes is not None and not (label is not None and 0 <= label < nb_classes):
        raise UserError(f"an image has label {label}, but --nb_classes is {nb_classes}: pass the number of classes")
