"""Class folders into WebDataset shards, which --dataset wds/NAME reads: python -m util.data.pack FOLDER OUT

FOLDER holds train/<class>/ and val/<class>/, or one of them. OUT gets train-0000.tar ... and _info.json, which readers
go by; labels count the sorted class names. Killed and started again, it goes on at the first missing shard. Each
process and loader worker needs a shard of its own, and packing the memory for one.
"""

import argparse
import hashlib
import io
import json
import os
import random
import tarfile
from pathlib import Path

import torch

from util import cli
from util.data.listing import list_classes
from util.dist import Dist
from util.errors import UserError, fail
from util.log import log, setup_logging
from util.run import lock


def list_splits(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """Folder -> {split: [(path, label), ...] in the order of packing}. Raises UserError for what cannot be packed."""
    found = {split: list_classes(folder / split) for split in ("train", "val") if os.path.lexists(folder / split)}
    if not found:
        raise UserError(f"{folder} has neither train/<class>/<image> nor val/<class>/<image>: name such a folder")
    if alone := set([*found.values()][0][1]) ^ set([*found.values()][-1][1]):
        raise UserError(f"{min(alone)!r} is a class of train or of val alone: labels would not agree; mend that")
    for files, _ in found.values():
        if bad := [path for path, _ in files if not (os.access(path, os.R_OK) and os.path.getsize(path))]:
            raise UserError(f"{len(bad)} images are empty or cannot be read, as {bad[:20]}: replace or remove them")
        random.Random(0).shuffle(files)  # a stream shuffles shards and within a buffer: mix the classes once, here
    return {split: files for split, (files, _) in found.items()}


def write(path: Path, content: bytes) -> None:
    """A file that is whole or not there: it gets its name once it is on disk."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def shard(files: list[tuple[str, int]], first: int) -> bytes:
    """Files -> a tar file of {number}.jpg (or as the file ends) and {number}.cls, with numbers from `first` on."""
    with tarfile.open(fileobj=(content := io.BytesIO()), mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (path, label) in enumerate(files, first):
            ending = os.path.splitext(path)[1].lower().replace(".jpeg", ".jpg")  # which every reader knows
            for suffix, data in ((ending, Path(path).read_bytes()), (".cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{number:08d}{suffix}")  # no times, no owners: the same bytes each time
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return content.getvalue()


def pack(folder: Path, out: Path, n: int) -> None:
    """Write the shards of `folder` that `out` lacks, of `n` images each; the last one of a split has the rest."""
    splits, info = list_splits(folder), {}
    files = [(os.path.relpath(path, folder), label, os.path.getsize(path)) for path, label in sum(splits.values(), [])]
    plan = json.dumps([n, hashlib.sha256(json.dumps(files).encode()).hexdigest()]).encode()
    out.mkdir(parents=True, exist_ok=True)
    lock.take(out / ".lock", option="OUT")
    begun = out / "packing.json"  # what is in the shards, which their names do not say
    if begun.read_bytes() != plan if begun.exists() else any(out.glob("*.tar")):
        raise UserError(f"{out} has shards of other images or another --shard_images: name another folder, or empty it")
    write(begun, plan)
    for split, files in splits.items():
        parts = {f"{split}-{i // n:04d}.tar": files[i : i + n] for i in range(0, len(files), n)}
        for i, (name, part) in enumerate(parts.items()):
            if not (out / name).exists():
                write(out / name, shard(part, i * n))
                log.info(f"{name} of {len(parts)}")
        info[split] = {"name": split, "num_samples": len(files), "filenames": [*parts]}
        info[split]["shard_lengths"] = [*map(len, parts.values())]
    write(out / "_info.json", json.dumps({"splits": info}).encode())  # last: what is not whole cannot be opened


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("FOLDER", type=cli.path, help="images in train/<class>/ and val/<class>/, or one of them")
    parser.add_argument("OUT", type=cli.path, help="for the shards; made where it is not there")
    parser.add_argument("--shard_images", type=cli.positive, default=1000, help="images in a shard (default: 1000)")
    args = parser.parse_args()
    setup_logging(Dist(torch.device("cpu")), "")
    try:
        pack(Path(args.FOLDER), Path(args.OUT), args.shard_images)
    except OSError as error:  # of reading or writing
        fail(UserError(f"{args.OUT}: {error}. Mend that and start the same again, which goes on at the missing shard"))
    except UserError as error:
        fail(error)
