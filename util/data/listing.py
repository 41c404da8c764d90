"""Which images a folder holds: all below it, or those of its class folders, with what is left out counted."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from util.errors import UserError, printable
from util.log import log

# IMG_EXTENSIONS: those of torchvision's ImageFolder, which the original trains from. Others by default would change its
# labels and counts


def list_images(root: str | Path, endings: tuple[str, ...] = IMG_EXTENSIONS) -> list[tuple[str, int]]:
    """Folder -> [(path, -1), ...]: all images below it, at any depth, in sorted order; no labels.

    Raises UserError where the folder is missing, holds no image, or a folder in it may not be read.
    """
    listing = Listing(endings)
    files = [(path, -1) for path in listing.images(_existing_folder(root))]
    listing.report(root)
    if not files:
        raise UserError(f"no images below {printable(root)}: images are files ending in {_words(endings)}")
    return files


def list_classes(
    root: str | Path, endings: tuple[str, ...] = IMG_EXTENSIONS
) -> tuple[list[tuple[str, int]], list[str]]:
    """Folder of class folders -> ([(path, label), ...], class names); labels count the sorted class names.

    Raises UserError where the folder is missing, has no class folder, one of them holds no image, or may not be read.
    """
    listing = Listing(endings)
    found = listing.classes(_existing_folder(root))
    listing.report(root)
    return _filled(root, *found, endings)


def _words(endings: tuple[str, ...]) -> str:
    return " ".join(endings) + ("" if ".npy" in endings else "; .npy with --in_chans")


def _filled(
    root: str | Path, files: list[tuple[str, int]], classes: list[str], endings: tuple[str, ...]
) -> tuple[list, list[str]]:
    """The same, or UserError where there are no classes or some are empty."""
    if not classes:
        raise UserError(f"no class folders in {printable(root)}: expected {printable(root)}/<class>/<image>")
    empty = sorted(set(range(len(classes))) - {label for _, label in files})
    if empty:
        words = f"{len(empty)} class folders of {printable(root)} hold no image, such as {classes[empty[0]]!r}"
        raise UserError(f"{words}: fill or remove them; images are files ending in {_words(endings)}")
    return files, classes


class Listing:
    """Lists images below folders, and remembers what is no image and what may not be read."""

    def __init__(self, endings: tuple[str, ...] = IMG_EXTENSIONS) -> None:
        self.endings = endings
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
            endings = " ".join(self.endings)
            log.info(f"left out below {printable(root)}: {', '.join(counts)}. Images are files ending in {endings}")

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
        if ending not in self.endings:
            self.left_out[f"ending in {printable(ending)[:16]}" if ending else "without an ending"] += 1
            return False
        if entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path) or not os.path.exists(entry.path):
            return True  # or a link to nowhere, which is told when it is read
        self.left_out["pipes, sockets or devices"] += 1
        return False


def classification_files(
    data_path: str | None, nb_classes: int | None, with_train: bool, endings: tuple[str, ...] = IMG_EXTENSIONS
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Folder with train/ and val/ -> (train files, val files); train is empty without `with_train`.

    Raises UserError where a split is missing or empty, or the class folders don't fit each other or `nb_classes`.
    """
    if not data_path:
        raise UserError("--data_path is not given: name a folder with train/<class>/ and val/<class>/")
    splits = [Path(data_path) / name for name in ("val", "train")[: 1 + with_train]]
    listing = Listing(endings)
    found = [listing.classes(_existing_folder(split)) for split in splits]
    listing.report(data_path)
    (val_files, classes), *train = [_filled(split, *there, endings) for split, there in zip(splits, found, strict=True)]
    train_files, train_classes = train[0] if train else ([], classes)
    if train_classes != classes:
        only_train, only_val = sorted(set(train_classes) - set(classes)), sorted(set(classes) - set(train_classes))
        raise UserError(
            f"train and val have different class folders: {len(only_train)} only in train {only_train[:3]}, "
            f"{len(only_val)} only in val {only_val[:3]}"
        )
    if nb_classes not in (None, len(classes)):
        raise UserError(f"--nb_classes {nb_classes}, but the data has {len(classes)} class folders: pass that number")
    return train_files, val_files


def _existing_folder(root: str | Path) -> Path:
    try:
        if stat.S_ISDIR(os.stat(root).st_mode):
            return Path(root)
        reason = "it is a file"
    except (OSError, ValueError) as error:  # of a name that is too long, too
        reason = getattr(error, "strerror", error)
    of = "--data_path holds train/ and val/ (pretraining: images), or is a list, .txt or .csv"
    raise UserError(f"no folder {printable(root)} ({reason}): {of}")
