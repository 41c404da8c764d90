"""The test sets of the results table: from each set's layout on disk to its parts, labelled by names, never by places.

A part is what is evaluated in one go: a set, or of ImageNet-C one corruption at one strength. Letters: N images of a
part, M accepted labels of an image at most.
"""

import argparse
import functools
import hashlib
import importlib.resources
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.data import ImageNetInfo

from util import cli
from util.data.datasets import PackedFiles, list_classes
from util.errors import UserError
from util.log import log
from util.transforms import CentreCrop, Size, eval_transform

# AlexNet's mean error over the five strengths of each corruption, as the authors of ImageNet-C published it
ALEXNET = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip
# published beside them, and no part of their mean
EXTRA = {"speckle_noise": 0.845388, "gaussian_blur": 0.787108, "spatter": 0.717512, "saturate": 0.658248}
GROUPS = ("noise", "blur", "weather", "digital", "extra")  # as the archives unpack
STRENGTHS = range(1, 6)
# images of a whole set (of ImageNet-C: of a part)
IMAGES = {
    "imagenet": 50000, "imagenet-v2": 10000, "imagenet-a": 7500, "imagenet-r": 30000, "imagenet-sketch": 50000,
    "imagenet-c": 50000,
}  # fmt: skip
SETS = ("imagenet", "imagenet-real", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-c")


@functools.cache
def wnids(name: str = "imagenet") -> list[str]:
    """The classes of a set in label order, as timm lists them: 200 of imagenet-a and -r, 1,000 of the others."""
    if name in ("imagenet-a", "imagenet-r"):
        file = importlib.resources.files("timm.data") / "_info" / f"{name.replace('-', '_')}_synsets.txt"
        return file.read_text().split()
    return ImageNetInfo("imagenet-1k").label_names()


@dataclass(frozen=True)
class Listed:
    """A folder of class folders: its files, with labels that count `names`. `option` is what named it."""

    set: str
    option: str
    root: str
    files: PackedFiles
    names: list[str]
    corruption: str = ""
    strength: int = 0


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


def named_folder(text: str) -> tuple[str, str]:
    """Option type: NAME=FOLDER, the name fit for a file's."""
    name, equals, folder = text.partition("=")
    plain = name.replace("-", "").replace("_", "").replace(".", "").isalnum() and len(name) <= 100
    if not equals or not folder or not plain or name.startswith("."):
        raise argparse.ArgumentTypeError(f"{text[:200]!r} is not NAME=FOLDER, the name of letters, digits, - _ .")
    if name in SETS:
        raise argparse.ArgumentTypeError(f"{name} is a set of the table: name yours otherwise")
    return name, cli.path(folder)


def list_sets(folders: dict[str, str], own: Sequence[tuple[str, str]] = ()) -> list[Listed]:
    """Folders of the published sets by name, and (name, folder) of others -> what lies there, in the table's order.

    Raises UserError where a folder is no layout of its set.
    """
    listed = []
    for name in SETS:
        if not (folder := folders.get(name)):
            continue
        option = f"--{name.replace('-', '_')}"
        if name == "imagenet" and os.path.isdir(Path(folder) / "val"):
            folder = os.path.join(folder, "val")
        listed += _corruptions(option, folder) if name == "imagenet-c" else [_list(name, option, folder)]
    return listed + [_list(name, f"--set {name}", folder) for name, folder in own]


def _list(name: str, option: str, folder: str | Path, corruption: str = "", strength: int = 0) -> Listed:
    _check_folder(option, folder)
    try:
        files, names = list_classes(folder)
    except UserError as error:
        raise UserError(f"{option}: {error.message}{_archives(folder)}") from error
    return Listed(name, option, str(folder), PackedFiles(files), names, corruption, strength)


def _check_folder(option: str, folder: str | Path) -> None:
    if not os.path.isdir(folder):
        raise UserError(f"{option} {folder}: there is no such folder")


def _archives(folder: str | Path) -> str:
    """A hint for who has not unpacked everything."""
    packed = [name for name in sorted(os.listdir(folder)) if re.search(r"\.(tar|tgz|tar\.\w+|zip)$", name)]
    return f" ({packed[0]} lies there: unpack it)" if packed else ""


def _subfolders(folder: str | Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error}): mend its permissions, or leave it out") from error


def _corruptions(option: str, folder: str) -> list[Listed]:
    """<corruption>/<strength>/<wnid>/ or <group>/<corruption>/…, or both side by side."""
    _check_folder(option, folder)
    known, found = {**ALEXNET, **EXTRA}, {}
    for name in _subfolders(folder):
        inner = _subfolders(Path(folder, name)) if name in GROUPS else [""]
        for path in (Path(folder, name, rest) for rest in inner):
            if path.name not in known:
                raise UserError(
                    f"{option} {folder}: {path} is no corruption of ImageNet-C, as {', '.join(known)} are: "
                    "remove or rename it"
                )
            if path.name in found:
                raise UserError(f"{option}: {path.name} is there twice, {found[path.name]} and {path}: remove one")
            found[path.name] = path
    if not found:
        raise UserError(
            f"{option} {folder} holds no corruption: expected <corruption>/<1 to 5>/<wnid>/, such as fog/3/, or below "
            f"{', '.join(GROUPS)}{_archives(folder)}"
        )
    parts = []
    for name in (name for name in known if name in found):
        strengths = _subfolders(found[name])
        foreign = [text for text in strengths if text not in map(str, STRENGTHS)]
        if foreign or not strengths:
            what = f"{foreign[0]!r} is no strength" if foreign else "it holds no strength"
            raise UserError(f"{option} {found[name]}: {what}: expected folders 1 to 5{_archives(found[name])}")
        parts += [_list("imagenet-c", option, found[name] / text, name, int(text)) for text in strengths]
    return parts


def class_names(n_logits: int, told: object, file: str | None) -> list[str]:
    """The classifier's class names in label order: from --classes `file`, else as its checkpoint `told`; 1,000 without
    names are ImageNet's. Raises UserError where there are none, or not as many as logits, or one twice.
    """
    names, source = told, "the checkpoint"
    if file:
        source = f"--classes {file}"
        try:
            names = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{source} cannot be read ({error}): give a text file with a class name a line") from error
        names = [name.strip() for name in names if name.strip()]
    if names is None and n_logits == len(wnids()):
        return wnids()
    if names is None:
        raise UserError(
            f"the classifier has {n_logits} classes and does not name them, so labels cannot be told: pass --classes "
            "FILE, a class name a line in the order of its logits (a wnid each for the sets of ImageNet; of more than "
            "1,000 classes the 1,000 of ImageNet-1K are then scored)"
        )
    if not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{source} holds class names that are no list of texts: pass --classes FILE")
    if len(names) != n_logits:
        raise UserError(f"{source} names {len(names)} classes, but the classifier has {n_logits}: give a name for each")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{source} names the class {twice!r} twice: give each a name of its own")
    return list(names)


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
