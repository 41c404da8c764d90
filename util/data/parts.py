"""The parts of the results table: labelled by names, never by places; and one loader over all of them.

A part is what is evaluated in one go: a set, or of ImageNet-C one corruption at one strength. Letters: N images of a
part, M accepted labels of an image at most.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from util.data.bands import RGB, Bands, collate, tell_other_type
from util.data.datasets import BadImageError, Images, PackedFiles
from util.data.loader import DeviceLoader
from util.data.robustness import SETS, Listed, wnids
from util.data.workers import worker_options
from util.dist import Dist
from util.errors import UserError
from util.log import log
from util.transforms import CentreCrop, Size, eval_transform


@dataclass(frozen=True)
class Part:
    """Images of one set with the logits that count as right: `labels` of a set's name, [N, M], -1 fills up.

    `allowed`: the logits that are scored, None for all; `classes`: how many class folders are there, of how many.
    """

    set: str
    corruption: str
    strength: int
    files: PackedFiles
    labels: dict[str, torch.Tensor]
    allowed: torch.Tensor | None
    classes: tuple[int, int]
    transform: CentreCrop
    fingerprint: str

    @property
    def key(self) -> str:
        """Its name in messages, and of its file."""
        return f"{self.set}/{self.corruption}-{self.strength}" if self.corruption else self.set


def to_parts(
    listed: list[Listed], names: list[str], size: Size, real: str | None = None, skip_unknown: bool = False
) -> list[Part]:
    """Folders and a classifier's class names -> parts. `real`: the file of ReaL's labels, for imagenet.

    Raises UserError for class folders that the set or the classifier does not know; with `skip_unknown` they are left
    out, with a line saying so.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    as_it_is = CentreCrop(sides, sides)  # no margin to cut off; resizing to the size that it has changes no pixel
    transforms = {"imagenet-c": as_it_is}
    return [
        _to_part(item, names, transforms.get(item.set, eval_transform(size)), real, skip_unknown) for item in listed
    ]


def _to_part(item: Listed, names: list[str], transform: CentreCrop, real: str | None, skip_unknown: bool) -> Part:
    place = {name: i for i, name in enumerate(names)}
    folders = _numbered(item) if item.set == "imagenet-v2" else item.names
    classes = set(wnids(item.set)) if item.set in SETS else set(names)  # that the set may have
    unknown = [name for name, wnid in zip(item.names, folders, strict=True) if wnid not in classes & place.keys()]
    if unknown:
        what = f"{len(unknown)} of {len(item.names)} class folders of {item.root}"
        whose = "the classifier" if item.set not in SETS or set(folders) <= classes else item.set
        text = f"{item.option}: {what} are no class of {whose}, such as {unknown[0]!r}"
        if not skip_unknown or len(unknown) == len(item.names):
            raise UserError(
                f"{text}: is it the right folder? --classes names others, --skip_unknown_classes omits them"
            )
        log.warning(f"{text}: left out")
    position = np.array([place.get(wnid, -1) if wnid in classes else -1 for wnid in folders])[item.files.labels]
    files = item.files
    if unknown:
        files = PackedFiles([files[i] for i in np.flatnonzero(position >= 0)])
        position = position[position >= 0]
    if item.set not in SETS:  # the classes that the folder names
        allowed = sorted({place[wnid] for wnid in folders if wnid in place})
    else:
        allowed = sorted(place[name] for name in classes & place.keys())
    labels = {item.set: torch.from_numpy(position)[:, None]}
    if real and item.set == "imagenet":
        labels["imagenet-real"] = _real_labels(real, [path for path, _ in files], place)
    found = len(item.names) - len(unknown)
    digest = hashlib.sha256(json.dumps([allowed, transform.size, transform.resized]).encode())
    for path, _ in files:
        digest.update(os.fsencode(path[len(item.root) :]) + b"\0")
    for name, table in labels.items():
        digest.update(name.encode() + table.numpy().tobytes())
    return Part(
        item.set, item.corruption, item.strength, files, labels,
        torch.tensor(allowed) if len(allowed) < len(names) else None,
        (found, len(classes)), transform, digest.hexdigest(),
    )  # fmt: skip


