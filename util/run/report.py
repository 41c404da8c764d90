"""Where people look at a run: TensorBoard, and Weights & Biases and MLflow where --report_to names them.

All get the same names: `train_loss` (in classifiers `loss`), `lr`, `grad_norm`, `images_per_second`, `mfu` within an
epoch; `perf/…` after one; the last figures as `final/…`, which in TensorBoard stand with the options under HPARAMS.
"""

import argparse
import contextlib
import importlib
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from urllib.parse import urlparse

import numpy as np
from PIL import Image

from util.dist import Dist
from util.errors import UserError, printable
from util.log import log

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}  # optional: what pip is to install
PROJECT = "mae"  # of wandb, and MLflow's experiment; WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME say otherwise
LAST_SECONDS = 30  # that the end of a run waits for what is still to be sent
WAITING = 10_000  # calls at most that wait for a slow network
LONGEST_PARAM = 500  # characters that every MLflow server takes
RUNNING_MEANS = ("lr", "grad_norm", "images_per_second", "mfu")  # curves that are no result


@dataclass
class Row:
    """Values at one place of a run: `x` of TensorBoard, (fractional) epochs, images seen."""

    x: int
    epoch: float
    images: int = 0
    values: dict[str, float] = field(default_factory=dict)


def check(names: str) -> None:
    """Raise UserError where --report_to names a package that is not here, or MLflow lacks a place without a network."""
    for name in names.split(","):
        if name in PACKAGES:
            try:
                module = importlib.import_module(name)
            except ImportError as error:
                raise UserError(f"--report_to {name} needs its package: pip install {PACKAGES[name]}") from error
            if name == "mlflow" and urlparse(uri := module.get_tracking_uri()).scheme in ("", "file", "sqlite"):
                try:
                    module.MlflowClient().search_experiments(max_results=1)
                except Exception as error:  # such as a database without the packages for it
                    raise UserError(
                        f"--report_to mlflow cannot use {uri}: set MLFLOW_TRACKING_URI to a server's address; or to "
                        "file:FOLDER, and MLFLOW_ALLOW_FILE_STORE to true; or pip install mlflow, which has databases "
                        f"({_brief(error)})"
                    ) from error


