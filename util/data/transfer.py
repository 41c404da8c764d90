"""--dataset inat2017, inat2018, inat2019, places205, places365: the official archives as they unpack below --data_path.

The split is that of the official files, and so are the labels; a category without images keeps its number. Layouts:

    train_val_images/ (2017), train_val2018/, train_val2019/    with train2018.json and val2018.json (2017, 2019)
    data/vision/torralba/deeplearning/images256/                with trainvalsplit_places205/{train,val}_places205.csv
    data_large/ or data_256/, val_large/ or val_256/            with categories_places365.txt,
                                                                places365_train_standard.txt and places365_val.txt
The lists of Places365 may lie in filelist_places365-standard/, and its training folder end in _standard.
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from util.data.datasets import PackedFiles
from util.data.listing import Listing
from util.data.lists import FileList, check_there, tell_empty
from util.errors import UserError, printable, shown
from util.log import log

INATURALIST = ("inat2017", "inat2018", "inat2019")
SETS = (*INATURALIST, "places205", "places365")


class Split(NamedTuple):
    """The files of a split, relative to the set's root; each category's name by its number; the official file; and
    the folders that hold images of the set.
    """

    files: PackedFiles
    names: dict[int, str]
    source: str
    folders: set[str]


def unlabelled(name: str, root: str | None, split: str, skip_bad: bool) -> PackedFiles:
    """The files of a split, for pretraining. Raises UserError, see `labelled`."""
    part = _open(name, _root(name, root), split)
    check_there(part.files, part.source, skip_bad)
    return part.files


def labelled(
    name: str, root: str | None, splits: tuple[str, str], nb_classes: int | None, with_train: bool, skip_bad: bool
) -> tuple[PackedFiles | None, PackedFiles, list[str]]:
    """(Files to train on, None unless `with_train`; files to validate on; category names in label order).

    With both, the files on the disk are compared with the official ones: those that are missing raise, as a sample of a
    single split does, and what no official file names is left out with a line. Raises UserError where an official file
    is missing, wrong or there twice, or `nb_classes` is not the number of categories.
    """
    root = _root(name, root)
    parts = [_open(name, root, split) for split in splits[0 if with_train else 1 :]]
    names: dict[int, str] = {}
    for part in parts:
        for number, text in part.names.items():
            if names.setdefault(number, text) != text:
                words = f"category {number} is {shown(names[number])} in one and {shown(text)} in the other"
                raise UserError(f"{' and '.join(printable(one.source) for one in parts)} are not of one set: {words}")
    n_classes = max(names) + 1
    if nb_classes not in (None, n_classes):
        raise UserError(f"--nb_classes {nb_classes}, but {name} has {n_classes} categories here: pass that number")
    for part in parts:
        check_there(part.files, part.source, skip_bad)
    if with_train:
        _compare_with_disk(root, parts, skip_bad)
    *train, val = (part.files for part in parts)
    found = train[0] if train else None, val, [names.get(number, str(number)) for number in range(n_classes)]
    tell_empty(*found)
    return found


def _root(name: str, root: str | None) -> str:
    if not root or not os.path.isdir(root):
        raise UserError(f"--dataset {name}: --data_path {root} is no folder: name the one that the archives lie in")
    return str(Path(root))  # as the listing of folders writes it


def _open(name: str, root: str, split: str) -> Split:
    if split not in ("train", "val"):
        raise UserError(f"--dataset {name} has no split {split!r}: choose train or val")
    if name in INATURALIST:
        return _inaturalist(root, name.removeprefix("inat"), split)
    return _places205(root, split) if name == "places205" else _places365(root, split)


def _official(root: str, name: str, *folders: str) -> str:
    """Path of the one official file of that name, below `root` or one of its `folders`."""
    places = [os.path.join(root, folder, name) for folder in ("", *folders)]
    found = [path for path in places if os.path.isfile(path)]
    if len(found) > 1:
        raise UserError(f"{' and '.join(map(printable, found))}: one of them is too many, remove it")
    if not found:
        raise UserError(f"no file {printable(places[0])}: unpack it there, from the set's official annotations")
    return found[0]


def _inaturalist(root: str, year: str, split: str) -> Split:
    path = _official(root, f"{split}{year}.json", "annotations", f"{split}{year}", f"train_val{year}")
    try:
        with open(path, "rb") as file:
            content = json.load(file)
        images, annotations, categories = (content[key] for key in ("images", "annotations", "categories"))
        names = {image["id"]: image["file_name"] for image in images}
        labels = {annotation["image_id"]: annotation["category_id"] for annotation in annotations}
        texts = {category["id"]: category["name"] for category in categories}
        parents = {category["id"]: category.get("supercategory") for category in categories}
    except OSError as error:
        raise UserError(f"cannot read {printable(path)}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # of JSON, and of UTF-8
        raise UserError(f"{printable(path)} is no JSON ({printable(error)[:200]}): unpack it again") from None
    except (KeyError, TypeError, AttributeError) as error:
        words = f"{type(error).__name__}: {printable(error)[:200]}"
        raise UserError(
            f"{printable(path)} is not as published: images (id, file_name), annotations (image_id, category_id) and "
            f"categories (id, name) are expected ({words})"
        ) from None
    fault = _inaturalist_fault(names, labels, texts, (len(images), len(annotations), len(categories)))
    if fault:
        raise UserError(f"{printable(path)} is not as published: {fault}")
    if len(set(texts.values())) < len(texts):  # one name in two kingdoms
        texts = {number: f"{parents[number]}/{text}" for number, text in texts.items()}
    batch = ([os.fsencode(file_name) for file_name in names.values()], [labels[image] for image in names])
    folders = {file_name.split("/")[0] for file_name in names.values()}
    return Split(PackedFiles.of_batches([batch], root), texts, path, folders)


def _inaturalist_fault(names: dict, labels: dict, texts: dict, lengths: tuple[int, int, int]) -> str | None:
    """What contradicts itself in images, annotations and categories by their ids, of which there were so many."""
    for of, n, what in zip((names, labels, texts), lengths, ("image", "image's annotation", "category"), strict=True):
        if len(of) < n:
            return f"an id of {what} comes twice, {n} have {len(of)} ids"
        if not n:
            return f"it holds no {what}"
    if wrong := names.keys() ^ labels.keys():
        one = next(iter(wrong))
        return f"image {shown(one)} has {'no annotation' if one in names else 'an annotation, but no file name'}"
    if any(type(number) is not int for number in texts) or sorted(texts) != list(range(len(texts))):
        return f"its {len(texts)} categories do not count from 0 to {len(texts) - 1}"
    if wrong := [label for label in labels.values() if label not in texts or type(label) is not int]:
        return f"category {shown(wrong[0])} of an image is none of its {len(texts)} categories"
    # JSON can write half a letter beyond 16 bits, which no disk and no file of text takes
    good = re.compile("[^\ud800-\udfff]+").fullmatch
    if wrong := [text for text in (*names.values(), *texts.values()) if not (isinstance(text, str) and good(text))]:
        return f"{shown(wrong[0])} is no name"
    return None


def _places205(root: str, split: str) -> Split:
    folder = "data/vision/torralba/deeplearning/images256"
    path = _official(root, f"{split}_places205.csv", "trainvalsplit_places205")
    files = _numbered(path, root, folder)
    if (largest := files.labels.max()) > 204:
        raise UserError(f"{printable(path)} has label {largest}, but Places205 has 205 categories, from 0 on")
    first = zip(*np.unique(files.labels, return_index=True), strict=True)
    names = {int(label): os.path.relpath(os.path.dirname(files[index][0]), files.folder) for label, index in first}
    return Split(files, names, path, {folder})


def _places365(root: str, split: str) -> Split:
    lists = "filelist_places365-standard"
    path = _official(root, "places365_train_standard.txt" if split == "train" else "places365_val.txt", lists)
    folders = {
        of: [form.format(size) for size in ("large", "256") for form in forms]
        for of, forms in {"train": ("data_{}_standard", "data_{}"), "val": ("val_{}",)}.items()
    }
    there = {of: [name for name in names if os.path.isdir(os.path.join(root, name))] for of, names in folders.items()}
    if not there[split]:
        raise UserError(f"none of {', '.join(folders[split])} is in {printable(root)}: unpack the images of {split}")
    sizes = [{name.split("_")[1] for name in names} for names in there.values()]
    both = [name for name in there[split] if name.split("_")[1] in set.intersection(*sizes)]  # sizes are not mixed
    folder = (both or there[split])[0]
    log.info(f"{split}: images of {printable(os.path.join(root, folder))}")
    files = _numbered(path, root, folder)
    source = _official(root, "categories_places365.txt", lists)
    named = _numbered(source, "", "")
    names = {int(label): name for name, label in named}
    if len(names) < len(named) or sorted(names) != list(range(len(named))):
        raise UserError(f"{printable(source)}: its {len(named)} categories do not count from 0 to {len(named) - 1}")
    if files.labels.max() >= len(names):
        raise UserError(
            f"{printable(path)} has label {files.labels.max()}, but {printable(source)} has {len(names)} categories"
        )
    return Split(files, names, path, {folder})


def _numbered(path: str, root: str, folder: str) -> PackedFiles:
    """An official list of `path label` in each line. Raises UserError where a label is no number from 0 on."""
    source, codes = FileList(path, separator=" "), {}
    files = source.read(codes, os.path.join(root, folder))
    if wrong := [label for label in codes if not (label.isascii() and label.isdigit() and len(label) < 10)]:
        raise UserError(f"{source.line_of(wrong[0])}: label {shown(wrong[0])} is no number")
    files.labels = np.array([int(label) for label in codes])[files.labels]
    return files


def _compare_with_disk(root: str, parts: list[Split], skip_bad: bool) -> None:
    """Name what is listed and not there, and what is there and not listed."""
    listing, extra = Listing(), []
    listed, twice = set(), []  # as hashes: of millions, the paths would take a gigabyte
    for path in (path for part in parts for path, _ in part.files):
        twice += [path] * (hash(path) in listed and len(twice) < 3)
        listed.add(hash(path))
    if more := sum(len(part.files) for part in parts) - len(listed):
        names = ", ".join(map(printable, twice)) + ", ..." * (more > len(twice))
        log.warning(f"{more} lines of the official files name an image again, and it counts again: {names}")
    there = set()
    for folder in set.union(*(part.folders for part in parts)):
        for path in listing.images(os.path.join(root, folder)):
            there.add(hash(path))
            extra += [path] * (hash(path) not in listed)
    listing.report(root)
    missing = [path for part in parts for path, _ in part.files if hash(path) not in there] if listed - there else []
    if missing := [path for path in missing if not os.path.isfile(path)]:  # nor by another name of its folder
        names = ", ".join(map(printable, missing[:5])) + ", ..." * (len(missing) > 5)
        words = f"{len(missing)} images that the official files name are not there: {names}"
        if not skip_bad:
            raise UserError(f"{words}. Unpack the archives again, or pass --skip_bad_images")
        log.warning(f"{words}. They are passed over (--skip_bad_images)")
    if extra:
        names = ", ".join(map(printable, sorted(extra)[:3])) + ", ..." * (len(extra) > 3)
        log.info(f"left out: {len(extra)} images that neither of the official files names: {names}")
