"""Where people look at a run: log.jsonl, status.json, TensorBoard, and wandb and MLflow where they are installed."""

import argparse
import json
import math
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ON_CPU, load, project_log, write_image_folder
from PIL import Image, ImageDraw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_pretrain
from util.dist import Dist
from util.errors import UserError
from util.look.visualize import Pictures, sheet
from util.run import report, status
from util.run.exits import Stopped
from util.run.files import Writer
from util.run.report import Row
from util.run.run_log import RunLog

CPU = Dist(torch.device("cpu"))
TINY = ("--input_size", 16, "--batch_size", 4, "--warmup_epochs", 1, "--num_workers", 0, *ON_CPU)
OPTIONS = {"lr": None, "epochs": 3, "input_size": (16, 32), "name": "x" * 900}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("images"), n_train=8, n_val=2)


def train(script, folder, *words):
    words = (*TINY, "--output_dir", folder, "--log_dir", folder, *words)
    script.main(script.get_args_parser().parse_args([str(word) for word in words]))


def pretrain(images, folder, *words):
    train(main_pretrain, folder, "--data_path", images, "--model", "mae_vit_tiny_patch4", *words)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


# log.jsonl


def rates(**more):
    return SimpleNamespace(rates=more, step_seconds=0.25)


def steps(first, losses):
    return [(first + i, {"loss": loss, "lr": 0.1, "grad_norm": 2.0}) for i, loss in enumerate(losses)]


def test_a_line_has_what_was_read_and_is_plain_json(tmp_path):
    run_log = RunLog(CPU, str(tmp_path), images_per_step=8)
    run_log.steps(2, 3, 5, steps(0, [1.0, math.nan, 4.0]), rates(images_per_second=32.0), "loss")
    run_log.steps(2, 5, 5, steps(3, [math.inf, math.nan]), rates(), "loss")
    first, second = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(first, parse_constant=pytest.fail) == {
        "epoch": 2, "step": 3, "steps": 5, "images": (2 * 5 + 3) * 8, "passes": 3, "loss": 2.5, "lr": 0.1,
        "grad_norm": 2.0, "images_per_second": 32.0, "time": 0.25,
    }  # fmt: skip
    assert json.loads(second, parse_constant=pytest.fail)["loss"] is None


@pytest.mark.parametrize(
    ("start", "n", "kept"),
    [
        ((0, 0), 4, 0), ((1, 0), 4, 2), ((1, 2), 4, 3), ((1, 3), 4, 3), ((2, 0), 4, 4),
        ((1, 4), 8, 3),  # batches of half the size: 4 of 8 are 2 of 4
        ((1, 1), 2, 3), ((1, 3), 8, 2),
    ],
)  # fmt: skip
def test_lines_of_steps_that_are_done_again_are_taken_out(start, n, kept, tmp_path):
    old = RunLog(CPU, str(tmp_path), images_per_step=8)
    for epoch, done in [(0, 2), (0, 4), (1, 2), (1, 4)]:
        old.steps(epoch, done, 4, steps(done - 2, [1.0, 1.0]), rates(), "loss")
    path = tmp_path / "log.jsonl"
    before = path.read_text().splitlines()
    path.write_text(path.read_text() + '{"epoch": 0, "st')
    new = RunLog(CPU, str(tmp_path), (), *start, images_per_step=8)
    new.steps(start[0], n, n, steps(n - 1, [7.0]), rates(), "loss")
    new.steps(9, n, n, steps(n - 1, [7.0]), rates(), "loss")
    after = path.read_text().splitlines()
    assert after[:-2] == before[:kept] and [json.loads(line)["loss"] for line in after[-2:]] == [7.0, 7.0]


def test_a_full_disk_keeps_the_lines_for_later(tmp_path):
    run_log = RunLog(CPU, str(tmp_path), images_per_step=8)
    run_log.steps(0, 1, 3, steps(0, [1.0]), rates(), "loss")
    run_log.lines.path = Path("/dev/full")
    with project_log() as said:
        run_log.steps(0, 2, 3, steps(1, [2.0]), rates(), "loss")
    assert any("CANNOT BE WRITTEN" in line for line in said)
    run_log.lines.path = tmp_path / "log.jsonl"
    run_log.steps(0, 3, 3, steps(2, [3.0]), rates(), "loss")
    assert [line["loss"] for line in lines_of(tmp_path / "log.jsonl")] == [1.0, 2.0, 3.0]


