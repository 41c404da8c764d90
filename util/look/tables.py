"""The results table as CSV, Markdown and text; and what is told of single images and classes."""

import contextlib
import csv
import importlib.util
import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from util.data.parts import Part
from util.data.robustness import EXTRA, STRENGTHS
from util.errors import UserError

Record = dict[str, np.ndarray]  # see util/look/results.py


def as_csv(table: dict) -> str:
    """The table as CSV: a row a set, a row a corruption and strength."""
    columns = (
        "set", "corruption", "strength", "images", "acc1", "acc1_low", "acc1_high", "acc5", "loss", "error", "ce",
        "mce", "mean_error", "published", "difference", "partial",
    )  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for name, row in table["sets"].items():
        low, high = row.get("acc1_ci95", (None, None))
        partial = "{} of {}".format(*row["partial"]) if "partial" in row else None
        writer.writerow({**row, "set": name, "acc1_low": low, "acc1_high": high, "partial": partial})
        for corruption, cells in row.get("corruptions", {}).items():
            for strength, error, images in zip(STRENGTHS, cells["error"], cells["images"], strict=True):
                if error is not None:
                    cell = {"set": name, "corruption": corruption, "strength": strength, "images": images}
                    writer.writerow({**cell, "acc1": round(100 - error, 6), "error": error, "ce": cells["ce"]})
    return text.getvalue()


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _cells(table: dict) -> tuple[list[list[str]], list[list[str]], list[str]]:
    """Rows of texts of the sets and of ImageNet-C, headings first, and notes below them."""
    sets = [["set", "images", "top-1", "95 % interval", "top-5", "loss", "published", "difference"]]
    corruptions, notes = [], []
    for name, row in table["sets"].items():
        published, difference = row["published"], row["difference"]
        mark = ""
        if "corruptions" in row:
            sets.append([f"{name}, mCE", f"{row['images']:,}", _number(row["mce"]), "", "", ""])
            corruptions.append(["corruption: error", *map(str, STRENGTHS), "CE"])
            for corruption, cells in row["corruptions"].items():
                title = f"{corruption} (not in the means)" if corruption in EXTRA else corruption
                corruptions.append([title, *map(_number, cells["error"]), _number(cells["ce"])])
            if row["mce"] is None:
                notes.append(f"{name}: no mCE, {row['reason']}")
            else:
                notes.append(f"{name}: mCE {row['mce']:.2f}, mean error without AlexNet {row['mean_error']:.2f}")
        else:
            low, high = row["acc1_ci95"]
            mark = " *" if published is not None and not low <= published <= high else ""
            interval = f"{low:.2f} to {high:.2f}"
            sets.append([name, f"{row['images']:,}", _number(row["acc1"]), interval, _number(row["acc5"]),
                         _number(row["loss"], 4)])  # fmt: skip
        sets[-1] += [_number(published, 1), ("" if difference is None else f"{difference:+.2f}") + mark]
        if mark:
            notes.append(f"* {name}: the published figure lies outside the interval")
        if "partial" in row:
            notes.append("{}: partial, {} of {} classes".format(name, *row["partial"]))
        if "of_images" in row:
            notes.append(f"{name}: partial, {row['images']:,} of {row['of_images']:,} images")
        if "skipped_images" in row:
            notes.append(f"{name}: {row['skipped_images']:,} images could not be decoded and are left out")
    return sets, corruptions, notes


def _head(table: dict) -> str:
    height, width = table["input_size"]
    return f"{table['checkpoint']} (md5 {table['md5']}): {table['model']}, {height} x {width}, {table['precision']}"


