"""Lists of files, one a line: --data_path FILE.txt or FILE.csv, with labels for the classifiers.

A path is relative to the list's folder, or absolute. In a .csv (RFC 4180: fields may be quoted) the label is the second
field; in a .txt it is what stands after the last comma, and without labels the whole line is the path. A first line
`path` or `path,label` is a header; blank lines are passed over; there are no comments, since a name may begin with any
sign. Lines may end in CRLF, the file may begin with UTF-8's mark. A line that comes twice counts twice.
"""

import csv
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO

import numpy as np

from util.data.datasets import PackedFiles
from util.errors import UserError, printable, shown
from util.log import log

ENDINGS = (".txt", ".csv")
SAMPLED = 1000  # files of a list that are looked for before anything else; at most twice as many
MOST_CLASSES = 10_000_000  # a classifier has a weight, and a name, for each number up to the largest
# lines that are objects at a time: too few to call the garbage collector, which would take most of the time
BATCH = 512
Row = list[str]  # [path] or [path, label]


def is_list(path: str | None) -> bool:
    """Whether --data_path names a list; a folder may be called anything."""
    return bool(path) and path.lower().endswith(ENDINGS) and not os.path.isdir(path)


def unlabelled(path: str, skip_bad: bool) -> PackedFiles:
    """The files of a list, for pretraining: labels in a .csv are passed over. Raises UserError, see `FileList.read`."""
    file_list = FileList(path, labelled=False)
    files = file_list.read()
    check_there(files, file_list, skip_bad)
    return files


def labelled(
    train_path: str | None, val_path: str | None, nb_classes: int | None, with_train: bool, skip_bad: bool
) -> tuple[PackedFiles | None, PackedFiles, list[str]]:
    """Two lists -> (files to train on, None unless `with_train`; files to validate on; class names in label order).

    Where all labels of both are whole numbers, class k is the number k, or the k-th of those that are there where
    `nb_classes` is None; else classes are the labels' texts, sorted.
    Without `with_train`, `train_path` tells the classes alone and may be missing. Raises UserError where a list is
    missing or wrong, see `FileList.read`, or the labels do not fit each other or `nb_classes`.
    """
    lists = {"--data_path": train_path, "--val_path": val_path}
    for option, path in lists.items():
        if not is_list(path) and (path or with_train or option == "--val_path"):
            what = f"{printable(path)} is no list" if path else "not given"
            raise UserError(f"{option}: {what}: name lists, .txt or .csv, by --data_path (train) and --val_path")
    train, val = (path and FileList(path) for path in (train_path, val_path))
    codes: dict[str, int] = {}  # label -> its place in the order of appearance
    train_files = train and train.read(codes)
    n_train = len(codes)
    val_files = val.read(codes)
    if train and len(codes) > n_train:
        alone = list(codes)[n_train:]
        others = f", nor {len(alone) - 1} more of this list's" if len(alone) > 1 else ""
        raise UserError(
            f"{val.line_of(alone[0])}: no line of {printable(train_path)} has the label {shown(alone[0])}{others}"
        )
    numbers, names = _classes(codes, [one for one in (train, val) if one], nb_classes)
    for files in (train_files, val_files):
        if files is not None:
            files.labels = numbers[files.labels]
    if with_train:
        check_there(train_files, train, skip_bad)
    check_there(val_files, val, skip_bad)
    tell_empty(train_files, val_files, names)
    return train_files if with_train else None, val_files, names


def tell_empty(train: PackedFiles | None, val: PackedFiles, names: list[str]) -> None:
    """Name in the log how many classes lack images of either kind, and one of them."""
    for files, what in ((train, "train on"), (val, "validate on")):
        if files is not None and (empty := np.flatnonzero(np.bincount(files.labels, minlength=len(names)) == 0)).size:
            log.warning(f"{empty.size} of {len(names)} classes have no image to {what}, as {shown(names[empty[0]])}")


