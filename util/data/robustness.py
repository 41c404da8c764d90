"""The test sets of the results table: their options, their classes, and each set's layout on disk."""

import argparse
import functools
import importlib.resources
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from timm.data import ImageNetInfo
from torchvision.datasets.folder import IMG_EXTENSIONS

from util import cli
from util.data.datasets import PackedFiles
from util.data.listing import list_classes
from util.errors import UserError

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
SETS = {  # and what its option names
    "imagenet": "val/<wnid>/ or the class folders themselves",
    "imagenet-real": "real.json, the labels of ReaL for the images of --imagenet",
    "imagenet-v2": "folders 0 to 999",
    "imagenet-a": "folders of the set's 200 wnids; these 200 logits are scored",
    "imagenet-r": "folders of the set's 200 wnids; these 200 logits are scored",
    "imagenet-sketch": "wnid folders",
    "imagenet-c": "<corruption>/<1 to 5>/<wnid>/, or the same below noise, blur, weather, digital, extra; no pixel is "
    "cut off, and none changed where the images have --input_size",
}


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


def named_folder(text: str) -> tuple[str, str]:
    """Option type: NAME=FOLDER, the name fit for a file's."""
    name, equals, folder = text.partition("=")
    plain = name.replace("-", "").replace("_", "").replace(".", "").isalnum() and len(name) <= 100
    if not equals or not folder or not plain or name.startswith("."):
        raise argparse.ArgumentTypeError(f"{text[:200]!r} is not NAME=FOLDER, the name of letters, digits, - _ .")
    if name in SETS:
        raise argparse.ArgumentTypeError(f"{name} is a set of the table: name yours otherwise")
    return name, cli.path(folder)


def add_set_options(parser: argparse.ArgumentParser) -> None:
    """A folder for each set of the table, and for sets of one's own."""
    add = parser.add_argument_group("sets, one at least").add_argument
    for name, what in SETS.items():
        add(_option(name), type=cli.path, metavar="FILE" if name == "imagenet-real" else "FOLDER", help=what)
    add("--set", action="append", type=named_folder, metavar="NAME=FOLDER",
        help="folders named as the classifier's classes; their logits alone are scored; may be repeated")  # fmt: skip
    add("--skip_unknown_classes", action="store_true",
        help="leave out class folders that the set or the classifier does not know (else an error)")  # fmt: skip
    add("--skip_bad_images", action="store_true",
        help="leave out files that cannot be decoded, and count them (else an error)")  # fmt: skip


def given_sets(args: argparse.Namespace) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The options of `add_set_options` -> (folders of the table's sets by name, (name, folder) of others).

    Raises UserError where there is none, or they contradict one another.
    """
    own, folders = args.set or [], {name: getattr(args, _option(name)[2:]) for name in SETS}
    if not any(folders.values()) and not own:
        raise UserError("there is no set to evaluate: pass --imagenet FOLDER or another; --help lists them")
    if not all(own):  # what argparse makes of --set=--
        raise UserError("--set needs NAME=FOLDER: name the set and its folder")
    if len({name for name, _ in own}) < len(own):
        raise UserError("--set is given twice with one name: give each set a name of its own")
    if (real := folders["imagenet-real"]) and not args.imagenet:
        raise UserError(f"--imagenet_real {real} holds labels of ImageNet's validation images: pass --imagenet too")
    for option, folder in [(_option(name), folders[name]) for name in SETS] + [(f"--set {n}", path) for n, path in own]:
        if folder and option != "--imagenet_real":
            _check_folder(option, folder)
    return folders, own


def _option(name: str) -> str:
    return f"--{name.replace('-', '_')}"


def list_sets(
    folders: dict[str, str], own: Sequence[tuple[str, str]] = (), endings: tuple[str, ...] = IMG_EXTENSIONS
) -> list[Listed]:
    """Folders of the published sets by name, and (name, folder) of others -> what lies there, in the table's order.

    Raises UserError where a folder is no layout of its set.
    """
    listed = []
    for name in SETS:
        if not (folder := folders.get(name)) or name == "imagenet-real":  # labels of another's images
            continue
        option = _option(name)
        if name == "imagenet" and os.path.isdir(Path(folder) / "val"):
            folder = os.path.join(folder, "val")
        listed += _corruptions(option, folder) if name == "imagenet-c" else [_list(name, option, folder)]
    return listed + [_list(name, f"--set {name}", folder, endings=endings) for name, folder in own]


def _list(
    name: str,
    option: str,
    folder: str | Path,
    corruption: str = "",
    strength: int = 0,
    endings: tuple[str, ...] = IMG_EXTENSIONS,
) -> Listed:
    _check_folder(option, folder)
    try:
        files, names = list_classes(folder, endings)
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