# status.json


def writer(folder, **saved):
    one = Writer(folder, False, None, None)
    for name, value in saved.items():
        setattr(one, name, value)
    return one


def test_status_says_where_the_run_is_and_when_it_ends(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(status, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time))
    one = status.Status(writer(tmp_path), epoch=1, epochs=3)
    read = lambda: json.loads((tmp_path / "status.json").read_text())  # noqa: E731
    assert read()["state"] == "running" and read()["saved"] is None and read()["seconds_left"] is None
    clock[0] += 60  # 20 of 100 batches since batch 30 of epoch 1
    one.tell(1, 50, 100, {"passes": 20, "images_per_second": 7.0, "loss": 0.5})
    now = read()
    assert (now["epoch"], now["step"], now["steps"], now["epochs"], now["loss"]) == (1, 50, 100, 3, 0.5)
    assert now["seconds_left"] == 3 * 150 and now["images_per_second"] == 7.0
    clock[0] += 4
    one.tell(1, 60, 100, {"passes": 10, "loss": 0.4})
    assert read() == now, "every few seconds only"
    one.writer.saved = ("checkpoint-1.pth", 0.0)
    clock[0] += 2
    one.tell(1, 90, 100, {"passes": 30, "loss": None})
    assert read()["saved"] == "checkpoint-1.pth" and read()["saved_at"] == "1970-01-01T00:00:00+00:00"
    assert read()["loss"] is None and read()["seconds_left"] == 66 // 60 * 121  # 66 s for 60, 110 to go
    assert one.end(None) == "done" and read()["state"] == "done" and read()["seconds_left"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    ("error", "state"),
    [(Stopped({15}, True), "stopped"), (Stopped({15}, False), "failed"), (ValueError("no"), "failed"), (None, "done")],
)
def test_status_says_how_a_run_ended(error, state, tmp_path):
    assert status.Status(writer(tmp_path)).end(error) == state
    now = json.loads((tmp_path / "status.json").read_text())
    assert now["state"] == state and ("error" in now) == (state == "failed")


def test_status_that_cannot_be_written_is_said_once(tmp_path):
    with project_log() as said:
        one = status.Status(writer(tmp_path / "gone"))
        one.end(None)
    assert len(said) == 1 and "CANNOT BE WRITTEN" in said[0]


# a run


def test_a_run_that_is_stopped_and_goes_on_leaves_whole_files(images, tmp_path, monkeypatch):
    """Lines at each batch; stopped in the second epoch after batch 3, of which the log already has the next."""
    monkeypatch.setattr("util.run.progress.Progress.due", lambda self, iteration: True)
    monkeypatch.setattr("util.run.status.EVERY_SECONDS", 0)
    pretrain(images, tmp_path / "whole", "--epochs", 2)
    whole = lines_of(tmp_path / "whole" / "log.jsonl")
    assert [(line["epoch"], line["step"], line["images"]) for line in whole] == [
        (epoch, step, 4 * (6 * epoch + step)) for epoch in (0, 1) for step in range(1, 7)
    ]
    now = json.loads((tmp_path / "whole" / "status.json").read_text())
    assert (now["state"], now["epoch"], now["step"], now["steps"]) == ("done", 1, 6, 6)
    assert now["saved"] == "checkpoint-1.pth" and now["loss"] == whole[-1]["loss"]

    folder, asked = tmp_path / "cut", []

    def ask(*_, **__):
        asked.append(1)
        return ({15} if len(asked) == 9 else set()), False

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("util.run.exits.Signals.ask", ask)
        pretrain(images, folder, "--epochs", 2, "--resume", "auto")
    now = json.loads((folder / "status.json").read_text())
    assert (now["state"], now["epoch"], now["step"], now["saved"]) == ("stopped", 1, 3, "partial-1-3.pth")
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(whole[9]) + "\n" + '{"epo')  # read, but after the state that is saved
    pretrain(images, folder, "--epochs", 2, "--resume", "auto")
    for line in (again := lines_of(folder / "log.jsonl")) + whole:
        line.pop("time"), line.pop("images_per_second", None)
    assert again == whole
    assert json.loads((folder / "status.json").read_text())["state"] == "done"