def as_markdown(table: dict) -> str:
    """The table to paste; figures in %, but the loss."""
    sets, corruptions, notes = _cells(table)
    blocks = [_head(table)]
    for rows in filter(None, (sets, corruptions)):
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        blocks.append("\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]))
    blocks.append("\n".join(f"* {note.removeprefix('* ')}" for note in notes))
    return "\n\n".join(filter(None, blocks)) + "\n"


def as_text(table: dict) -> str:
    """The table for a terminal, its columns aligned."""
    sets, corruptions, notes = _cells(table)
    lines = [_head(table)]
    for rows in filter(None, (sets, corruptions)):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines.append("")
        for row in rows:
            cells = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join([*lines, *([""] if notes else []), *notes])


def check_predictions(path: str) -> None:
    """Raise UserError unless --predictions can be written at the end."""
    if Path(path).suffix not in (".csv", ".parquet"):
        raise UserError(f"--predictions {path}: the name must end in .csv or .parquet")
    if path.endswith(".parquet") and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"--predictions {path} needs pyarrow: pip install pyarrow, or name a .csv file")
    if Path(path).is_dir() or not Path(path).parent.is_dir():
        raise UserError(f"--predictions {path} is no file in a folder that is there: name another")


def write_predictions(path: Path, parts: Iterable[tuple[Part, Record]], names: list[str]) -> None:
    """A row an image, to .csv or .parquet: set, file, label, the best five classes and their probabilities.

    Probabilities are of the logits that are scored; the label is empty where the image has none.
    """
    columns = ["set", "file", "label"]
    columns += [f"{what}_{i}" for i in range(1, 6) for what in ("class", "probability")]
    with _writer(path, columns) as write:
        for part, record in parts:
            labels = part.labels[part.set].numpy()[record["index"], 0]
            rows = []
            for i, label, top, probabilities in zip(
                record["index"], labels, record["top"], record["probability"], strict=True
            ):
                best = [None] * 10
                best[: 2 * len(top) : 2] = [names[place] for place in top]
                best[1 : 2 * len(top) : 2] = [round(float(probability), 6) for probability in probabilities]
                rows.append([part.key, part.files[int(i)][0], names[label], *best])
            write(rows)


@contextlib.contextmanager
def _writer(path: Path, columns: list[str]) -> Iterator[Callable[[list[list]], None]]:
    """A function that appends rows to a file."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            yield writer.writerows
        return
    import pyarrow as pa
    import pyarrow.parquet

    kinds = [pa.float64() if name.startswith("probability") else pa.string() for name in columns]
    schema = pa.schema(list(zip(columns, kinds, strict=True)))
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        yield lambda rows: writer.write_table(
            pa.table([[_text(value) for value in column] for column in zip(*rows, strict=True)], schema=schema)
        )


def _text(value: object) -> object:
    """A file name whose bytes are no UTF-8, as parquet takes it."""
    return os.fsencode(value).decode(errors="replace") if isinstance(value, str) else value


def answers(parts: Iterable[tuple[Part, Record]]) -> tuple[np.ndarray, np.ndarray]:
    """Parts of one set -> (labels [N], first answers [N]) of all their images, as logits."""
    pairs = [(part.labels[part.set].numpy()[record["index"], 0], record["top"][:, 0]) for part, record in parts]
    return tuple(np.concatenate(column) for column in zip(*pairs, strict=True))


def per_class(labels: np.ndarray, answers: np.ndarray, n_classes: int) -> np.ndarray:
    """(labels [N], answers [N]) -> [C, 2]: images of each class, and how many of them are right."""
    right = labels[labels == answers]
    return np.stack([np.bincount(values, minlength=n_classes) for values in (labels, right)], axis=1)


def confusion(labels: np.ndarray, answers: np.ndarray, n_classes: int) -> np.ndarray:
    """(labels [N], answers [N]) -> [C, C]: how often images of a class (row) were taken for another (column)."""
    return np.bincount(labels * n_classes + answers, minlength=n_classes**2).reshape(n_classes, n_classes)


def per_class_csv(counts: dict[str, np.ndarray], names: list[str]) -> str:
    """What `per_class` says, by set -> CSV: set, class, images and acc1 in %, of the classes that have images."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["set", "class", "images", "acc1"])
    for name, table in counts.items():
        for i in np.flatnonzero(table[:, 0]):
            n, hits = table[i].tolist()
            writer.writerow([name, names[i], n, round(100 * hits / n, 6)])
    return text.getvalue()
