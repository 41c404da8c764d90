"""Saving a run: whole files, off the training thread, often enough, few enough; and leaving at a signal.

`checkpoint-{epoch}.pth` is the state at the end of an epoch, `partial-{epoch}-{batches}.pth` at a point within one. A
file is a dict: `model`, `optimizer`, `epoch`, `scaler`, `args` (a plain dict), `world_size` and `n_images`; within an
epoch also `iteration` (batches done) and `progress` (the sums of its means so far); in classifiers `max_accuracy` and
`best`.
"""

import argparse
import contextlib
import os
import shutil
import threading
import time
from pathlib import Path

import torch
from torch import nn

from util import checkpoint, files, resume
from util.dist import Dist, on_main, sum_over_ranks
from util.errors import NonFiniteLossError, NotSavedError, UserError
from util.files import save
from util.lock import take
from util.log import log
from util.progress import Part, Progress
from util.signals import Signals, Stopped
from util.step import Step
from util.strikes import Strikes

LAST_TRIES_SECONDS = (1, 5, 20, 60)  # pauses before the state is given up that no later save would bring


def check_finite(model: nn.Module, epoch: int) -> None:
    """Raise NonFiniteLossError unless all weights are finite: the last update may have broken what no loss has seen."""
    tensors = [*model.parameters(), *model.buffers()]  # running statistics break as weights do
    finite = torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all()
    if sum_over_ranks((~finite).float()).item() > 0:
        raise NonFiniteLossError(
            f"weights became non-finite in the last steps of epoch {epoch}, which is not saved. Resume from the last "
            "checkpoint with a lower --blr, a longer --warmup_epochs or --amp off"
        )


