"""A run that cannot be lost: what an engine's loop tells it, it logs, judges and saves; and it leaves at a signal.

A checkpoint is a dict: `model`, `optimizer`, `epoch`, `scaler`, `args` (a plain dict), `world_size`, `n_images`,
`images` (their digest) and `trained` (names of the optimizer's parameters, in its order); within an epoch also
`iteration` (batches done) and `progress` (the sums of its means so far); in classifiers `max_accuracy`, `best` and
`classes` (names in label order), and with --model_ema `model_ema`, named as `model`.
"""

import argparse
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from util import flops
from util.dist import Dist, on_main
from util.errors import NonFiniteLossError, NotSavedError, UserError
from util.log import log
from util.options import plain
from util.run import files, resume
from util.run.exits import Signals, Stopped
from util.run.lock import take
from util.run.not_finite import Strikes, check_weights
from util.run.progress import Part, Progress
from util.run.report import open_reports
from util.run.run_log import RunLog
from util.run.start import record_start
from util.run.status import Status
from util.step import Step
from util.weights import checkpoint

LAST_TRIES_SECONDS = (1, 5, 20, 60)  # pauses before the state is given up that no later save would bring


class Run:
    """What the engines see of a run. All ranks call it alike; rank 0 writes, into --output_dir if it is not empty.

    Inside its `with`, signals are noted, and obeyed after an optimizer step; one run at a time has the folder.
    `n_images`, `images`: training images and their digest, which a run that resumes is to have too; `forward_macs`:
    multiply-adds of an image's forward pass, a share `frozen` of them without backward pass; `milestones`: epochs
    between those that --keep_last keeps; `classes`: a classifier's class names.
    """

    def __init__(
        self, env: Dist, args: argparse.Namespace, model: nn.Module, step: Step, *, n_images: int | None = None,
        forward_macs: float = 0, frozen: float = 0, milestones: int | None = None, classes: list[str] | None = None,
        images: str | None = None,
    ) -> None:  # fmt: skip
        self.env, self.args, self.model, self.step, self.n_images = env, args, model, step, n_images
        self.images, self.classes = images, classes
        self.throughput = None
        if forward_macs:
            images_per_step = args.batch_size * env.world_size
            self.throughput = flops.throughput(forward_macs, images_per_step, env, args.peak_tflops, frozen)
        self.log, self.status = RunLog(env), Status()
        self.done = Part()  # of the epoch that is next
        self.progress: Progress | None = None
        self.signals, self.stop = Signals(env), set()
        self.strikes = Strikes(args.on_nan, step.accum_iter, self._roll_back, step.scaler.get_scale)
        self.current, self.accuracy = args.start_epoch, None  # epoch, and accuracy of the last one
        self.max_accuracy = 0.0
        self.saved_at = time.monotonic()
        self.patience = args.dist_timeout * 30  # seconds; half of what other ranks wait
        self.lock: int | None = None
        folder = Path(args.output_dir) if env.is_main and args.output_dir else None
        asynchronous = args.async_save == "on" or (args.async_save == "auto" and env.device.type == "cuda")
        self.writer = files.Writer(folder, asynchronous, args.keep_last, milestones) if folder else None
        if args.output_dir:
            on_main(env, self._take_folder)

    def _take_folder(self) -> None:
        self.lock = take(self.writer.folder / ".lock", min(120, self.patience))
        try:
            if not self.args.resume:
                resume.check_new(self.writer.folder)  # again: a run that this one has waited for has left its files
            trained = [param for param in self.model.parameters() if param.requires_grad]
            tensors = [*self.model.state_dict().values(), *trained, *trained]  # two moments, at most
            tensors += self.step.average.module.state_dict().values() if self.step.average else []
            args, milestones = self.args, self.writer.milestones
            n_files = min(-(-args.epochs // args.save_every), args.keep_last or args.epochs) + files.KEPT_ANYWAY
            if milestones and args.keep_last:
                n_files += args.epochs // milestones
            files.make_room(self.writer.folder, sum(t.numel() * t.element_size() for t in tensors), n_files)
        except UserError:
            self._give_up_lock()
            raise

    def __enter__(self) -> "Run":
        self.signals.__enter__()
        return self

    def __exit__(self, _kind, error: BaseException | None, _trace) -> None:
        try:
            self._finish(error)
        except BaseException as failure:
            error = failure
            raise
        finally:
            self.log.close(self.status.end(error))
            self.signals.__exit__()
            self._give_up_lock()

    def _give_up_lock(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    # an epoch, as main_* and the engines go through it

    def epochs(self) -> Iterator[int]:
        """Load what --resume says, and yield the epochs that are left; `done` is the part of the first that is."""
        args, step = self.args, self.step
        lr, dtype = max(group["lr"] for group in step.optimizer.param_groups), step.dtype or "float32"
        effective_batch = args.batch_size * args.accum_iter * self.env.world_size
        log.info(
            f"lr {lr:.3g}, effective batch {effective_batch}, {self.env.world_size} x {self.env.device.type}, {dtype}"
        )
        record_start(self.env, args)
        of_ours = self.n_images, step.average, self.images
        start = resume.resume(self.env, args, self.model, step.optimizer, step.scaler, *of_ours)
        self.max_accuracy = start.max_accuracy
        if self.writer:
            self.writer.best = start.best
        reports = open_reports(self.env, args, plain(args))
        images_per_step = args.batch_size * self.env.world_size
        self.log = RunLog(self.env, args.output_dir, reports, start.epoch, start.part.iteration, images_per_step)
        self.status = Status(self.writer, start.epoch, args.epochs)
        if start.epoch >= args.epochs:
            log.warning(f"nothing left to train: epoch {start.epoch} of --epochs {args.epochs}")
        for epoch in range(start.epoch, args.epochs):
            self.done = start.part_of(epoch)
            yield epoch

    def epoch(self, epoch: int, loader, loss_name: str = "loss") -> Iterator[tuple[int, object]]:
        """Yield (iteration, batch) of what is left of an epoch; `loss_name`: its curve in TensorBoard."""
        self.current, self.loss_name = epoch, loss_name
        self.progress = Progress(loader, f"Epoch: [{epoch}]", 20, self.env, self.throughput, self.done)
        yield from self.progress

    def after_step(self, iteration: int, loss: torch.Tensor, lr: float) -> None:
        """After each forward pass. Raises NonFiniteLossError, and after a signal Stopped, on all ranks together.

        Only here the host waits for the device: every 20 passes, where it is time to save, and, with several processes,
        where they ask one another for signals (see `Signals.ask`).
        """
        self.progress.add(iteration, lr=lr, loss=loss, grad_norm=self.step.grad_norm)
        saving = (iteration + 1) % self.step.accum_iter == 0 and self.due()
        if self.progress.due(iteration) or saving:
            self._read()
        if saving:
            self.save_part()

    def _read(self) -> None:
        steps, step = self.progress.read(over_ranks=True), self.step
        # with loss scaling, or before a step is whole, a norm that is not finite is no fault
        judged = [step.skips and (iteration + 1) % step.accum_iter == 0 for iteration, _ in steps]
        passes = [
            (iteration, values, values["grad_norm"] if is_judged else 0.0)
            for (iteration, values), is_judged in zip(steps, judged, strict=True)
        ]
        self.strikes.judge(self.progress.header, passes)
        self.progress.log_line(len(steps))
        place = self.current, self.progress.read_to, self.progress.total
        line = self.log.steps(*place, steps, self.progress, self.loss_name)
        self.status.tell(*place, line)

    def means(self) -> dict[str, float]:
        """The epoch's mean `loss`, `lr` and `grad_norm`, over all ranks."""
        return self.progress.averages()

    def after_epoch(self, epoch: int, train: dict[str, float], test: dict[str, float] | None = None) -> None:
        """Save, if it is time, then write what came of the epoch. `test`: a classifier's evaluation.

        Raises NonFiniteLossError on all ranks together where a weight is NaN or infinite.
        """
        accuracy = None if test is None else test["acc1"]
        if test is not None:
            log.info(f"Max accuracy: {max(self.max_accuracy, accuracy):.2f}%")
        self.save_epoch(epoch, accuracy)
        stats = {f"train_{name}": train[name] for name in ("lr", "loss")}
        if test is not None:
            for name, value in test.items():
                self.log.scalar(f"perf/test_{name}", value, epoch)
            stats |= {f"test_{name}": value for name, value in test.items()}
        stats["epoch"] = epoch
        if test is not None:
            stats["n_parameters"] = sum(param.numel() for param in self.model.parameters() if param.requires_grad)
        self.log.write(stats, {} if test is None else {"max_acc1": self.max_accuracy})

    # signals

    @property
    def told(self) -> bool:
        """Whether a signal has told this process to leave; `leave_if_told` is for all ranks together."""
        return bool(self.signals.seen)

    def due(self) -> bool:
        """After an optimizer step: True, on all ranks together, where it is time for `save_part`."""
        minutes = self.args.save_minutes
        late = minutes is not None and time.monotonic() - self.saved_at > minutes * 60
        self.stop, save = self.signals.ask(late and self.writer is not None)
        return bool(self.stop) or save

    def leave_if_told(self) -> None:
        """After an evaluation, which ends early where `told`: save and raise Stopped, on all ranks together."""
        self.stop, _ = self.signals.ask(save=False, now=True)
        if self.stop:
            self.save_part()

    # saving

    def save_part(self) -> None:
        """Save within an epoch, after what `progress` has read. Raises Stopped, on all ranks, after a signal."""
        part: Part = self.progress.part()
        more = {"iteration": part.iteration, "progress": {"sums": part.sums, "counts": part.counts}}
        check_weights(self.model, self.current)
        self._save(f"partial-{self.current}-{part.iteration}.pth", self.current, **more)
        if self.stop:
            if self.writer:
                self.writer.wait()
            raise Stopped(self.stop, on_main(self.env, lambda: self.writer is not None and not self.writer.failed))

    def save_epoch(self, epoch: int, accuracy: float | None = None) -> None:
        """Save the end of an epoch, if it is time or the last save has failed; `accuracy` of a classifier, in %."""
        check_weights(self.model, epoch)
        self.current, self.accuracy = epoch, accuracy
        if accuracy is not None:
            self.max_accuracy = max(self.max_accuracy, accuracy)
        owed = epoch % self.args.save_every == 0 or epoch == self.args.epochs - 1
        if self.writer and (owed or self.writer.failed):
            self._save(f"checkpoint-{epoch}.pth", epoch, accuracy)

    def _save(self, name: str, epoch: int, accuracy: float | None = None, **more) -> None:
        self.saved_at = time.monotonic()
        if self.writer is None or not self.writer.wait(self.patience):
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "epoch": epoch,
            # without loss scaling that of a fresh scaler: the original's takes no empty state
            "scaler": self.step.scaler.state_dict() or torch.amp.GradScaler("cpu").state_dict(),
            "args": plain(self.args),
            "world_size": self.env.world_size,
            "trained": resume.trained(self.model, self.step.optimizer),
        }
        if self.step.average:
            state["model_ema"] = self.step.average.module.state_dict()
        told = {"n_images": self.n_images, "images": self.images, "classes": self.classes}
        state |= {name: value for name, value in told.items() if value is not None}
        best = self.writer.best  # known now: the save before this one has ended
        if accuracy is not None and (best is None or accuracy > best[0]):
            best = (accuracy, epoch)
        if self.max_accuracy or best:
            state |= {"max_accuracy": self.max_accuracy, "best": best}
        self.writer.write(name, state | more)

    def _roll_back(self) -> bool:
        """Load the newest checkpoint into model, optimizer and scaler, on all ranks; False where there is none."""
        if self.writer:
            self.writer.wait()
        path = on_main(self.env, lambda: self.writer and resume.newest(self.writer.folder))
        if not path:
            return False
        state = checkpoint.load(path)
        if not resume.has_training_state(state):
            return False
        checkpoint.load_strictly(self.model, state["model"], path)
        resume.load_training_state(path, state, self.step.optimizer, self.step.scaler)
        resume.load_average(path, state, self.step.average)
        self.step.drop()
        return True

    def _finish(self, error: BaseException | None) -> None:
        """Leave nothing half-done: the pending write, and at the end of the run a save that failed."""
        if self.writer:
            self.writer.wait()
        if isinstance(error, NonFiniteLossError) and self.progress is not None:
            with contextlib.suppress(NonFiniteLossError):  # where an optimizer let it in, there is nothing to save
                self.stop = set()
                self.save_part()
                if self.writer:
                    self.writer.wait()
        if error is not None or not self.writer or not self.writer.failed:
            return
        self.writer.asynchronous = False
        for seconds in LAST_TRIES_SECONDS:
            log.error(f"the last checkpoint is not saved: trying again in {seconds} s")
            time.sleep(seconds)
            self._save(f"checkpoint-{self.current}.pth", self.current, self.accuracy)
            if not self.writer.failed:
                return
        raise NotSavedError(f"the end of the run could not be saved in {self.writer.folder}: see the errors above")
