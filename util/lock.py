"""One run at a time in a folder: two would overwrite each other's files."""

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import IO

from util.errors import UserError
from util.log import log

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def take(path: Path, wait_seconds: float = 0) -> IO[str] | None:
    """Lock the file `path` until what is returned is closed, or the process ends in whatever way.

    A run that was killed a moment ago may hold it still, on another node of a network file system for a minute or two.
    None where the file system has no locks. Raises UserError where another process has it for longer.
    """
    if fcntl is None:
        return None
    said, end = False, time.monotonic() + wait_seconds
    try:
        file = path.open("a+")
    except OSError as error:  # a disk that is full or read-only is another's to tell
        log.debug(f"{path} cannot be opened ({error}): nothing keeps a second run from this folder")
        return None
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: forked loader workers do not hold it
            break
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "a process"
            if time.monotonic() >= end:
                file.close()
                raise UserError(
                    f"--output_dir {path.parent} is in use by another run ({holder}): stop that run, or name another "
                    "folder"
                ) from None
            if not said:
                log.info(f"{path.parent} is in use by another run ({holder}): waiting {wait_seconds:.0f} s for its end")
                said = True
            time.sleep(min(1, wait_seconds / 4))
        except OSError as error:
            log.debug(f"{path} cannot be locked ({error}): nothing keeps a second run from this folder")
            file.close()
            return None
    with contextlib.suppress(OSError):  # for the message alone
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file