def test_a_run_that_fails_says_so(images, tmp_path, monkeypatch):
    monkeypatch.setattr(main_pretrain, "train_one_epoch", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain(images, tmp_path, "--epochs", 1)
    now = json.loads((tmp_path / "status.json").read_text())
    assert now["state"] == "failed" and now["error"].startswith("ZeroDivisionError")


# TensorBoard


def test_tensorboard_has_options_and_results_in_their_place(images, tmp_path):
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    train(main_finetune, tmp_path, "--data_path", images, "--model", "vit_tiny_patch4", "--nb_classes", 3,
          "--epochs", 1, "--blr", 0.25)  # fmt: skip
    content = events(tmp_path).summary_metadata
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG].plugin_data.content)
    assert isinstance(start, plugin_data_pb2.SessionStartInfo)
    assert start.hparams["blr"].number_value == 0.25 and start.hparams["model"].string_value == "vit_tiny_patch4"
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG].plugin_data.content)
    names = {info.name.tag for info in experiment.metric_infos}
    assert names == {"loss", "perf/test_loss", "perf/test_acc1", "perf/test_acc5"}
    assert names <= set(events(tmp_path).Tags()["scalars"]), "curves of these names are there"


def test_steps_that_share_a_place_of_tensorboard_are_all_there(tmp_path):
    run_log = RunLog(CPU, "", [report.TensorBoard(str(tmp_path), {})], images_per_step=1)
    run_log.steps(1, 4, 4000, steps(0, [1.0, 2.0, 3.0, 4.0]), rates(images_per_second=9.0), "train_loss")
    run_log.close()
    points = events(tmp_path).Scalars("train_loss")
    assert [(point.step, point.value) for point in points] == [(1000, 1.0), (1000, 2.0), (1000, 3.0), (1000, 4.0)]


@pytest.mark.parametrize(("start", "left"), [((0, 0), 16), ((2, 0), 8), ((2, 2), 10), ((3, 3), 15)])
def test_tensorboard_leaves_out_what_a_resumed_run_does_again(start, left, tmp_path):
    def run(epochs, value, start=(0, 0)):
        run_log = RunLog(CPU, "", [report.TensorBoard(str(tmp_path), {})], *start, images_per_step=1)
        for epoch in epochs:
            done = start[1] if epoch == start[0] else 0
            run_log.steps(epoch, 4, 4, steps(done, [value] * (4 - done)), rates(images_per_second=9.0), "train_loss")
            run_log.scalar("perf/test_acc1", value, epoch)
        run_log.close()

    run(range(4), 1.0)
    time.sleep(1.1)  # the names of its files tell seconds
    run(range(start[0], 5), 2.0, start)
    points = events(tmp_path).Scalars("train_loss")
    if start == (0, 0):  # a new run into the folder of another, which TensorBoard shows as it is
        assert len(points) == 16 + 20
        return
    assert [point.step for point in points] == [250 * i for i in range(20)]
    assert [point.value for point in points] == [1.0] * left + [2.0] * (20 - left)
    assert {point.step for point in events(tmp_path).Scalars("perf/test_acc1")} == set(range(5))


# --report_to


@pytest.mark.parametrize("names", ["tensorboard", "none", "wandb", "wandb,mlflow", "mlflow, tensorboard,wandb"])
def test_names_of_report_to(names):
    parse = main_pretrain.get_args_parser().parse_args
    assert parse(["--report_to", names]).report_to == names.replace(" ", "")
    assert parse([]).report_to == "tensorboard"


