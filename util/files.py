"""Files of checkpoints: written whole or not at all, told by their names, and removed when newer ones replace them."""

import contextlib
import os
import re
from pathlib import Path

import torch

BEST = "checkpoint-best.pth"
KEPT_ANYWAY = 2  # the newest files, of whatever kind: should one be damaged, there is another


def save(path: Path, state: dict) -> None:
    """Write a file whole or not at all: to a temporary file beside it, flushed to disk, then renamed.

    Its folder must be there: where a mount has vanished, making it would fill the disk below.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """The new name, too, must survive a power cut; systems that cannot do this have no such call."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def checkpoints(folder: str | Path) -> dict[tuple[int, int], Path]:
    """Folder -> its checkpoints, oldest first, by where a run goes on from them: (epoch, batches of it that are done).

    `checkpoint-{epoch}.pth` is the end of an epoch, `partial-{epoch}-{batches}.pth` a point within one.
    """
    found = {}
    for path in Path(folder).glob("*.pth"):
        if match := re.fullmatch(r"checkpoint-(\d+)\.pth", path.name):
            found[int(match[1]) + 1, 0] = path
        elif match := re.fullmatch(r"partial-(\d+)-(\d+)\.pth", path.name):
            found[int(match[1]), int(match[2])] = path
    return dict(sorted(found.items()))


def link_best(newest: Path, best: tuple[float, int] | None) -> None:
    """Let checkpoint-best.pth lead to `newest`, where that is of the epoch of `best` (accuracy, epoch)."""
    if best and newest.name == f"checkpoint-{best[1]}.pth":
        link = newest.with_name(f"{BEST}.tmp")
        link.unlink(missing_ok=True)
        link.symlink_to(newest.name)
        link.replace(newest.with_name(BEST))


def prune(newest: Path, keep_last: int | None, milestones: int | None, best: tuple[float, int] | None) -> None:
    """Remove what --keep_last no longer keeps, and partial files that newer ones replace; never what is newer.

    Every `milestones`-th epoch stays, and that of `best` (accuracy, epoch). `keep_last` None keeps all epochs.
    """
    paths = list(checkpoints(newest.parent).values())
    paths = paths[: paths.index(newest) + 1]
    epochs = {path: int(path.stem.split("-")[1]) for path in paths if path.name.startswith("checkpoint-")}
    kept = set(paths[-KEPT_ANYWAY:]) | set(list(epochs)[-(keep_last or len(paths)) :])
    for path, epoch in epochs.items():
        if (milestones and epoch % milestones == 0) or (best and epoch == best[1]):
            kept.add(path)
    for path in set(paths) - kept:
        path.unlink()
