"""The results table: what was counted of each part, kept in files, and the figures made of it.

Figures are in %, but the loss (nats). Letters: N images of a part, M accepted labels of an image at most, k classes.
"""

import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np

from util.data.parts import Part
from util.data.robustness import ALEXNET, EXTRA, IMAGES, SETS, STRENGTHS
from util.dist import Dist, on_main
from util.errors import NotSavedError, UserError
from util.log import log
from util.look import charts, tables
from util.run import lock
from util.weights.download import MD5

# of the authors' fine-tuned files: Acc@1 as they checked it, and their table of robustness (paper, table 13)
PUBLISHED = {
    "mae_finetuned_vit_base.pth": (83.664, 51.7, 35.9, 48.3, 34.5),
    "mae_finetuned_vit_large.pth": (85.952, 41.8, 57.1, 59.9, 45.3),
    "mae_finetuned_vit_huge.pth": (86.928, 33.8, 68.2, 64.4, 49.6),
}
_PUBLISHED_SETS = ("imagenet", "imagenet-c", "imagenet-a", "imagenet-r", "imagenet-sketch")
SAME = ("md5", "model", "input_size", "precision")  # what one table has one of


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share, in %; z = 1.96 for 95 % (Wilson 1927)."""
    p, spread = hits / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return tuple(100 * min(max((p + spread / 2 + sign * half) / (1 + spread), 0), 1) for sign in (-1, 1))


def count(part: Part, record: dict[str, np.ndarray]) -> dict[str, dict]:
    """What `record` says of a part, for each set that it counts for: images, hits, summed loss.

    `record`: `index` [n], numbers of the images; `top` [n, k], their best logits; `loss/<set>` [n]. Images without any
    label are left out.
    """
    if not len(record["index"]):
        raise UserError(f"{part.key}: none of the {len(part.files)} images can be decoded, such as {part.files[0][0]}")
    counts = {}
    for name, table in part.labels.items():
        labels = table.numpy()[record["index"]]
        labelled = (labels >= 0).any(axis=1)
        if not labelled.any():
            raise UserError(f"{name}: none of the images that can be decoded has a label")
        hits = (record["top"][:, :, None] == labels[:, None, :]).any(axis=2)[labelled]
        losses = record[f"loss/{name}"][labelled].astype(np.float64)
        counts[name] = {
            "images": len(hits), "hits1": int(hits[:, 0].sum()), "hits5": int(hits.any(axis=1).sum()),
            "loss": float(losses.sum()),
        }  # fmt: skip
    return counts


class Results:
    """The table in `folder`, one part after another. All ranks call it alike; rank 0 has it. `header`: of results.json.

    Raises UserError where the folder has the table of another checkpoint, model, size or precision.
    """

    def __init__(self, env: Dist, folder: str, header: dict, published: dict[str, float]) -> None:
        self.env, self.folder, self.header, self.published = env, Path(folder), header, published
        on_main(env, self._open)

    def _open(self) -> None:
        self.lock = lock.take(self.folder / ".lock", wait_seconds=10)
        self.identity = json.dumps([self.header[name] for name in SAME])
        self._check_same()
        self.metas = {}
        for path in (self.folder / "parts").rglob(".*.tmp.npz"):
            path.unlink()  # of a process that was killed
        for path in sorted((self.folder / "parts").rglob("*.npz")):
            meta = _meta_of(path)
            if meta and meta["identity"] != self.identity:
                raise UserError(f"{path} is of {meta['identity']}, not {self.identity}: name another --output_dir")
            if meta:
                self.metas[meta["key"]] = meta

    def _check_same(self) -> None:
        path = self.folder / "results.json"
        if not path.exists():
            return
        try:
            old = json.loads(path.read_text())
            old = {name: old[name] for name in (*SAME, "checkpoint", "versions")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no table of this script ({error}): name another --output_dir") from error
        for name in SAME:
            if old[name] != self.header[name]:
                raise UserError(
                    f"{path} is of {old['checkpoint']} with {name} {old[name]}, not {self.header[name]}: name another "
                    "--output_dir"
                )
        if old["versions"] != self.header["versions"]:
            log.warning(f"{path} was begun with {old['versions']}: the last digits may differ between its parts")

    def missing(self, parts: list[Part]) -> list[Part]:
        """Those of `parts` that are still to be evaluated."""
        return [parts[i] for i in on_main(self.env, lambda: self._missing(parts))]

    def _missing(self, parts: list[Part]) -> list[int]:
        todo = []
        for i, part in enumerate(parts):
            meta = self.metas.get(part.key)
            if meta and meta["fingerprint"] == part.fingerprint:
                continue
            if meta:
                log.info(f"{part.key} has other images or classes than last time: evaluated again")
            todo.append(i)
        return todo

    def add(self, part: Part, record: dict[str, np.ndarray], skipped: int) -> None:
        """Keep a finished part, and bring the files up to date. Raises NotSavedError where the disk refuses."""
        on_main(self.env, lambda: self._add(part, record, skipped))

    def _add(self, part: Part, record: dict[str, np.ndarray], skipped: int) -> None:
        meta = {
            "key": part.key, "identity": self.identity, "fingerprint": part.fingerprint, "set": part.set,
            "corruption": part.corruption, "strength": part.strength, "classes": list(part.classes),
            "skipped": skipped, "counts": count(part, record),
        }  # fmt: skip
        buffer = io.BytesIO()
        np.savez(buffer, meta=np.array(json.dumps(meta)), **record)
        self.write(f"parts/{part.key}.npz", buffer.getvalue())
        self.metas[part.key] = meta
        self.write_table()

    def finish(self, parts: list[Part], names: list[str], predictions: str, classes_too: bool) -> None:
        """Write what is made of the whole, and show the table: pictures, the file `predictions` if it is named, and
        with `classes_too` each class's accuracy. `names`: of the classes.
        """
        on_main(self.env, lambda: self._finish(parts, names, predictions, classes_too))

    def _finish(self, parts: list[Part], names: list[str], predictions: str, classes_too: bool) -> None:
        self.write_table()
        content = self.table()
        if "imagenet-c" in content["sets"]:
            self.write("results_c.png", charts.corruption_chart(content["sets"]["imagenet-c"]).save)
        if predictions:
            rows = ((part, self.record(part)) for part in parts)
            self.write(Path(predictions).absolute(), lambda path: tables.write_predictions(path, rows, names))
        if classes_too:
            counts = {}
            for name in dict.fromkeys(part.set for part in parts):
                labels, answers = tables.answers([(part, self.record(part)) for part in parts if part.set == name])
                counts[name] = tables.per_class(labels, answers, len(names))
                if len(names) <= 100:
                    matrix = tables.confusion(labels, answers, len(names))
                    self.write(f"confusion_{name}.png", charts.confusion_chart(matrix, names).save)
            self.write("per_class.csv", tables.per_class_csv(counts, names))
        if self.lock is not None:
            os.close(self.lock)  # lets other runs into the folder
        log.info("\n" + tables.as_text(content))

    def record(self, part: Part) -> dict[str, np.ndarray]:
        """What was kept of a finished part."""
        with np.load(self.folder / "parts" / f"{part.key}.npz") as file:
            return {name: file[name] for name in file.files if name != "meta"}

    def table(self) -> dict:
        """The content of results.json."""
        metas, sets = list(self.metas.values()), {}
        names = {name for meta in metas for name in meta["counts"]}
        for name in [name for name in SETS if name in names] + sorted(names - SETS.keys()):
            own = [meta for meta in metas if name in meta["counts"]]
            row = _corruption_row(own) if name == "imagenet-c" else _row(own[0]["counts"][name])
            published = self.published.get(name)
            row["published"] = published
            value = row["mce" if name == "imagenet-c" else "acc1"]
            row["difference"] = None if published is None or value is None else round(value - published, 6)
            fewest, of = min(meta["classes"] for meta in own)
            if fewest < of:
                row["partial"] = [fewest, of]
            if name in IMAGES and any(meta["counts"][name]["images"] < IMAGES[name] for meta in own):
                row["of_images"] = IMAGES[name] * len(own)
            if skipped := sum(meta["skipped"] for meta in own):
                row["skipped_images"] = skipped
            sets[name] = row
        return {**self.header, "sets": sets}

    def write_table(self) -> None:
        """results.json, results.csv and results.md, as far as the table is known."""
        table = self.table()
        self.write("results.csv", tables.as_csv(table))
        self.write("results.md", tables.as_markdown(table))
        self.write("results.json", json.dumps(table, indent=1) + "\n")

    def write(self, name: str | Path, data: str | bytes | Callable[[Path], None]) -> None:
        """A file in the folder, whole or not at all; `data` may be what writes to the path that it is given."""
        if isinstance(data, str):
            data = data.encode(errors="surrogateescape")  # names of files need not be UTF-8
        path = self.folder / name
        temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if callable(data):
                data(temporary)
            else:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise NotSavedError(
                f"{path} cannot be written ({error}): make room; started again, the evaluation goes on where it was"
            ) from error


def _meta_of(path: Path) -> dict | None:
    try:
        with np.load(path) as file:
            return json.loads(str(file["meta"]))
    except Exception as error:  # a damaged archive raises whatever it likes
        log.warning(f"{path} cannot be read ({type(error).__name__}: {error}): that part is evaluated again")
        return None


def _row(counts: dict) -> dict:
    n, hits = counts["images"], counts["hits1"]
    return {
        "images": n, "acc1": round(100 * hits / n, 6), "acc5": round(100 * counts["hits5"] / n, 6),
        "loss": round(counts["loss"] / n, 5),  # further digits depend on the number of threads
        "acc1_ci95": [round(end, 6) for end in wilson(hits, n)],
    }  # fmt: skip


def _corruption_row(metas: list[dict]) -> dict:
    cells = {(meta["corruption"], meta["strength"]): meta["counts"]["imagenet-c"] for meta in metas}
    corruptions = {}
    for name, alexnet in {**ALEXNET, **EXTRA}.items():
        counts = [cells.get((name, strength)) for strength in STRENGTHS]
        if not any(counts):
            continue
        errors = [cell and 100 * (1 - cell["hits1"] / cell["images"]) for cell in counts]
        corruptions[name] = {
            "error": [error if error is None else round(error, 6) for error in errors],
            "ce": None if None in errors else round(sum(errors) / (len(errors) * alexnet), 6),
            "images": [cell and cell["images"] for cell in counts],
        }
    row = {"images": sum(cell["images"] for cell in cells.values()), "mce": None, "mean_error": None}
    lacking = {name: [s for s in STRENGTHS if (name, s) not in cells] for name in ALEXNET}
    if missing := [f"{name} {' '.join(map(str, at))}" for name, at in lacking.items() if at]:
        row["reason"] = f"not evaluated: {', '.join(missing)}"
    else:
        row["mce"] = round(sum(corruptions[name]["ce"] for name in ALEXNET) / len(ALEXNET), 6)
        errors = [error for name in ALEXNET for error in corruptions[name]["error"]]
        row["mean_error"] = round(sum(errors) / len(errors), 6)
    return {**row, "corruptions": corruptions}


def published_for(name: str, md5: str) -> dict[str, float]:
    """A checkpoint's file name and md5 -> the published figures by set, none for other files than the released ones."""
    known_md5 = {url.rsplit("/", 1)[-1]: digits for url, digits in MD5.items()}
    by_md5 = [file for file, digits in known_md5.items() if md5.startswith(digits)]
    file = next((file for file in [*by_md5, name] if file in PUBLISHED), None)
    if file and not by_md5:
        log.warning(f"{name} has the name of a released file, but its md5 {md5} does not begin with {known_md5[file]}")
    return dict(zip(_PUBLISHED_SETS, PUBLISHED[file], strict=True)) if file else {}


def md5_of(path: Path) -> str:
    """A file's md5, as hexadecimal digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """What decides the last digits."""
    packages = ("torch", "torchvision", "timm", "pillow", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