@pytest.mark.parametrize("names", ["", "none,wandb", "wandb,wandb", "comet", "wandb,", "WandB"])
def test_other_names_are_refused(names, capsys):
    with pytest.raises(SystemExit):
        main_pretrain.get_args_parser().parse_args([f"--report_to={names}"])
    assert "argument --report_to" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_a_package_that_is_missing_is_named_before_any_work(name, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # import raises ImportError
    with pytest.raises(UserError, match=f"--report_to {name} needs .* pip install {package}"):
        pretrain(tmp_path / "no images", tmp_path / "out", "--report_to", f"tensorboard,{name}")


def test_packages_that_nobody_names_are_not_imported(monkeypatch):
    for name in report.PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    report.check("tensorboard"), report.check("none")


def test_none_and_an_empty_log_dir_write_no_curves(tmp_path):
    for names, folder in {"none": tmp_path, "tensorboard": ""}.items():
        args = argparse.Namespace(report_to=names, log_dir=str(folder), output_dir="", resume="")
        assert report.open_reports(CPU, args, {}) == []


class Broken:
    def points(self, rows):
        raise OSError("no route to host\n" * 100)

    def close(self, state):
        self.closed = state


def test_a_report_that_fails_is_said_once_and_ends_nothing():
    made = Broken()
    with project_log() as said:
        one = report.Background("wandb", lambda: made)
        for _ in range(5):
            one.points([])
        one.close("done")
    assert len(said) == 1 and said[0].startswith("wandb lacks something of this run (OSError: no route")
    assert "\n" not in said[0] and made.closed == "done", "later calls are tried"


def test_a_report_that_cannot_be_opened_is_said_once():
    with project_log() as said:
        one = report.Background("MLflow", lambda: 1 / 0)
        one.points([]), one.figures({}), one.close("done")
    assert len(said) == 1 and said[0].startswith("MLflow has no reports of this run (ZeroDivisionError")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_whatever_a_library_raises_is_said(error):
    def make():
        raise error

    with project_log() as said:
        report.Background("wandb", make).close("done")
    assert len(said) == 1 and said[0].startswith(f"wandb has no reports of this run ({error.__name__}")


def test_a_report_that_hangs_delays_neither_training_nor_its_end(monkeypatch):
    monkeypatch.setattr(report, "LAST_SECONDS", 0.1)
    monkeypatch.setattr(report, "WAITING", 10)
    release = threading.Event()
    start = time.monotonic()
    with project_log() as said:
        one = report.Background("MLflow", release.wait)
        for _ in range(1000):
            one.points([])
        one.close("done")
    assert time.monotonic() - start < 5
    assert len(said) == 1 and "too slow" in said[0]
    release.set()


# with the packages themselves: offline, and in a folder


def run_args(folder, names, resume=""):
    return argparse.Namespace(report_to=names, output_dir=str(folder), log_dir="", resume=resume)


def show(folder, names, resume="", state="done", options=OPTIONS):
    """What a run would show: two steps, an epoch's results and a picture."""
    run_log = RunLog(CPU, "", report.open_reports(CPU, run_args(folder, names, resume), options), images_per_step=8)
    run_log.steps(0, 2, 2, steps(0, [1.5, math.nan]), rates(images_per_second=40.0), "train_loss")
    run_log.scalar("perf/knn_acc1", 70.0, 0)
    run_log.write({"train_loss": 1.5, "epoch": 0}, {"max_acc1": 70.0})
    run_log.image("reconstructions", Image.new("RGB", (40, 30), "red"), 0)
    run_log.close(state)


def whole_run(path):
    """The records of a run that has ended, which wandb's own process may still be writing."""
    for _ in range(200):
        records = list(wandb_records(path))
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    pytest.fail(f"{path} does not end")


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format, of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


@pytest.fixture
def offline(monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))


