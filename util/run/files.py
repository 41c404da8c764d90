"""Files of checkpoints: written whole or not at all, told by their names, and removed when newer ones replace them.

`checkpoint-{epoch}.pth` is the state at the end of an epoch, `partial-{epoch}-{batches}.pth` at a point within one.
"""

import contextlib
import os
import re
import shutil
import threading
import time
from pathlib import Path

import torch

from util.errors import UserError
from util.log import log

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
    """Folder -> its checkpoints, oldest first, by where a run goes on from them: (epoch, batches of it done)."""
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


def make_room(folder: Path, size: int, n_files: int) -> None:
    """Clear what a killed process left half-written. Raise UserError where not even one file of `size` bytes fits, and
    warn where the `n_files` that may come together do not.
    """
    for kind in ("checkpoint-*.tmp", "partial-*.tmp"):
        for path in folder.glob(kind):
            path.unlink()
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"--output_dir {folder} has {free / 1e9:.1f} GB free, and one checkpoint takes {size / 1e9:.1f}: "
            "make room or name another folder"
        )
    if n_files * size > free:
        log.warning(
            f"{folder} has {free / 1e9:.1f} GB free; {n_files} checkpoints, which may come together, take "
            f"{n_files * size / 1e9:.1f}: make room, or see --keep_last"
        )


class Writer:
    """Writes one file after another into `folder`; `asynchronous`: beside training, from a copy in main memory.

    A write that fails stops no training: it is an error in the log, and `failed` until a later one succeeds. `best` is
    (accuracy, epoch) of the best checkpoint that has been written.
    """

    def __init__(self, folder: Path, asynchronous: bool, keep_last: int | None, milestones: int | None) -> None:
        self.folder, self.asynchronous, self.keep_last, self.milestones = folder, asynchronous, keep_last, milestones
        self.failed = False  # the last save is still owed
        self.best: tuple[float, int] | None = None
        self.saved: tuple[str, float] | None = None  # name and time of the last file
        self.writing: threading.Thread | None = None
        self.copies: dict[tuple, torch.Tensor] = {}

    def write(self, name: str, state: dict) -> None:
        """Write `state`, of which `best` is the pair above; call `wait` before."""
        path, self.failed = self.folder / name, False
        if not self.asynchronous:
            self._write(path, state)
            return
        start = time.monotonic()
        state = self._copy(state)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        log.debug(f"training waited {time.monotonic() - start:.3f} s for {name}, to copy the state")
        self.writing = threading.Thread(target=self._write, args=(path, state), daemon=True)
        self.writing.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the pending write; False where it has not ended after `seconds`, as on a disk that stalls."""
        if self.writing is not None:
            self.writing.join(seconds)
            if self.writing.is_alive():
                log.error(f"STILL WRITING the last checkpoint after {seconds:.0f} s: this save is left out")
                self.failed = True
                return False
        self.writing = None
        return True

    def _copy(self, value, *where):
        """Nested dicts and lists of tensors -> the same on the CPU, in memory that is used again at the next save."""
        if isinstance(value, dict):
            return {key: self._copy(inner, *where, key) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(inner, *where, i) for i, inner in enumerate(value))
        if not isinstance(value, torch.Tensor):
            return value
        pinned = value.device.type == "cuda"
        if where not in self.copies:
            self.copies[where] = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
        return self.copies[where].copy_(value, non_blocking=pinned)  # else nothing waits for it

    def _write(self, path: Path, state: dict) -> None:
        start = time.monotonic()
        try:
            save(path, state)
            megabytes, self.best = path.stat().st_size / 1e6, state.get("best")
            self.saved = (path.name, time.time())
        except Exception as error:  # whatever it is, a thread's end must not go unnoticed
            self.failed = True
            # torch's writer turns a full disk into an error of its own
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            log.error(f"{path} COULD NOT BE SAVED ({reason}); training goes on, the next save will try again")
            return
        log.debug(f"saved {path}: {megabytes:.1f} MB in {time.monotonic() - start:.2f} s")
        tidy = {
            BEST: lambda: link_best(path, self.best),  # not all file systems have links
            "old files": lambda: prune(path, self.keep_last, self.milestones, self.best),
        }
        for what, action in tidy.items():
            try:
                action()
            except OSError as error:
                log.warning(f"{self.folder}: {what} cannot be brought up to date ({error})")
