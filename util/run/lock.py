"""One run at a time in a folder: two would overwrite each other's files."""

import contextlib
import os
import socket
import time
from pathlib import Path

from util.errors import UserError
from util.log import log

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def take(path: Path, wait_seconds: float = 0, option: str = "--output_dir") -> int | None:
    """Lock the file `path` until the descriptor that is returned is closed, or the process ends in whatever way.

    The lock is the whole process's, which must not take it twice. A run that was killed a moment ago may hold it still,
    on another node of a network file system for a minute or two. None where the file system has no locks, or no room.
    Raises UserError where another process has it for longer; `option` named the folder.
    """
    if fcntl is None:
        return None
    said, end = False, time.monotonic() + wait_seconds
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        while not _try(file):
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "a process"
            if time.monotonic() >= end:
                os.close(file)
                raise UserError(
                    f"{option} {path.parent} is in use by another run ({holder}): stop that run, or name another folder"
                )
            if not said:
                log.info(f"{path.parent} is in use by another run ({holder}): waiting {wait_seconds:.0f} s for its end")
                said = True
            time.sleep(min(1, wait_seconds / 4))
    except OSError as error:  # a disk that is full or read-only is another's to tell
        log.debug(f"{path} cannot be locked ({error}): nothing keeps a second run from this folder")
        return None
    with contextlib.suppress(OSError):  # for the message alone
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return file


def _try(file: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: forked loader workers do not hold it
    except (BlockingIOError, PermissionError):
        return False
    return True