class Saver:
    """Saves into --output_dir, if it is not empty, what a run needs to go on; on rank 0, but all ranks call it alike.

    Inside its `with`, signals are noted, and obeyed after an optimizer step. A save that fails stops no training: it is
    an error in the log, tried again at the next occasion. `milestones`: epochs between those that --keep_last keeps;
    `n_images`: training images, which a run that resumes is to have too. One run at a time has the folder.
    """

    def __init__(
        self, env: Dist, args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler, milestones: int | None = None, n_images: int | None = None,
    ) -> None:  # fmt: skip
        self.env, self.args, self.milestones, self.n_images = env, args, milestones, n_images
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.folder = Path(args.output_dir) if env.is_main and args.output_dir else None
        self.asynchronous = args.async_save == "on" or (args.async_save == "auto" and env.device.type == "cuda")
        self.signals, self.stop = Signals(env), set()
        self.strikes = Strikes(args.on_nan, args.accum_iter, self._roll_back, scaler.get_scale)
        self.max_accuracy, self.best = 0.0, None
        self.progress: Progress | None = None
        self.step: Step | None = None
        self.saved_at = time.monotonic()
        self.failed = False  # the last save is still owed
        self.accuracy: float | None = None  # of the last epoch
        self._patience = args.dist_timeout * 30  # seconds; half of what other ranks wait
        self.writing: threading.Thread | None = None
        self.copies: dict[tuple, torch.Tensor] = {}
        self.lock: int | None = None
        if args.output_dir:
            on_main(env, self._check_folder)

    def _check_folder(self) -> None:
        """Clear what a killed process left half-written; raise UserError where another run is at work, or not even one
        checkpoint fits.
        """
        self.lock = take(self.folder / ".lock", min(120, self._patience))
        try:
            if not self.args.resume:
                resume.check_new(self.folder)  # again: a run that this one has waited for has left its files
            self._check_room()
        except UserError:
            self._give_up_lock()
            raise

    def _check_room(self) -> None:
        for kind in ("checkpoint-*.tmp", "partial-*.tmp"):
            for path in self.folder.glob(kind):
                path.unlink()
        trained = [param for param in self.model.parameters() if param.requires_grad]
        tensors = [*self.model.state_dict().values(), *trained, *trained]  # two moments, at most
        size, free = sum(t.numel() * t.element_size() for t in tensors), shutil.disk_usage(self.folder).free
        if size > free:
            raise UserError(
                f"--output_dir {self.folder} has {free / 1e9:.1f} GB free, and one checkpoint takes {size / 1e9:.1f}: "
                "make room or name another folder"
            )
        n_files = min(-(-self.args.epochs // self.args.save_every), self.args.keep_last or self.args.epochs)
        n_files += files.KEPT_ANYWAY
        if self.milestones and self.args.keep_last:
            n_files += self.args.epochs // self.milestones
        if n_files * size > free:
            log.warning(
                f"{self.folder} has {free / 1e9:.1f} GB free; {n_files} checkpoints, which may come together, take "
                f"{n_files * size / 1e9:.1f}: make room, or see --keep_last"
            )

    def __enter__(self) -> "Saver":
        self.signals.__enter__()
        return self

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        try:
            self._finish(error)
        finally:
            self.signals.__exit__()
            self._give_up_lock()

    def _give_up_lock(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def resume(self) -> resume.Start:
        """Load what --resume says; return where to start."""
        start = resume.resume(self.env, self.args, self.model, self.optimizer, self.scaler, self.n_images)
        self.max_accuracy, self.best = start.max_accuracy, start.best
        return start

    def begin(self, epoch: int, progress: Progress, step: Step | None = None) -> None:
        """Tell which epoch is under way, what counts it and what updates the weights; --on_nan holds from now on."""
        self.epoch, self.progress, self.step = epoch, progress, step
        progress.judge = self.strikes.judge

    def due(self) -> bool:
        """After an optimizer step: True, on all ranks together, where it is time for `save_part`."""
        minutes = self.args.save_minutes
        late = minutes is not None and time.monotonic() - self.saved_at > minutes * 60
        self.stop, save = self.signals.ask(late and self.folder is not None)
        return bool(self.stop) or save

    def save_part(self) -> None:
        """Save within an epoch, after what `progress` has read. Raises Stopped, on all ranks, after a signal."""
        part: Part = self.progress.part()
        more = {"iteration": part.iteration, "progress": {"sums": part.sums, "counts": part.counts}}
        check_finite(self.model, self.epoch)
        self._save(f"partial-{self.epoch}-{part.iteration}.pth", self.epoch, **more)
        if self.stop:
            self._wait()
            raise Stopped(self.stop, on_main(self.env, lambda: self.folder is not None and not self.failed))

    def leave_if_told(self) -> None:
        """Between two batches of an evaluation: after a signal, save and raise Stopped, on all ranks together."""
        self.stop, _ = self.signals.ask(save=False)
        if self.stop:
            self.save_part()

    def after_epoch(self, epoch: int, accuracy: float | None = None) -> None:
        """Save, if it is time. Raises NonFiniteLossError on all ranks together where a weight is NaN or infinite."""
        check_finite(self.model, epoch)
        self.epoch, self.accuracy = epoch, accuracy
        if accuracy is not None:
            self.max_accuracy = max(self.max_accuracy, accuracy)
        last = epoch == self.args.epochs - 1
        if epoch % self.args.save_every and not last and not self.failed:
            return
        self._save(f"checkpoint-{epoch}.pth", epoch, accuracy)

    def _save(self, name: str, epoch: int, accuracy: float | None = None, **more) -> None:
        self.saved_at = start = time.monotonic()
        if self.folder is None or not self._wait(self._patience):
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": epoch,
            "scaler": self.scaler.state_dict(),
            "args": {name: str(v) if isinstance(v, Path) else v for name, v in vars(self.args).items()},
            "world_size": self.env.world_size,
        }
        if self.n_images is not None:
            state["n_images"] = self.n_images
        best = self.best  # known now: the save before this one has ended
        if accuracy is not None and (best is None or accuracy > best[0]):
            best = (accuracy, epoch)
        if self.max_accuracy or best:
            state |= {"max_accuracy": self.max_accuracy, "best": best}
        state |= more
        path, self.failed = self.folder / name, False
        if self.asynchronous:
            state = self._copy(state)
            if self.env.device.type == "cuda":
                torch.cuda.synchronize()
            log.debug(f"training waited {time.monotonic() - start:.3f} s for {name}, to copy the state")
            self.writing = threading.Thread(target=self._write, args=(path, state), daemon=True)
            self.writing.start()
        else:
            self._write(path, state)

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
        except Exception as error:  # whatever it is, a thread's end must not go unnoticed
            self.failed = True
            # torch's writer turns a full disk into an error of its own
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            log.error(f"{path} COULD NOT BE SAVED ({reason}); training goes on, the next save will try again")
            return
        log.debug(f"saved {path}: {megabytes:.1f} MB in {time.monotonic() - start:.2f} s")
        tidy = {
            files.BEST: lambda: files.link_best(path, self.best),  # not all file systems have links
            "old files": lambda: files.prune(path, self.args.keep_last, self.milestones, self.best),
        }
        for what, action in tidy.items():
            try:
                action()
            except OSError as error:
                log.warning(f"{self.folder}: {what} cannot be brought up to date ({error})")

    def _roll_back(self) -> bool:
        """Load the newest checkpoint into model, optimizer and scaler, on all ranks; False where there is none."""
        self._wait()
        path = on_main(self.env, lambda: self.folder and resume.newest(self.folder))
        if not path:
            return False
        state = checkpoint.load(path)
        if not resume.has_training_state(state):
            return False
        checkpoint.load_strictly(self.model, state["model"], path)
        resume.load_training_state(path, state, self.optimizer, self.scaler)
        if self.step is not None:
            self.step.drop()
        return True

    def _wait(self, seconds: float | None = None) -> bool:
        """Wait for the pending write; False where it has not ended after `seconds`, as on a disk that stalls."""
        if self.writing is not None:
            self.writing.join(seconds)
            if self.writing.is_alive():
                log.error(f"STILL WRITING the last checkpoint after {seconds:.0f} s: this save is left out")
                self.failed = True
                return False
        self.writing = None
        return True

    def _finish(self, error: BaseException | None) -> None:
        """Leave nothing half-done: the pending write, and at the end of the run a save that failed."""
        self._wait()
        if isinstance(error, NonFiniteLossError) and self.progress is not None:
            with contextlib.suppress(NonFiniteLossError):  # where an optimizer let it in, there is nothing to save
                self.stop = set()
                self.save_part()
                self._wait()
        if error is not None or not self.failed:
            return
        self.asynchronous = False
        for seconds in LAST_TRIES_SECONDS:
            log.error(f"the last checkpoint is not saved: trying again in {seconds} s")
            time.sleep(seconds)
            self._save(f"checkpoint-{self.epoch}.pth", self.epoch, self.accuracy)
            if not self.failed:
                return
        raise NotSavedError(f"the end of the run could not be saved in {self.folder}: see the errors above")