class TensorBoard:
    """Event files in `folder`. Raises UserError where it cannot be written; a disk that fails later ends the curves."""

    def __init__(self, folder: str, options: dict) -> None:
        self.options, self.tags, self.described = options, [], False
        try:
            from torch.utils.tensorboard import SummaryWriter  # late: it takes a second

            self.writer = SummaryWriter(folder)
        except (OSError, ValueError, ImportError) as error:  # ValueError, ImportError: of addresses such as s3://…
            raise UserError(f"--log_dir {folder} cannot be written ({error}): name another folder, or ''") from error

    def points(self, rows: list[Row]) -> None:
        for row in rows:
            for tag, value in row.values.items():
                self._try(lambda: self.writer.add_scalar(tag, value, row.x))  # noqa: B023
                if tag not in self.tags:
                    self.tags.append(tag)

    def cut(self, x: int) -> None:
        """From `x` on steps are done again: TensorBoard leaves out what earlier files have of them."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = Event(session_log=SessionLog(status=SessionLog.START))
        self._try(lambda: self.writer.file_writer.add_event(start, x))

    def image(self, tag: str, picture: Image.Image, row: Row) -> None:
        self._try(lambda: self.writer.add_image(tag, np.asarray(picture), row.x, dataformats="HWC"))

    def figures(self, _figures: dict[str, float]) -> None:
        if self.options and not self.described:  # HPARAMS takes the last point of each curve
            self.described = True
            self._try(self._describe)

    def _describe(self) -> None:
        from torch.utils.tensorboard.summary import hparams

        options = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in self.options.items()
        }
        results = {tag: 0.0 for tag in self.tags if tag not in RUNNING_MEANS}
        for summary in hparams(options, results)[:2]:  # the third says that the session has ended
            self.writer.file_writer.add_summary(summary)

    def close(self, _state: str) -> None:
        self._try(lambda: self.writer.close())

    def _try(self, action: Callable[[], None]) -> None:
        if self.writer:
            try:
                action()
            except OSError as error:
                log.error(f"TensorBoard's files CANNOT BE WRITTEN ({error}): the curves end here")
                self.writer = None


class Wandb:
    """A run of Weights & Biases; its environment variables say where: WANDB_PROJECT, WANDB_MODE=offline and so on."""

    def __init__(self, wandb: ModuleType, identity: "Identity", name: str, folder: str | None, options: dict) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # else it asks on a terminal who is there, before its settings
        wanted = {"console": "off", "silent": True}
        # what still connects when the process ends holds it up
        wanted |= dict.fromkeys(["init_timeout", "finish_timeout", "login_timeout"], LAST_SECONDS)
        settings = wandb.Settings(**{key: value for key, value in wanted.items() if key in wandb.Settings.model_fields})
        identity.keep(identity.known or uuid.uuid4().hex[:12])
        self.wandb, self.run = wandb, wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=os.environ.get("WANDB_NAME", name), config=options,
            dir=os.environ.get("WANDB_DIR", folder), id=identity.known, resume="allow", allow_val_change=True,
            settings=settings,
        )  # fmt: skip
        self.run.define_metric("epoch")
        self.run.define_metric("images")
        self.run.define_metric("*", step_metric="epoch")
        log.info(f"wandb has this run at {self.run.dir if self.run.offline else self.run.url}")

    def points(self, rows: list[Row]) -> None:
        for row in rows:
            self.run.log({**row.values, "epoch": row.epoch, "images": row.images})

    def image(self, tag: str, picture: Image.Image, row: Row) -> None:
        self.run.log({tag: self.wandb.Image(picture), "epoch": row.epoch, "images": row.images})

    def figures(self, figures: dict[str, float]) -> None:
        self.run.summary.update({f"final/{name}": value for name, value in figures.items()})

    def close(self, state: str) -> None:
        self.run.finish(exit_code=0 if state == "done" else 1)


class MLflow:
    """A run of MLflow, whose steps are images seen; MLFLOW_TRACKING_URI says where."""

    ENDS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

    def __init__(self, mlflow: ModuleType, identity: "Identity", name: str, options: dict) -> None:
        from mlflow.entities import Metric, Param, RunTag

        self.Metric, self.client = Metric, mlflow.MlflowClient()
        params = {name: str(value)[:LONGEST_PARAM] for name, value in options.items()}
        if identity.known:
            self.id = identity.known
            old = self.client.get_run(self.id).data.params  # which nobody may change
            self.client.update_run(self.id, status="RUNNING")
        else:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self.client.get_experiment_by_name(experiment)
            where = found.experiment_id if found else self.client.create_experiment(experiment)
            self.id, old = self.client.create_run(where, run_name=name).info.run_id, {}
            identity.keep(self.id)
        changed = [RunTag(f"resumed.{key}", value) for key, value in params.items() if old.get(key, value) != value]
        new = [Param(key, value) for key, value in params.items() if key not in old]
        for first in range(0, max(len(new), 1), 100):  # as many as one call may bring
            self.client.log_batch(self.id, params=new[first : first + 100], tags=changed if not first else ())
        log.info(f"MLflow has this run under the id {self.id}")

    def points(self, rows: list[Row]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self.Metric(tag, value, now, row.images)
            for row in rows
            for tag, value in {**row.values, "epoch": row.epoch}.items()
        ]
        for first in range(0, len(metrics), 1000):  # as many as one call may bring
            self.client.log_batch(self.id, metrics=metrics[first : first + 1000])

    def image(self, tag: str, picture: Image.Image, row: Row) -> None:
        self.client.log_image(self.id, picture, artifact_file=f"{tag}/epoch-{row.epoch:g}.png")

    def figures(self, figures: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[self.Metric(f"final/{n}", v, now, 0) for n, v in figures.items()])

    def close(self, state: str) -> None:
        self.client.set_terminated(self.id, self.ENDS[state])


class Identity:
    """The id under which another program knows a run, in the file `path`; `known` from a start before, if any."""

    def __init__(self, path: Path | None, continues: bool) -> None:
        self.path, self.known = path, None
        if path and continues and path.exists():
            self.known = path.read_text().strip() or None

    def keep(self, value: str) -> None:
        self.known = value
        if self.path:
            self.path.write_text(value + "\n")


class Background:
    """A report that `make` makes, its calls one after another in a thread of its own: a network may be slow, or fail,
    which is said once, and the run neither waits for it nor ends. What cannot be made is left alone.
    """

    def __init__(self, name: str, make: Callable[[], object]) -> None:
        self.name, self.make, self.warned, self.report = name, make, False, None
        self.calls: queue.Queue = queue.Queue(WAITING)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            self.report = self.make()
        except BaseException as error:  # whatever a library raises, also to end a program: this is a thread
            self._warn(f"has no reports of this run ({_brief(error)})")
        while (call := self.calls.get()) is not None:
            if self.report:
                try:
                    call()
                except Exception as error:
                    self._warn(f"lacks something of this run ({_brief(error)})")

    def _warn(self, what: str) -> None:
        if not self.warned:
            self.warned = True
            log.warning(f"{self.name} {what}; training goes on")

    def _call(self, method: str, *values: object) -> None:
        try:
            self.calls.put_nowait(lambda: getattr(self.report, method)(*values))
        except queue.Full:
            self._warn(f"is too slow: {WAITING} calls wait for it, and further ones are left out")

    def cut(self, x: int) -> None:
        """What wandb and MLflow have been told, they keep."""

    def points(self, rows: list[Row]) -> None:
        self._call("points", rows)

    def image(self, tag: str, picture: Image.Image, row: Row) -> None:
        self._call("image", tag, picture, row)

    def figures(self, figures: dict[str, float]) -> None:
        self._call("figures", figures)

    def close(self, state: str) -> None:
        self._call("close", state)
        with contextlib.suppress(queue.Full):
            self.calls.put_nowait(None)
        self.thread.join(LAST_SECONDS)
        if self.thread.is_alive():
            self._warn(f"has not taken all after {LAST_SECONDS} s: the rest is left out")


def open_reports(env: Dist, args: argparse.Namespace, options: dict[str, object]) -> list:
    """What --report_to names, on rank 0 alone; TensorBoard where --log_dir is not empty.

    A run that resumes in its folder goes on in wandb and MLflow under the ids that lie there.
    """
    if not env.is_main:
        return []
    name = Path(args.output_dir or args.log_dir).resolve().name or PROJECT
    reports = []
    for kind in args.report_to.split(","):
        path = Path(args.output_dir) / f"{kind}.id" if args.output_dir else None
        identity = Identity(path, bool(args.resume))
        if kind == "tensorboard" and args.log_dir:
            reports.append(TensorBoard(args.log_dir, options))
        elif kind == "wandb":
            module, folder = importlib.import_module(kind), args.log_dir or args.output_dir or None
            reports.append(Background(kind, lambda m=module, i=identity, f=folder: Wandb(m, i, name, f, options)))
        elif kind == "mlflow":
            module = importlib.import_module(kind)
            reports.append(Background("MLflow", lambda m=module, i=identity: MLflow(m, i, name, options)))
    return reports


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {printable(' '.join(str(error).split())[:300])}"