def test_wandb_has_the_run(offline, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with project_log() as said:
        show(out, "wandb")
        first = (out / "wandb.id").read_text()
        show(out, "wandb", resume="auto", state="failed", options=OPTIONS | {"epochs": 4})
        assert (out / "wandb.id").read_text() == first, "the same run goes on"
        show(out, "wandb", state="stopped")
        assert (out / "wandb.id").read_text() != first, "a new one in its folder is another"
    assert not any("training goes on" in line for line in said), said
    runs = [whole_run(path) for path in (out / "wandb").glob("offline-run-*/*.wandb")]
    kinds = [{kind: [r for r in run if r.WhichOneof("record_type") == kind] for kind in
              ("run", "history", "summary", "metric", "exit")} for run in runs]  # fmt: skip
    kinds.sort(key=lambda one: (one["run"][0].run.run_id != first.strip(), '"4"' in str(one["run"][0].run.config)))
    assert [one["run"][0].run.run_id == first.strip() for one in kinds] == [True, True, False]
    assert [one["exit"][0].exit.exit_code for one in kinds] == [0, 1, 1]
    config = {item.key: item.value_json for item in kinds[0]["run"][0].run.config.update}
    assert config["epochs"] == "3" and config["input_size"] == "[16,32]" and json.loads(config["name"]) == "x" * 900
    assert kinds[0]["run"][0].run.project == "mae" and kinds[0]["run"][0].run.display_name == "out"
    history = [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
               for record in kinds[0]["history"]]  # fmt: skip
    assert [(row["epoch"], row["images"]) for row in history] == [(0.5, 8), (1.0, 16), (1, 16), (1, 16)]
    assert history[0]["train_loss"] == 1.5 and history[1]["images_per_second"] == 40.0
    assert history[2]["perf/knn_acc1"] == 70.0
    (picture,) = (out / "wandb").glob("offline-run-*-" + first.strip() + "/files/media/images/reconstructions_3_*"), *()
    assert Image.open(next(picture)).size == (40, 30)
    summary = {item.key: item.value_json for record in kinds[0]["summary"] for item in record.summary.update}
    assert float(summary["final/train_loss"]) == 1.5 and float(summary["final/max_acc1"]) == 70
    assert any(r.metric.glob_name == "*" and r.metric.step_metric == "epoch" for r in kinds[0]["metric"])


def test_wandb_without_a_login_asks_nobody_on_a_terminal(offline, tmp_path, monkeypatch):
    import wandb
    from wandb.errors import term

    wandb.teardown()  # of earlier tests in this process, whose settings it keeps
    for name in ("WANDB_SILENT", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(term, "_sys_stdin_isatty", lambda: True)
    monkeypatch.setattr(term, "_sys_stderr_isatty", lambda: True)
    monkeypatch.setattr(term, "_terminput", lambda *_, **__: pytest.fail("asked"))
    with project_log() as said:
        for one in report.open_reports(CPU, run_args(tmp_path, "wandb"), {}):
            one.close("done")
    wandb.teardown()
    assert len(said) == 1 and "No API key" in said[0] and "wandb login" in said[0]


def test_an_mlflow_without_a_place_is_refused_before_any_work(file_store, tmp_path, monkeypatch):
    report.check("mlflow")
    for uri in (str(tmp_path / "store"), f"file:{tmp_path / 'store'}"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        report.check("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # a network is no fault of the command's
    report.check("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "false")
    for uri in (str(tmp_path / "a"), f"file:{tmp_path / 'b'}", f"sqlite:///{tmp_path}/no/such/folder.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(UserError, match=f"cannot use .*{tmp_path}.*MLFLOW_TRACKING_URI"):
            pretrain(tmp_path / "no images", tmp_path / "out", "--report_to", "mlflow")


@pytest.fixture
def file_store(monkeypatch, tmp_path):
    pytest.importorskip("mlflow", reason="MLflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # from 3.7 on it asks to be asked
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)


def test_mlflow_has_the_run(file_store, tmp_path):
    from mlflow import MlflowClient

    out = tmp_path / "out"
    out.mkdir()
    with project_log() as said:
        show(out, "mlflow", state="stopped")
        (client, first) = MlflowClient(), (out / "mlflow.id").read_text().strip()
        assert client.get_run(first).info.status == "KILLED"
        show(out, "mlflow", resume="auto", options=OPTIONS | {"epochs": 4, "new": 1})
    assert not any("training goes on" in line for line in said), said
    experiment = client.get_experiment_by_name("mae").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.run_id == first and run.info.status == "FINISHED" and run.info.run_name == "out"
    params = run.data.params
    assert params["lr"] == "None" and params["epochs"] == "3" and params["input_size"] == "(16, 32)"
    assert params["new"] == "1" and len(params["name"]) == report.LONGEST_PARAM
    assert run.data.tags["resumed.epochs"] == "4" and "resumed.lr" not in run.data.tags
    metrics = run.data.metrics
    assert metrics["final/train_loss"] == 1.5 and metrics["final/max_acc1"] == 70 and metrics["perf/knn_acc1"] == 70
    points = client.get_metric_history(first, "train_loss")[:2]
    assert [point.step for point in points] == [8, 16] and points[0].value == 1.5 and math.isnan(points[1].value)
    assert [point.value for point in client.get_metric_history(first, "epoch")[:2]] == [0.5, 1.0]
    picture = tmp_path / "store" / experiment / first / "artifacts" / "reconstructions" / "epoch-1.png"
    assert Image.open(picture).size == (40, 30)


def test_mlflow_takes_more_than_one_call_s_worth(file_store, tmp_path):
    from mlflow import MlflowClient

    many = {f"option{i}": i for i in range(250)}
    (one,) = report.open_reports(CPU, run_args(tmp_path, "mlflow"), many)
    with project_log() as said:
        one.points([Row(i, i / 600, i, {"loss": 1.0, "lr": 0.1}) for i in range(600)])
        one.close("done")
    assert not any("training goes on" in line for line in said), said
    first = (tmp_path / "mlflow.id").read_text().strip()
    assert len(MlflowClient().get_run(first).data.params) == 250
    assert len(MlflowClient().get_metric_history(first, "loss")) == 600


def test_a_run_reports_to_all_and_trains_the_same(offline, file_store, images, tmp_path):
    """Of the script, with a place that cannot be reached as well."""
    pretrain(images, tmp_path / "a", "--epochs", 1)
    pretrain(images, tmp_path / "b", "--epochs", 1, "--report_to", "wandb,mlflow,tensorboard", "--picture_every", 1)
    a, b = (load(tmp_path / name / "checkpoint-0.pth")["model"] for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "training goes on" not in (tmp_path / "b" / "train.log").read_text()
    assert len(list((tmp_path / "b" / "wandb").glob("offline-run-*"))) == 1
    assert list((tmp_path / "store").glob("*/*/artifacts/reconstructions/epoch-1.png"))
    assert len(events(tmp_path / "b").Scalars("train_loss")) == 6


def test_other_ranks_report_nothing(tmp_path):
    other = Dist(torch.device("cpu"), rank=1, world_size=2)
    args = argparse.Namespace(
        report_to="tensorboard,mlflow", output_dir=str(tmp_path), log_dir=str(tmp_path), resume=""
    )
    run_log = RunLog(other, str(tmp_path), report.open_reports(other, args, {}))
    run_log.steps(0, 1, 1, steps(0, [1.0]), rates(), "loss")
    run_log.write({"epoch": 0})
    run_log.close()
    assert list(tmp_path.iterdir()) == []


# titles


@pytest.mark.parametrize("statistics", ["", "neighbours", "answer"])
@pytest.mark.parametrize("size", [(32, 32), (448, 448), (128, 128), (64, 64), (16, 300), (300, 16)])
def test_titles_are_legible_and_apart_at_any_size(statistics, size, monkeypatch):
    drawn = []  # (left, right, size, text) of each title
    text = ImageDraw.ImageDraw.multiline_text

    def note(draw, xy, words, **how):
        left, top, right, bottom = draw.multiline_textbbox(xy, words, font=how["font"], spacing=how["spacing"])
        drawn.append((left, right, bottom, how["font"].size, words))
        text(draw, xy, words, **how)

    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", note)
    white = torch.ones(2, 3, *size)
    pictures = Pictures(white, white, white, white, 0.0, statistics)
    image = sheet(pictures, side=size[0], across=2)
    assert [words.split() for *_, words in drawn] == [title.split() for title in pictures.titles()] * 2, "every word"
    edges = [edge for left, right, *_ in drawn for edge in (left, right)] + [image.width]
    assert edges == sorted(edges) and all(b[0] - a[1] >= 4 for a, b in zip(drawn, drawn[1:], strict=False))
    assert all(bottom <= image.height - size[0] - 6 for _, _, bottom, *_ in drawn), "above the pictures"
    font = drawn[0][3]
    assert font >= 9 and (font >= 10 or size[1] >= 64) and (size != (448, 448) or font >= 20)