def _numbered(item: Listed) -> list[str]:
    """The wnids of folders 0 to 999."""
    numbers = [int(name) if re.fullmatch(r"[0-9]{1,9}", name) else -1 for name in item.names]
    for name, number in zip(item.names, numbers, strict=True):
        if not 0 <= number < len(wnids()) or numbers.count(number) > 1:
            raise UserError(f"{item.option} {item.root}: folder {name!r} is none of 0 to 999: is it ImageNet-V2?")
    return [wnids()[number] for number in numbers]


def _real_labels(file: str, paths: list[str], place: dict[str, int]) -> torch.Tensor:
    """ReaL's labels of val/'s images as logits, [N, M]: list n is of the image whose file name ends in number n + 1."""
    option = f"--imagenet_real {file}"
    try:
        lists = json.loads(Path(file).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{option} cannot be read ({error}): give ReaL's real.json") from error
    n = len(wnids())
    good = isinstance(lists, list) and all(
        isinstance(row, list) and all(type(label) is int and 0 <= label < n for label in row) for row in lists
    )
    if not good:
        raise UserError(f"{option} is no list of lists of labels from 0 to {n - 1}: give ReaL's real.json")
    if lacking := [wnid for wnid in wnids() if wnid not in place]:
        raise UserError(f"{option} needs a classifier of ImageNet's 1,000 classes: this one lacks {lacking[0]}")
    rows = []
    for path in paths:
        number = re.search(r"([0-9]+)$", Path(path).stem)
        if number is None or not 1 <= int(number[1]) <= len(lists):
            raise UserError(
                f"{option} has {len(lists)} lists and none for {path}: the images must have their original names, such "
                "as ILSVRC2012_val_00000001.JPEG"
            )
        rows.append([place[wnids()[label]] for label in lists[int(number[1]) - 1]])
    if not any(rows):
        raise UserError(f"{option} has no label for any of the {len(paths)} images below --imagenet")
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def parts_loader(
    parts: Sequence[Part], batch_size: int, env: Dist, skip_bad: bool, num_workers: int, pin_mem: bool,
    timeout_seconds: float, bands: Bands = RGB,
) -> tuple[DeviceLoader, list[int]]:  # fmt: skip
    """This process's batches of all parts, of (images, numbers within the part), and how many each part has.

    An image that can't be decoded raises UserError with its name; with `skip_bad` its number i comes as -1 - i.
    """
    batches = PartBatches(parts, batch_size, env.rank, env.world_size)
    options = worker_options(num_workers if len(batches) else 0, pin_mem, env.device, timeout_seconds)
    images = PartImages(parts, skip_bad, bands)
    for number, part in enumerate(parts if env.is_main and bands.pixel_type != "rgb" else ()):
        tell_other_type(bands.pixel_type, images[number, 0][0], f"images of {part.key}", "the checkpoint says")
    loader = DataLoader(images, batch_sampler=batches, collate_fn=collate, **options)
    return DeviceLoader(loader, env.device, bands=bands), [batches.of(part) for part in range(len(parts))]


class PartImages(Dataset):
    """All parts' images behind one another, for one loader. Item (part, i): (pixels [H, W, C], False, i).

    A file that can't be decoded raises UserError with its name; with `skip_bad` it comes as black with -1 - i.
    """

    def __init__(self, parts: Sequence[Part], skip_bad: bool, bands: Bands = RGB) -> None:
        self.images = [Images(part.files, part.transform, bands=bands) for part in parts]
        self.skip_bad, self.bands = skip_bad, bands

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, bool, int]:
        part, i = key
        try:
            return *self.images[part][i][:2], i
        except BadImageError:
            if not self.skip_bad:
                raise
        size = *self.images[part].transform.size, self.bands.in_chans
        return torch.zeros(size, dtype=self.bands.dtype), False, -1 - i


class PartBatches:
    """The batches of one of `world_size` processes: keys of PartImages. Each is of one part, and the same images
    whatever the number of processes, so that logits are the same to the last bit: every `world_size`-th is its own.
    """

    def __init__(self, parts: Sequence[Part], batch_size: int, rank: int, world_size: int) -> None:
        starts = [(p, i) for p, part in enumerate(parts) for i in range(0, len(part.files), batch_size)]
        self.batch_size, self.lengths = batch_size, [len(part.files) for part in parts]
        self.starts = starts[rank::world_size]

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for part, start in self.starts:
            yield [(part, i) for i in range(start, min(start + self.batch_size, self.lengths[part]))]

    def of(self, part: int) -> int:
        """How many are of this part."""
        return sum(p == part for p, _ in self.starts)
