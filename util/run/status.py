"""status.json: where a run is, for schedulers and people who want one look; replaced whole."""

import datetime
import json
import math
import os
import time

from util.log import log
from util.run.exits import EXIT_SAVED, Stopped
from util.run.files import Writer, checkpoints

EVERY_SECONDS = 5.0  # at most


class Status:
    """Writes `status.json` into the folder of `writer`, rank 0's; without one it writes nothing.

    Keys: `state` (running, stopped: all is saved, done, failed), `error` (of a failed run), `epoch`, `epochs`, `step`
    (batches done of the epoch) and `steps` (all of them), `images_per_second`, `loss` (mean since the log line before),
    `seconds_left` (to the end of all epochs, evaluations and saves included, as fast as since the start), `saved` and
    `saved_at` (the last checkpoint), `updated_at`; null is what is not known yet.
    """

    def __init__(self, writer: Writer | None = None, epoch: int = 0, epochs: int = 0) -> None:
        self.writer, self.start, self.first = writer, time.monotonic(), None
        self.written, self.failed = -math.inf, False
        self.now = {
            "state": "running", "epoch": epoch, "epochs": epochs, "step": None, "steps": None,
            "images_per_second": None, "loss": None, "seconds_left": None,
        }  # fmt: skip
        if writer:
            writer.saved = writer.saved or _newest(writer)
            self._write()

    def tell(self, epoch: int, step: int, steps: int, line: dict[str, float | None]) -> None:
        """`step` of `steps` batches of `epoch` are done; `line`: of log.jsonl."""
        if not self.writer:
            return
        done, seconds = epoch * steps + step, time.monotonic() - self.start
        if self.first is None:
            self.first = done - line["passes"]
        left = seconds / max(done - self.first, 1) * (self.now["epochs"] * steps - done)
        self.now |= {"epoch": epoch, "step": step, "steps": steps, "seconds_left": round(left)}
        self.now |= {name: line.get(name) for name in ("images_per_second", "loss")}
        if time.monotonic() - self.written > EVERY_SECONDS:
            self._write()

    def end(self, error: BaseException | None) -> str:
        """The last words, after the last save; returns the state: done, stopped or failed."""
        state = "failed" if error else "done"
        if isinstance(error, Stopped) and error.exit_code == EXIT_SAVED:
            state = "stopped"
        self.now["state"] = state
        if state == "failed":
            self.now["error"] = f"{type(error).__name__}: {str(error)[:1000]}"
        if state == "done":
            self.now["seconds_left"] = 0
        if self.writer:
            self._write()
        return state

    def _write(self) -> None:
        name, seconds = self.writer.saved or (None, None)
        saved_at = None if seconds is None else _clock(seconds)
        content = self.now | {"saved": name, "saved_at": saved_at, "updated_at": _clock(time.time())}
        path = self.writer.folder / "status.json"
        temporary = path.with_suffix(".tmp")
        self.written = time.monotonic()
        try:
            temporary.write_text(json.dumps(content) + "\n")
            os.replace(temporary, path)
            self.failed = False
        except OSError as error:
            if not self.failed:
                log.error(f"{path} CANNOT BE WRITTEN ({error}); training goes on")
            self.failed = True


def _newest(writer: Writer) -> tuple[str, float] | None:
    for path in reversed(checkpoints(writer.folder).values()):
        try:
            return path.name, path.stat().st_mtime
        except OSError:
            return None
    return None


def _clock(seconds: float) -> str:
    """Seconds since 1970 -> ISO 8601 in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds")