def _classes(codes: dict[str, int], lists: "list[FileList]", nb_classes: int | None) -> tuple[np.ndarray, list[str]]:
    """Labels in the order of their appearance in `lists` -> (the number of each, class names in label order)."""
    of = " and ".join(printable(one.path) for one in lists)
    if all(re.fullmatch("-?[0-9]{1,18}", label, re.ASCII) for label in codes):
        numbers = np.array([int(label) for label in codes])
        for label in codes:
            if int(label) < 0:
                first = next(filter(None, (one.line_of(label) for one in lists)))
                raise UserError(f"{first}: label {label}, but class numbers count from 0")
        if nb_classes is None:  # nobody has a class for each number: they may be ids, of many digits
            found = np.unique(numbers)
            return np.searchsorted(found, numbers), [str(number) for number in found.tolist()]
        if numbers.max() >= MOST_CLASSES:
            words = f"go up to {numbers.max()}, which are ids: number the {len(np.unique(numbers))} from 0 on"
            raise UserError(f"the class numbers of {of} {words}")
        # an evaluation need not meet the last classes
        if numbers.max() >= nb_classes or (len(lists) > 1 and numbers.max() + 1 < nb_classes):
            words = f"the class numbers of {of} go up to {numbers.max()}: pass --nb_classes {numbers.max() + 1}"
            raise UserError(f"--nb_classes {nb_classes}, but {words}")
        return numbers, [str(number) for number in range(nb_classes)]
    names = sorted(codes)
    if nb_classes not in (None, len(names)):
        hint = "" if len(lists) > 1 else ", or name the list of training as --data_path, if it has more"
        some = ", ".join(map(shown, names[:5])) + ", ..." * (len(names) > 5)
        words = f"{len(names)} labels: pass that number{hint}, or mend the list. They are {some}"
        raise UserError(f"--nb_classes {nb_classes}, but {of} has {words}")
    order = {label: number for number, label in enumerate(names)}
    return np.array([order[label] for label in codes]), names


class FileList:
    """A list on disk. `separator`: a comma, or the space of the official lists of published sets."""

    def __init__(self, path: str, labelled: bool = True, separator: str = ",") -> None:
        self.path, self.labelled, self.separator = path, labelled, separator
        self.is_csv = separator == "," and path.lower().endswith(".csv")
        self.widths = {2} if labelled else {1, 2} if self.is_csv else {1}
        self.form = f"path{separator}label" if labelled else "path or path,label" if self.is_csv else "path"

    def read(self, codes: dict[str, int] | None = None, folder: str | None = None) -> PackedFiles:
        """The files, with labels as places in `codes`, which gets the new ones; without `codes`, -1.

        `folder`: what paths are relative to, instead of the list's. Raises UserError, with the line's number, for a
        list that is missing, empty or no text, and for lines without path, without label or with more fields.
        """
        files = PackedFiles.of_batches(self._batches(codes), os.path.dirname(self.path) if folder is None else folder)
        if not len(files):
            raise UserError(f"{printable(self.path)} holds no image: name one in each line, as {self.form}")
        for label in codes or ():
            if any("\udc80" <= c <= "\udcff" for c in label) and (where := self.line_of(label)):
                raise UserError(f"{where}: label {shown(label)} is no UTF-8: save the list as UTF-8")
        return files

    def line_of(self, label: str) -> str | None:
        """'LIST, line N', the first with this label; None where there is none."""
        return next((self._line(number) for number, row in self._lines() if row[1] == label), None)

    def lines_of(self, indices: list[int]) -> list[int]:
        """Places of files in what `read` gives, ascending -> the numbers of their lines."""
        lines = (number for number, _ in self._lines())
        steps = (b - a - 1 for a, b in itertools.pairwise([-1, *indices]))
        return [next(itertools.islice(lines, step, None)) for step in steps]

    def _batches(self, codes: dict[str, int] | None) -> Iterator[tuple[list[bytes], list[int]]]:
        encoding, rows, first = sys.getfilesystemencoding(), self._rows(), True
        while batch := self._next(rows):
            if not self._all_good(batch):
                batch = [row for row in batch if not _is_blank(row)]
            if first and batch:
                batch, first = batch[_is_header(batch[0]) :], False
            if not self._all_good(batch):
                raise self._fault()
            paths = [row[0].encode(encoding, "surrogateescape") for row in batch]  # names on disk are bytes
            labels = [-1] * len(paths)
            if codes is not None:
                texts = [row[1].strip() for row in batch]
                for label in dict.fromkeys(texts):
                    codes.setdefault(label, len(codes))
                labels = [codes[label] for label in texts]
            yield paths, labels

    def _next(self, rows: Iterator[Row]) -> list[Row]:
        try:
            return list(itertools.islice(rows, BATCH))
        except csv.Error:
            raise self._fault() from None

    def _rows(self, lines: Callable[[TextIO], Iterable[str]] = iter) -> Iterator[Row]:
        """All rows, also blank and faulty ones; `lines`: a look at the file's lines on their way."""
        try:
            with open(self.path, "rb") as file:
                head = file.read(4096)
            if b"\0" in head or head[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise UserError(f"{printable(self.path)} is no text of UTF-8: save it as UTF-8")
            newline = "" if self.is_csv else None  # the former is what csv asks for
            with open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
                yield from csv.reader(lines(file), strict=True) if self.is_csv else map(self._row, lines(file))
        except OSError as error:
            raise UserError(f"no list {printable(self.path)} ({error.strerror})") from None

    def _row(self, line: str) -> Row:
        """A line of a .txt, or of an official list."""
        line = line.rstrip("\n")
        if not self.labelled:
            return [line]
        if self.separator == " ":
            line = line.strip().lstrip("/")  # from the set's folder on
        path, separator, label = line.rpartition(self.separator)
        return [path, label] if separator else [label]

    def _lines(self) -> Iterator[tuple[int, Row]]:
        """(Number of its first line, path and label) of each file: slower, for messages alone."""
        last, header_may_come = 0, True

        def counted(file: TextIO) -> Iterator[str]:
            nonlocal last
            for last, line in enumerate(file, 1):  # noqa: B007
                yield line

        rows = self._rows(counted)
        while True:
            begins = last + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                words = f"{error}: quote a path that holds a quote or a comma, and double its quotes"
                raise UserError(f"{self._line(begins)}: {words}") from None
            if row is None:
                return
            if _is_blank(row):
                continue
            if not (header_may_come and _is_header(row)):
                yield begins, [row[0], *map(str.strip, row[1:])]
            header_may_come = False

    def _all_good(self, rows: list[Row]) -> bool:
        if not set(map(len, rows)) <= self.widths:
            return False
        fields = [[row[0] for row in rows], [row[1] for row in rows] if self.labelled else []]
        return not any(not all(texts) or any(map(str.isspace, texts)) for texts in fields)

    def _fault(self) -> UserError:
        for number, row in self._lines():
            if self._all_good([row]):
                continue
            if len(row) > max(self.widths):
                words = f"{len(row)} fields: quote a path that holds a comma"
            else:
                words = f"no label after {shown(row[0])}" if row[0].strip() else "no path"
            return UserError(f"{self._line(number)}: {words}. A line is {self.form}")
        return UserError(f"{printable(self.path)} changed while it was read: start again")

    def _line(self, number: int) -> str:
        return f"{printable(self.path)}, line {number}"


def _is_blank(row: Row) -> bool:
    return not row or (len(row) == 1 and not row[0].strip())


def _is_header(row: Row) -> bool:
    return ",".join(field.strip().lower() for field in row) in ("path", "path,label")


def check_there(files: PackedFiles, source: FileList | str, skip_bad: bool) -> None:
    """Look for a sample of the files, evenly spaced from the first on; for all up to twice SAMPLED.

    Raises UserError that names the first that are missing, with their lines where `source` is a list; with `skip_bad`
    it warns, unless all are.
    """
    looked_for = range(0, len(files), max(len(files) // SAMPLED, 1))
    missing = [index for index in looked_for if not os.path.isfile(files[index][0])]
    if not missing:
        return
    names = [files.name(index) for index in missing[:5]]
    remedy = f"{printable(source)} names them: unpack the whole archive"
    if isinstance(source, FileList):
        names = [f"{name} (line {n})" for name, n in zip(names, source.lines_of(missing[:5]), strict=True)]
        remedy = f"paths in {printable(source.path)} are relative to its folder"
        if not (source.labelled or source.is_csv):
            remedy += ", and in pretraining only a .csv may have labels"
    names += ["..."] * (len(missing) > len(names))
    words = (
        f"{len(missing)} of {len(looked_for)} files that were looked for are not there: {', '.join(names)}; {remedy}"
    )
    if not skip_bad or len(missing) == len(looked_for):
        raise UserError(f"{words}. Mend that, or pass --skip_bad_images for single ones")
    log.warning(f"{words}. They are passed over (--skip_bad_images)")
