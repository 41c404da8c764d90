"""Saving and resuming: whole files or none, the newest valid one, what is kept, and going on within an epoch."""

import argparse
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import GOLDEN
from helpers import ON_CPU, ROOT, assert_same, load, project_log, write_image, write_image_folder
from test_scripts import CLASSIFY, FINETUNE, LINPROBE, MAINS, PRETRAIN, images, log_txt, train  # noqa: F401
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.testing import assert_close

import main_pretrain
import models_mae
import models_vit
import util.run.resume
from engine_finetune import evaluate
from util.data import datasets
from util.data.datasets import Images, report_bad
from util.data.listing import list_images
from util.dist import Dist
from util.errors import NonFiniteLossError, NotSavedError, UserError
from util.lr_decay import param_groups_lrd
from util.rng import image_order
from util.run import files
from util.run import run as running
from util.run.exits import Stopped
from util.run.files import checkpoints, save
from util.run.progress import Part
from util.run.resume import Start, newest, refuse_second_run, resume, will_resume
from util.run.run import Run
from util.run.run_log import RunLog
from util.step import Step
from util.transforms import eval_transform
from util.weights import checkpoint

ENV = Dist(torch.device("cpu"))
OPTIONS = {
    "epochs": 6, "save_every": 1, "save_minutes": None, "keep_last": None, "async_save": "off", "dist_timeout": 10.0,
    "on_nan": "stop", "resume": "auto", "start_epoch": 0, "batch_size": 4, "accum_iter": 1, "input_size": 32,
}  # fmt: skip


def options(folder: Path | str, **more) -> argparse.Namespace:
    return argparse.Namespace(**{**OPTIONS, "output_dir": str(folder), **more})


def trained(model: nn.Module, groups: int = 1) -> torch.optim.Optimizer:
    """An optimizer with state: one step of AdamW with the parameters in `groups` groups."""
    params = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": params[i::groups]} for i in range(groups)], lr=0.01)
    sum(param.square().sum() for param in params).backward()
    optimizer.step()
    return optimizer


def scaler(scale: float = 1.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale)


def saver(folder: Path | str, env: Dist = ENV, milestones: int | None = None, n_images=None, **more) -> Run:
    model = nn.Linear(3, 2)
    step = Step(model, trained(model), ENV.device, accum_iter=more.get("accum_iter", 1))
    step.scaler = scaler(8.0)
    return Run(env, options(folder, **more), model, step, milestones=milestones, n_images=n_images)


def read(one: Run, epoch: int, iteration: int) -> None:
    """Let it be as after a log point behind `iteration` batches of `epoch`."""
    one.current, one.progress = epoch, Read(iteration)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def empty(folder: Path, *files: str) -> None:
    for name in files:
        save(folder / name, {"model": {}})


class Read:
    """A Progress that has read `iteration` batches."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def part(self) -> Part:
        return Part(self.iteration, {"loss": 1.5, "lr": 0.5}, {"loss": self.iteration, "lr": self.iteration})


# writing


def test_what_is_written_comes_back(tmp_path):
    one = saver(tmp_path, input_size=(32, 64), data_path=Path("/in"), lr=None)
    one.save_epoch(3)
    state = load(tmp_path / "checkpoint-3.pth")
    assert set(state) == {"model", "optimizer", "epoch", "scaler", "args", "world_size", "trained"}
    assert state["trained"] == ["weight", "bias"]
    assert state["epoch"] == 3 and state["world_size"] == 1
    # a plain dict of plain values, so that it loads without this project
    expected = {**OPTIONS, "output_dir": str(tmp_path), "input_size": (32, 64), "data_path": "/in", "lr": None}
    assert state["args"] == expected and type(state["args"]) is dict
    assert_same(dict(state["model"]), dict(one.model.state_dict()))
    assert_same(state["optimizer"], one.step.optimizer.state_dict())
    assert state["scaler"]["scale"] == 8.0
    assert_same(checkpoint.load(tmp_path / "checkpoint-3.pth"), state)
    assert names(tmp_path) == ["checkpoint-3.pth"]  # no temporary file stays


@pytest.mark.parametrize(("theirs", "scale"), [(True, 65536.0), (False, 1.0)])
def test_file_without_loss_scaling_has_the_state_of_a_fresh_scaler(theirs, scale, tmp_path):
    """Of an empty one, the original's scaler on CUDA says that it is no state."""
    one = saver(tmp_path)
    one.step.scaler = torch.amp.GradScaler("cpu", enabled=False)
    one.save_epoch(0)
    state = load(tmp_path / "checkpoint-0.pth")["scaler"]
    fresh = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    assert state == {**fresh, "_growth_tracker": 0}
    model, ours = nn.Linear(3, 2), torch.amp.GradScaler("cpu", init_scale=2.0, enabled=theirs)
    assert resume(ENV, options(tmp_path), model, trained(model), ours) == Start(1)
    assert ours.get_scale() == scale


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (20, [0, 5])])
def test_saver_keeps_its_period_and_the_last_epoch(every, expected, tmp_path):
    one = saver(tmp_path, save_every=every)
    for epoch in range(6):
        one.save_epoch(epoch)
    assert names(tmp_path) == [f"checkpoint-{epoch}.pth" for epoch in expected]


@pytest.mark.parametrize(("rank", "folder"), [(1, "out"), (0, "")])
def test_only_rank_0_writes_and_only_into_a_folder(rank, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = saver(folder, Dist(torch.device("cpu"), rank=rank), save_minutes=1e-9)
    one.save_epoch(0)
    read(one, 1, 2)
    assert not one.due()
    one.save_part()
    assert list(tmp_path.iterdir()) == []


def test_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint-0.pth"
    save(path, {"model": {}, "epoch": 0})
    before = path.read_bytes()

    def half(state, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        save(path, {"model": {}, "epoch": 1})
    assert path.read_bytes() == before
    assert newest(tmp_path) == path  # what is left of the other is not taken for a checkpoint


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The last update of an epoch may break what no loss has seen."""
    one = saver(tmp_path)
    one.save_epoch(0)
    with torch.no_grad():
        one.model.bias[1] = torch.inf
    with pytest.raises(NonFiniteLossError, match="epoch 1"):
        one.save_epoch(1)
    assert names(tmp_path) == ["checkpoint-0.pth"]


def test_copy_beside_training_holds_the_moment_of_the_call(tmp_path, monkeypatch):
    """The weights change while the file is being written, and the file must not notice."""
    one, write = saver(tmp_path, async_save="on"), files.save
    monkeypatch.setattr(files, "save", lambda path, state: (time.sleep(0.3), write(path, state)))
    start = time.monotonic()
    for epoch in range(2):  # the copy's memory is used twice
        before = {name: value.clone() for name, value in one.model.state_dict().items()}
        moments = one.step.optimizer.state_dict()["state"][0]["exp_avg"].clone()
        one.save_epoch(epoch)
        assert not (tmp_path / f"checkpoint-{epoch}.pth").exists()
        for param in one.model.parameters():
            param.grad = torch.ones_like(param)
        one.step.optimizer.step()
        one.writer.wait()
        state = load(tmp_path / f"checkpoint-{epoch}.pth")
        assert_same(dict(state["model"]), before)
        assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], moments)
        assert not torch.equal(one.model.weight, before["weight"])
    assert time.monotonic() - start > 0.6


@pytest.mark.parametrize("mode", ["on", "off"])
def test_pending_write_ends_before_the_next_and_at_exit(mode, tmp_path, monkeypatch):
    write, events = files.save, []

    def slow(path, state):
        events.append(f"start {path.stem}")
        time.sleep(0.1)
        write(path, state)
        events.append(f"end {path.stem}")

    monkeypatch.setattr(files, "save", slow)
    with saver(tmp_path, async_save=mode) as one:
        one.save_epoch(0)
        one.save_epoch(1)
    assert events == [f"{what} checkpoint-{epoch}" for epoch in (0, 1) for what in ("start", "end")]


@pytest.mark.parametrize("mode", ["on", "off"])
def test_failed_save_is_loud_and_tried_again_at_the_next_epoch(mode, tmp_path, monkeypatch):
    write, full = files.save, [True]

    def save_if_room(path, state):
        if full[0]:
            raise OSError(28, "No space left on device")
        write(path, state)

    monkeypatch.setattr(files, "save", save_if_room)
    one = saver(tmp_path, save_every=20, async_save=mode)
    with project_log() as lines:
        one.save_epoch(0)
        one.save_epoch(1)  # not in the period, but something is owed
        one.writer.wait()
        full[0] = False
        one.save_epoch(2)
        one.save_epoch(3)
        one.writer.wait()
    assert sum("COULD NOT BE SAVED" in line and "No space left" in line for line in lines) == 2
    assert names(tmp_path) == ["checkpoint-2.pth"]


@pytest.mark.parametrize("mode", ["on", "off"])
def test_folder_that_vanishes_for_a_while_is_not_made_anew(mode, tmp_path):
    """As a mount that is lost: what was written in its place would be on another disk, and below it later."""
    folder, elsewhere = tmp_path / "mount" / "run", tmp_path / "elsewhere"
    folder.mkdir(parents=True)
    one = saver(folder, async_save=mode)
    one.save_epoch(0)
    one.writer.wait()
    folder.rename(elsewhere)
    with project_log() as lines:
        one.save_epoch(1)
        one.writer.wait()
    assert any("COULD NOT BE SAVED" in line and "No such file" in line for line in lines)
    assert not folder.exists()
    elsewhere.rename(folder)
    one.save_epoch(2)
    one.writer.wait()
    assert names(folder) == ["checkpoint-0.pth", "checkpoint-2.pth"]


def test_end_of_the_run_is_tried_until_it_is_saved_or_refused(tmp_path, monkeypatch):
    write, tries = files.save, []

    def third_time(path, state):
        tries.append(path)
        if len(tries) < 3:
            raise OSError(28, "No space left on device")
        write(path, state)

    monkeypatch.setattr(files, "save", third_time)
    monkeypatch.setattr(running, "LAST_TRIES_SECONDS", (0, 0))
    with saver(tmp_path) as one:
        one.save_epoch(5)
    assert names(tmp_path) == ["checkpoint-5.pth"]
    tries[:] = []
    monkeypatch.setattr(running, "LAST_TRIES_SECONDS", (0,))
    with pytest.raises(NotSavedError, match="could not be saved"), saver(tmp_path) as one:
        one.save_epoch(5)


def test_best_is_known_where_only_another_try_could_save_it(tmp_path, monkeypatch):
    write, fails = files.save, [True]
    monkeypatch.setattr(running, "LAST_TRIES_SECONDS", (0,))
    with saver(tmp_path) as one:
        one.save_epoch(0, accuracy=50.0)
        monkeypatch.setattr(files, "save", lambda *of: 1 / 0 if fails and fails.pop() else write(*of))
        one.save_epoch(5, accuracy=90.0)
    assert os.readlink(tmp_path / "checkpoint-best.pth") == "checkpoint-5.pth"
    assert load(tmp_path / "checkpoint-5.pth")["best"] == (90.0, 5)


def test_best_is_known_where_a_stalled_write_kept_it_from_being_saved(tmp_path, monkeypatch):
    with saver(tmp_path) as one, monkeypatch.context() as patch:
        one.save_epoch(4, accuracy=50.0)
        patch.setattr(one.writer, "wait", lambda *_: False)
        one.save_epoch(5, accuracy=90.0)
        one.writer.failed = True
        monkeypatch.setattr(running, "LAST_TRIES_SECONDS", (0,))
    assert os.readlink(tmp_path / "checkpoint-best.pth") == "checkpoint-5.pth"


def test_a_new_file_s_name_is_flushed_too(tmp_path, monkeypatch):
    flush, folders = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda file: folders.append(os.path.isdir(f"/dev/fd/{file}")) or flush(file))
    save(tmp_path / "checkpoint-0.pth", {"model": {}})
    assert folders == [False, True]


@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.parametrize("error", [MemoryError, ValueError, OSError])
def test_whatever_ends_a_write_the_run_knows(mode, error, tmp_path, monkeypatch):
    def fail(path, state):
        raise error("no luck")

    monkeypatch.setattr(files, "save", fail)
    monkeypatch.setattr(running, "LAST_TRIES_SECONDS", ())
    with pytest.raises(NotSavedError), saver(tmp_path, async_save=mode) as one:
        one.save_epoch(5)


def test_write_that_stalls_costs_its_save_and_not_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "save", lambda path, state: time.sleep(0.5))
    one = saver(tmp_path, async_save="on", dist_timeout=0.001)
    with project_log() as lines:
        one.save_epoch(0)
        one.save_epoch(1)
    assert any("STILL WRITING" in line for line in lines) and one.writer.failed
    one.writer.writing.join()


def test_save_behind_a_write_that_stalls_waits_for_it_once(tmp_path):
    """Half of --dist_timeout: the other ranks wait for the whole of it."""
    one, waits = saver(tmp_path, dist_timeout=10.0), []
    one.writer.writing = argparse.Namespace(join=waits.append, is_alive=lambda: True)
    one.save_epoch(0, accuracy=50.0)
    assert waits == [300.0] and one.writer.failed and names(tmp_path) == []
    one.writer.writing.is_alive = lambda: False
    one.save_epoch(1, accuracy=40.0)
    assert load(tmp_path / "checkpoint-1.pth")["best"] == (40.0, 1), "the best of what is saved"


def test_copy_of_what_is_not_on_a_gpu_is_done_when_it_returns(tmp_path, monkeypatch):
    """On mps, too, a copy that does not block would still be under way when the thread writes it."""
    one, copy, asked = saver(tmp_path), torch.Tensor.copy_, []
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, source, non_blocking: asked.append(non_blocking) or copy(self, source)
    )
    one.writer._copy(one.model.state_dict())
    assert asked == [False, False]


def original_file(path: Path, model: nn.Module, **more) -> None:
    """As the original code writes: groups that know no `fused`, and another weight decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01, foreach=False)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"] = [
        {key: group[key] for key in ("params", "lr", "betas", "eps", "weight_decay")} for group in state["param_groups"]
    ]
    torch.save({"model": model.state_dict(), "optimizer": state, "epoch": 3, **more}, path)


def test_rollback_loads_as_resuming_does(tmp_path):
    original_file(tmp_path / "checkpoint-3.pth", nn.Linear(3, 2))  # and it has no loss scaler
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3, fused=True)
    step = Step(model, optimizer, ENV.device)
    one = Run(ENV, options(tmp_path), model, step)
    assert one._roll_back()
    saved = load(tmp_path / "checkpoint-3.pth")
    assert_same(dict(model.state_dict()), saved["model"])
    assert_same(optimizer.state[model.weight]["exp_avg"], saved["optimizer"]["state"][0]["exp_avg"])
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    step(lambda: model(torch.ones(1, 3)).sum(), update=True)
    assert optimizer.state[model.weight]["step"] == 2


def test_rollback_finds_nothing_in_a_file_of_weights_alone(tmp_path):
    empty(tmp_path, "checkpoint-3.pth")
    assert not saver(tmp_path)._roll_back()


# what is kept


def test_old_files_go_also_where_no_links_can_be_made(tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    one = saver(tmp_path, keep_last=2)
    with project_log() as lines:
        for epoch in range(5):
            one.save_epoch(epoch, accuracy=10.0 + epoch)
    assert names(tmp_path) == ["checkpoint-3.pth", "checkpoint-4.pth"]
    assert sum("checkpoint-best.pth" in line and "not permitted" in line for line in lines) == 5


def test_keep_last_keeps_milestones_the_best_and_the_newest(tmp_path):
    one = saver(tmp_path, keep_last=2, epochs=100, milestones=4)
    for epoch in range(11):
        one.save_epoch(epoch, accuracy=90.0 if epoch == 5 else 10.0 + epoch)
    assert names(tmp_path) == sorted(
        [f"checkpoint-{epoch}.pth" for epoch in (0, 4, 5, 8, 9, 10)] + ["checkpoint-best.pth"]
    )
    assert os.readlink(tmp_path / "checkpoint-best.pth") == "checkpoint-5.pth"
    assert load(tmp_path / "checkpoint-best.pth")["epoch"] == 5
    assert load(tmp_path / "checkpoint-10.pth")["max_accuracy"] == 90.0


def test_without_keep_last_all_epochs_stay(tmp_path):
    one = saver(tmp_path, epochs=100)
    for epoch in range(6):
        one.save_epoch(epoch)
    assert len(names(tmp_path)) == 6


def test_partial_files_are_replaced_but_two_files_always_stay(tmp_path):
    one = saver(tmp_path, keep_last=1)
    for epoch, iteration in ((0, 2), (0, 4), (0, 6)):
        read(one, epoch, iteration)
        one.save_part()
    assert names(tmp_path) == ["partial-0-4.pth", "partial-0-6.pth"]
    one.save_epoch(0)
    assert names(tmp_path) == ["checkpoint-0.pth", "partial-0-6.pth"]
    one.save_epoch(1)
    assert names(tmp_path) == ["checkpoint-0.pth", "checkpoint-1.pth"]
    read(one, 2, 2)
    one.save_part()
    assert names(tmp_path) == ["checkpoint-1.pth", "partial-2-2.pth"]


def test_going_back_by_hand_removes_nothing_newer_and_says_so(tmp_path):
    one = saver(tmp_path, keep_last=1)
    for epoch in range(4):
        one.save_epoch(epoch)
    empty(tmp_path, "checkpoint-0.pth")
    before = names(tmp_path)
    with project_log() as lines:
        resumed(tmp_path, resume=str(tmp_path / "checkpoint-2.pth"))
    assert any("1 newer checkpoints, up to checkpoint-3.pth" in line for line in lines)
    again = saver(tmp_path, keep_last=1)
    read(again, 3, 1)
    again.save_part()
    assert set(before) - {"checkpoint-0.pth"} <= set(names(tmp_path))


def test_saves_come_after_minutes(tmp_path):
    one = saver(tmp_path, save_minutes=0.15 / 60)
    read(one, 0, 1)
    assert not one.due()
    time.sleep(0.2)
    assert one.due()
    one.save_part()
    assert not one.due()
    state = load(tmp_path / "partial-0-1.pth")
    assert state["iteration"] == 1 and state["epoch"] == 0
    assert state["progress"] == {"sums": {"loss": 1.5, "lr": 0.5}, "counts": {"loss": 1, "lr": 1}}


def test_half_written_files_of_a_killed_process_are_cleared(tmp_path):
    for name in ("checkpoint-7.tmp", "partial-7-3.tmp", "notes.tmp"):
        (tmp_path / name).write_bytes(b"half")
    saver(tmp_path)
    assert names(tmp_path) == ["notes.tmp"]


def test_disk_without_room_for_a_checkpoint_is_refused_and_a_small_one_is_named(tmp_path, monkeypatch):
    free = [90]  # 8 numbers of 4 bytes, three times, are 96
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: argparse.Namespace(free=free[0]))
    with pytest.raises(UserError, match="0.0 GB free"):
        saver(tmp_path)
    free[0] = 300
    with project_log() as lines:
        saver(tmp_path)
    assert any("make room, or see --keep_last" in line for line in lines)
    free[0] = 1000
    with project_log() as lines:
        saver(tmp_path)
    assert not lines


# finding


def test_newest_goes_by_position_and_ignores_strangers(tmp_path):
    assert newest(tmp_path) is None and newest(tmp_path / "nowhere") is None
    strangers = ["checkpoint-best.pth", "checkpoint-99.tmp", "checkpoint-77.pth.bak", "my-checkpoint-88.pth"]
    empty(tmp_path, *strangers, "checkpoint-9.pth", "checkpoint-10.pth", "checkpoint-2.pth")
    assert newest(tmp_path) == newest(str(tmp_path)) == tmp_path / "checkpoint-10.pth"
    empty(tmp_path, "partial-10-999.pth")  # of the epoch that has ended
    assert newest(tmp_path) == tmp_path / "checkpoint-10.pth"
    empty(tmp_path, "partial-11-20.pth", "partial-11-100.pth")
    assert newest(tmp_path) == tmp_path / "partial-11-100.pth"
    os.utime(tmp_path / "checkpoint-2.pth")  # dates don't count
    assert newest(tmp_path) == tmp_path / "partial-11-100.pth"


def flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "zero bytes": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "text": lambda path: path.write_text("hello"),
    # torch's own reader would take this one
    "one bit in the weights": lambda path: flip(path, path.read_bytes().index(torch.full((4,), 7.0).numpy().tobytes())),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_newest_falls_back_to_the_one_before_it_and_says_so(name, tmp_path):
    for epoch in (1, 2):
        save(tmp_path / f"checkpoint-{epoch}.pth", {"model": {"weight": torch.full((100,), 7.0)}})
    DAMAGE[name](tmp_path / "checkpoint-2.pth")
    with project_log() as lines:
        assert newest(tmp_path) == tmp_path / "checkpoint-1.pth"
    (line,) = lines
    assert "DAMAGED" in line and "checkpoint-2.pth" in line
    DAMAGE[name](tmp_path / "checkpoint-1.pth")
    with pytest.raises(UserError, match="all 2 checkpoints"):
        newest(tmp_path)


def test_checkpoint_that_cannot_be_read_is_no_damaged_one(tmp_path):
    """On a disk that fails for a while, going back would throw away good work."""
    empty(tmp_path, "checkpoint-1.pth")
    (tmp_path / "checkpoint-2.pth").symlink_to(tmp_path / "checkpoint-2.pth")  # opening it fails, even for root
    with pytest.raises(UserError, match="cannot be read"):
        newest(tmp_path)


@pytest.mark.parametrize("name", ["checkpoint-0.pth", "partial-0-20.pth", "log.txt"])
def test_second_run_into_a_folder_is_refused(name, tmp_path):
    (tmp_path / "train.log").touch()
    refuse_second_run(ENV, str(tmp_path), "")
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{name}.*--resume auto"):
        refuse_second_run(ENV, str(tmp_path), "")
    refuse_second_run(ENV, str(tmp_path), "auto")
    refuse_second_run(ENV, "", "")


# resuming


def resumed(folder: Path | str, model: nn.Module | None = None, optimizer=None, env: Dist = ENV, **more) -> Start:
    model = model or nn.Linear(3, 2)
    return resume(env, options(folder, **more), model, optimizer or trained(model), scaler())


def written(path: Path, model: nn.Module, **more) -> str:
    torch.save({"model": model.state_dict(), **more}, path)
    return str(path)


def test_resuming_restores_everything_and_returns_the_next_epoch(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = trained(model)
    path = written(
        tmp_path / "c.pth", model, optimizer=optimizer.state_dict(), epoch=7, scaler=scaler(32.0).state_dict()
    )
    other, other_scaler = nn.Linear(3, 2), scaler(2.0)
    other_optimizer = torch.optim.AdamW(other.parameters(), weight_decay=0.3)
    assert resume(ENV, options(tmp_path, resume=path), other, other_optimizer, other_scaler) == Start(8)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    assert_same(other_optimizer.state_dict()["state"], optimizer.state_dict()["state"])
    assert other_optimizer.param_groups[0]["weight_decay"] == 0.3, "options are those of the run that goes on"
    assert other_scaler.get_scale() == 32.0


def test_resuming_released_weights_loads_the_model_and_starts_at_0(tmp_path):
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    assert resumed(tmp_path, other, resume=written(tmp_path / "b.pth", model)) == Start(0)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def test_start_epoch_holds_where_the_file_tells_none(tmp_path):
    assert resumed(tmp_path, resume=written(tmp_path / "b.pth", nn.Linear(3, 2)), start_epoch=2) == Start(2)


def test_best_of_another_folder_is_not_this_run_s(tmp_path):
    (tmp_path / "old").mkdir()
    saver(tmp_path / "old").save_epoch(1, accuracy=50.0)
    path = str(tmp_path / "old" / "checkpoint-1.pth")
    assert resumed(tmp_path, resume=path) == Start(2, Part(), 50.0, None)
    assert resumed(tmp_path / "old", resume=path).best == (50.0, 1)


def test_other_numbers_of_training_images_are_named(tmp_path):
    saver(tmp_path, n_images=24).save_epoch(0)
    for n_images, named in ((24, False), (12, True), (None, False)):
        model = nn.Linear(3, 2)
        with project_log() as lines:
            resume(ENV, options(tmp_path, resume="auto"), model, trained(model), scaler(), n_images)
        assert any("12 training images, so another order (was 24)" in line for line in lines) == named


def test_all_ranks_hear_from_rank_0_whether_there_is_something_to_resume(tmp_path, monkeypatch):
    """On a network disk one may see a file that another does not yet."""
    monkeypatch.setattr(util.run.resume, "on_main", lambda env, look: ["said by rank 0", look()])
    args = options(tmp_path, resume="auto")
    assert will_resume(ENV, args) == ["said by rank 0", False]
    saver(tmp_path).save_epoch(0)
    assert will_resume(ENV, args) == ["said by rank 0", True]
    assert will_resume(ENV, options("", resume="auto")) == ["said by rank 0", False]
    assert will_resume(ENV, options(tmp_path, resume="x.pth")) is True
    assert will_resume(ENV, options(tmp_path, resume="")) is False


def test_weights_to_start_from_need_not_be_there_when_a_run_goes_on(images, tmp_path):  # noqa: F811
    for name, args in (("finetune", FINETUNE), ("linprobe", LINPROBE)):
        start = (*args, "--data_path", images, "--finetune", tmp_path / "b.pth")
        torch.save({"model": models_vit.vit_tiny_patch4(num_classes=3).state_dict()}, tmp_path / "b.pth")
        train(name, tmp_path / name, *start, "--global_pool" if name == "finetune" else "--cls_token", "--epochs", 1)
        (tmp_path / "b.pth").unlink()
        said = train(name, tmp_path / name, *start, "--epochs", 2, "--resume", "auto")
        assert "loaded pretrained" in said and "goes on at epoch 1" in said
        with pytest.raises(UserError, match="no checkpoint"):
            train(name, tmp_path / "fresh", *start, "--epochs", 1, "--resume", "auto")


def test_auto_takes_the_newest_or_starts_afresh(tmp_path):
    assert resumed(tmp_path, resume="auto", start_epoch=3) == Start(3)
    assert resumed("", resume="auto") == Start(0)
    one = saver(tmp_path)
    one.save_epoch(1, accuracy=50.0)
    read(one, 2, 6)
    one.save_part()
    start = resumed(tmp_path, resume="auto")
    assert start == Start(2, Part(6, {"loss": 1.5, "lr": 0.5}, {"loss": 6.0, "lr": 6.0}), 50.0, (50.0, 1))
    assert start.part_of(2).iteration == 6 and start.part_of(3) == Part()


@pytest.mark.parametrize(
    ("batch_size", "accum_iter", "world_size", "iteration"),
    [(4, 2, 1, 6), (8, 1, 1, 3), (1, 4, 2, 12), (2, 2, 2, 6), (4, 4, 1, 4), (2, 1, 1, 12)],
)
def test_position_is_kept_when_the_batch_is_cut_otherwise(batch_size, accum_iter, world_size, iteration, tmp_path):
    """6 batches of 4 are done, 2 a step: 24 images. The last two cases change the effective batch."""
    one = saver(tmp_path, accum_iter=2)
    read(one, 2, 6)
    one.save_part()
    cut = {"batch_size": batch_size, "accum_iter": accum_iter}
    with project_log() as lines:
        start = resumed(tmp_path, env=Dist(torch.device("cpu"), world_size=world_size), resume="auto", **cut)
    assert start.part.iteration == iteration
    assert start.part.sums["loss"] / start.part.counts["loss"] == pytest.approx(1.5 / 6)
    kept = batch_size * accum_iter * world_size == 8
    assert any("effective batch" in line for line in lines) != kept


def test_options_that_change_the_mathematics_are_named_and_others_not(tmp_path):
    shown = {"knn_every": 0, "picture_every": 20, "val_split": "val"}
    saver(tmp_path, blr=0.1, mask_ratio=0.75, num_workers=1, **shown).save_epoch(0)
    with project_log() as lines:
        resumed(tmp_path, resume="auto", blr=0.2, mask_ratio=0.75, num_workers=4, epochs=9)
    (line,) = [line for line in lines if "differs" in line]
    assert "--blr 0.2 (was 0.1)" in line and "--epochs 9 (was 6)" in line
    assert "mask_ratio" not in line and "num_workers" not in line
    with project_log() as lines:
        shown = {"knn_every": 5, "picture_every": 0, "val_split": "test"}
        resumed(tmp_path, resume="auto", blr=0.1, mask_ratio=0.75, num_workers=4, **shown)
    assert not any("differs" in line for line in lines)


def test_another_size_is_refused_even_where_it_has_as_many_patches(tmp_path):
    saver(tmp_path, input_size=(16, 64)).save_epoch(0)
    with pytest.raises(UserError, match=r"--input_size \(16, 64\), not 32"):
        resumed(tmp_path, resume="auto")
    resumed(tmp_path, resume="auto", input_size=(16, 64))


def test_optimizer_of_other_groups_is_refused(tmp_path):
    model = nn.Linear(3, 2)
    path = written(tmp_path / "c.pth", model, optimizer=trained(model, groups=2).state_dict(), epoch=7)
    with pytest.raises(UserError, match="other parameter groups") as error:
        resumed(tmp_path, model, resume=path)
    assert path in error.value.message and "--layer_decay" in error.value.message


class Tiny(models_vit.VisionTransformer):
    """As wide as it has classes, so that a head's bias and a norm's weight have one shape."""

    def __init__(self, pool: bool = True) -> None:
        super().__init__(img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=8, global_pool=pool)


def recorded_groups(recipe: dict, model: nn.Module, first: bool = False) -> list[dict]:
    """Groups in the original's order; with `first` as this project wrote them in the beginning."""
    recorded = {
        name: how for name, how in recipe["layer_decay/base_patch16/0.75"].items() if name in model.state_dict()
    }
    if first:
        norm = {name: recorded.pop(name) for name in ("fc_norm.weight", "fc_norm.bias")}
        head = {name: recorded.pop(name) for name in ("head.bias", "head.weight")}
        recorded |= norm | head
    groups: dict[tuple, list] = {}
    for name, how in recorded.items():
        groups.setdefault(tuple(how), []).append(model.get_parameter(name))
    return [{"params": params, "weight_decay": decay} for (_, decay), params in groups.items()]


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {name: optimizer.state[param]["exp_avg"] for name, param in model.named_parameters()}


def stepped(model: nn.Module, groups: list[dict]) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    return optimizer


def decayed(model: nn.Module) -> list[dict]:
    return param_groups_lrd(model, 0.05, model.no_weight_decay(), 0.75)


@pytest.mark.parametrize("first", [False, True])
def test_classifier_of_the_original_or_of_our_first_files_goes_on_with_each_moment_in_its_place(
    first, recipe, tmp_path
):
    model, other = Tiny(), Tiny()
    old = stepped(model, recorded_groups(recipe, model, first))
    path = written(tmp_path / "c.pth", model, optimizer=old.state_dict(), epoch=7)
    new = stepped(other, decayed(other))
    assert resumed(tmp_path, other, new, resume=path) == Start(8)
    assert_same(moments(other, new), moments(model, old))
    assert new.param_groups[-2]["weight_decay"] == 0.05 and new.param_groups[-1]["weight_decay"] == 0


def test_original_goes_on_with_our_classifier(recipe):
    """It loads as torch does, by number."""
    model, other = Tiny(), Tiny()
    ours, theirs = stepped(model, decayed(model)), torch.optim.AdamW(recorded_groups(recipe, other))
    theirs.load_state_dict(ours.state_dict())
    assert_same(moments(other, theirs), moments(model, ours))


def test_classifier_with_class_token_has_the_order_that_it_always_had():
    model = Tiny(pool=False)
    names = {param: name for name, param in model.named_parameters()}
    assert [[names[param] for param in group["params"]] for group in decayed(model)][-2:] == [
        ["norm.weight", "norm.bias", "head.bias"], ["head.weight"],
    ]  # fmt: skip
    probe = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2))
    assert [name for name, _ in probe.named_parameters()] == ["1.weight", "1.bias"]


# parameters frozen by hand


def frozen(*layers: int) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    for layer in layers:
        model[layer].requires_grad_(False)
    return model


def trained_groups(model: nn.Module) -> torch.optim.Optimizer:
    return stepped_alone(torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=0.01))


def stepped_alone(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn_like(param)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(("here", "words"), [
    ((0, 1), None),
    ((), "4 only here, such as '0.bias'"),
    ((0,), "trained 4 parameters, here 6: 2 only here, such as '1.bias'"),
    ((0, 1, 2), "2 only there, such as '2.bias'"),
    ((2, 3), "4 only there, such as '2.bias', 4 only here, such as '0.bias'"),  # the same groups and shapes
])  # fmt: skip
@pytest.mark.parametrize("named", [True, False])
def test_parameters_frozen_by_hand_are_to_be_frozen_again(here, words, named, tmp_path):
    model, other = frozen(0, 1), frozen(*here)
    step = Step(model, trained_groups(model), ENV.device)
    Run(ENV, options(tmp_path), model, step).save_epoch(0)
    path = tmp_path / "checkpoint-0.pth"
    if not named:  # as earlier files
        state = load(path)
        del state["trained"]
        torch.save(state, path)
        words = words and (None if len(here) == 2 else "other parameter groups: 4 parameters")
    if words is None:
        assert resumed(tmp_path, other, trained_groups(other)) == Start(1)
        return
    with pytest.raises(UserError, match=re.escape(words)) as error:
        resumed(tmp_path, other, trained_groups(other))
    assert "same" in error.value.message and str(path) in error.value.message


# what no run has written


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def with_itself() -> list:
    value: list = []
    value.append(value)
    return value


BIG, LONG, ESCAPES = 10**400, "x" * 10**6, "\x1b[31m\x07\x9b1m\u202e\n\r" * 9
NOT_PLAIN = {
    "cyclic": with_itself, "deep": lambda: nested(2000), "a big number": lambda: BIG, "bigger": lambda: 10**5000,
    "a tensor": lambda: torch.zeros(3), "meta": lambda: torch.empty(3, device="meta"), "long": lambda: LONG,
    "escapes": lambda: ESCAPES, "none": lambda: None, "nan": lambda: float("nan"), "a set": lambda: {1, 2},
    "complex": lambda: 1j, "a dict": lambda: {ESCAPES: LONG}, "negative": lambda: -1, "bytes": lambda: b"7",
    "a moment": lambda: torch.zeros(2, 3),
}  # fmt: skip
ODD_TENSORS = {
    "meta": lambda moment: torch.empty_like(moment, device="meta"),
    "sparse": lambda moment: moment.to_sparse(),
    "compressed": lambda moment: moment.to_sparse_csr(),
    "quantized": lambda moment: torch.quantize_per_tensor(moment, 0.1, 0, torch.qint8),
    "complex": lambda moment: moment.to(torch.complex64),
    "whole": lambda moment: moment.long(),
    "truth": lambda moment: moment > 0,
    "one number": lambda moment: moment[:1, :1].clone(),
    "no dimensions": lambda moment: moment.sum(),
    "expanded": lambda moment: torch.zeros(1, 1).expand(10**6, 10**6),
    "flat": lambda moment: moment.flatten(),
    "nan": lambda moment: moment * float("nan"),
    "inf": lambda moment: moment.double() / 0,
    "beyond float32": lambda moment: moment.double() + 1e300,
    "nested": lambda moment: torch.nested.nested_tensor(list(moment)),
    "many dimensions": lambda moment: moment.reshape(2, 3, *(1,) * 60),
}
PLACES = {
    "epoch": ("epoch",), "iteration": ("iteration",), "n_images": ("n_images",), "world_size": ("world_size",),
    "scale": ("scaler", "scale"), "sums": ("progress", "sums", "loss"), "counts": ("progress", "counts"),
    "best": ("best",), "max_accuracy": ("max_accuracy",), "trained": ("trained",), "args": ("args",),
    "batch_size": ("args", "batch_size"), "state": ("optimizer", "state"), "groups": ("optimizer", "param_groups"),
    "params": ("optimizer", "param_groups", 0, "params"), "lr": ("optimizer", "param_groups", 0, "lr"),
    "of parameter 0": ("optimizer", "state", 0), "step": ("optimizer", "state", 0, "step"), "optimizer": ("optimizer",),
    "exp_avg": ("optimizer", "state", 0, "exp_avg"), "more": ("optimizer", "state", 0, ESCAPES),
}  # fmt: skip
# which of these a run may well have written, or which concern nobody
FINE = {
    ("n_images", "none"), ("best", "none"), ("trained", "none"), ("more", "none"), ("more", "a big number"),
    ("more", "long"), ("more", "escapes"), ("more", "negative"), ("more", "nan"), ("more", "a tensor"),
    ("more", "a moment"), ("max_accuracy", "negative"), ("lr", "negative"), ("sums", "negative"),
    ("exp_avg", "a moment"),
}  # fmt: skip


def odd(tmp_path: Path, place: tuple, change) -> Path:
    """A checkpoint within an epoch in which one thing is not as it should be."""
    model = nn.Linear(3, 2)
    state = {
        "model": model.state_dict(), "optimizer": trained(model).state_dict(), "epoch": 2, "iteration": 4,
        "scaler": scaler(8.0).state_dict(), "args": dict(OPTIONS), "world_size": 1, "n_images": 24,
        "progress": {"sums": {"loss": 1.5, "lr": 0.5}, "counts": {"loss": 4, "lr": 4}}, "max_accuracy": 50.0,
        "best": (50.0, 1), "trained": ["weight", "bias"],
    }  # fmt: skip
    *above, last = place
    inner = state
    for key in above:
        inner = inner[key]
    inner[last] = change(inner.get(last)) if isinstance(inner, dict) else change(inner[last])
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**5)  # of the file's writer
    torch.save(state, tmp_path / "odd.pth")
    sys.setrecursionlimit(limit)
    return tmp_path / "odd.pth"


def end_of_resuming(path: Path) -> str | None:
    """The message, one of bounded length that a terminal can show; None where the run goes on, and takes a step."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    try:
        with project_log() as lines:
            resume(ENV, options(path.parent, resume=str(path)), model, optimizer, scaler(), 24)
            stepped_alone(optimizer)
    except UserError as error:
        lines.append(error.message)
        return error.message
    finally:
        assert all(len(line) < 1500 and line.isprintable() for line in lines), lines
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", PLACES)
def test_training_state_of_odd_values_is_refused_in_one_message(place, tmp_path):
    for name, make in NOT_PLAIN.items():
        message = end_of_resuming(odd(tmp_path, PLACES[place], lambda _, make=make: make()))
        if (place, name) in FINE:
            assert message is None, (name, message)
        elif message is not None or place != "args":
            assert message and "odd.pth" in message, name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD_TENSORS)
def test_moment_of_another_kind_is_refused_by_name(name, tmp_path):
    for where in ("exp_avg", "exp_avg_sq"):
        message = end_of_resuming(odd(tmp_path, ("optimizer", "state", 0, where), ODD_TENSORS[name]))
        assert message and f"{where} of parameter 0" in message and "odd.pth" in message


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["step", "more"])
@pytest.mark.parametrize("name", ["meta", "sparse", "quantized", "complex", "expanded", "nan", "nested"])
def test_other_tensors_of_a_parameter_are_looked_at_too(name, where, tmp_path):
    """Also those that this optimizer does not know; nothing is made larger than it is in the file."""
    make = ODD_TENSORS[name]
    message = end_of_resuming(odd(tmp_path, ("optimizer", "state", 0, where), lambda _: make(torch.ones(2, 3))))
    assert message and "of parameter 0" in message and where in message


def test_tensors_of_one_storage_are_not_multiplied(tmp_path):
    shared = torch.zeros(1000)
    path = odd(tmp_path, ("optimizer", "state", 0), lambda state: {**state, **{f"m{i}": shared for i in range(1000)}})
    assert "fewer numbers are stored" in end_of_resuming(path)


def test_resuming_another_model_is_refused_naming_the_keys(tmp_path):
    path = written(tmp_path / "c.pth", nn.Linear(3, 2, bias=False))
    with pytest.raises(UserError, match="bias"):
        resumed(tmp_path, resume=path)


def test_optimizer_state_of_the_original_code_goes_on_in_a_fused_optimizer_under_loss_scaling(tmp_path):
    """Its groups know no `fused`; taken over as they are, they leave an optimizer that loss scaling cannot use."""
    model = nn.Linear(3, 2)
    old = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01, foreach=False)
    model(torch.ones(1, 3)).sum().backward()
    old.step()
    state = old.state_dict()
    state["param_groups"] = [
        {key: group[key] for key in ("params", "lr", "betas", "eps")} for group in state["param_groups"]
    ]
    args = argparse.Namespace(batch_size=64, input_size=32, blr=1e-3)
    torch.save({"model": model.state_dict(), "optimizer": state, "epoch": 3, "args": args}, tmp_path / "old.pth")

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3, fused=True)
    assert resumed(tmp_path, model, optimizer, resume=str(tmp_path / "old.pth")) == Start(4)
    (group,) = optimizer.param_groups
    assert group["fused"] and group["weight_decay"] == 0.3, "what the run asks for has its effect"
    assert_same(optimizer.state[model.weight]["exp_avg"], old.state[model.weight]["exp_avg"])
    loss_scaler = torch.amp.GradScaler("cpu")
    loss_scaler.scale(model(torch.ones(1, 3)).sum()).backward()
    loss_scaler.step(optimizer)
    loss_scaler.update()
    assert optimizer.state[model.weight]["step"] == 2


def test_log_txt_drops_the_epochs_that_are_done_again_and_half_a_line(tmp_path):
    path = tmp_path / "log.txt"
    lines = [json.dumps({"train_loss": 0.5, "epoch": epoch}) + "\n" for epoch in range(4)]
    path.write_text("".join(lines) + '{"train_loss": 0.1, "ep')
    RunLog(ENV, str(tmp_path), start_epoch=4)
    assert path.read_text() == "".join(lines)
    RunLog(ENV, str(tmp_path), start_epoch=2).write({"epoch": 2})
    assert path.read_text() == "".join(lines[:2]) + '{"epoch": 2}\n'


def test_log_txt_takes_what_is_found_out_after_its_line_was_written(tmp_path):
    run_log = RunLog(ENV, str(tmp_path))
    for epoch in range(3):
        run_log.write({"train_loss": 0.5, "epoch": epoch})
        run_log.add_to_last({"knn_acc1": 7.0} if epoch == 1 else {})
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert lines[1] == {"train_loss": 0.5, "epoch": 1, "knn_acc1": 7.0} and "knn_acc1" not in lines[2]


def test_log_txt_waits_for_a_disk_that_is_full(tmp_path, monkeypatch):
    run_log = RunLog(ENV, str(tmp_path))
    run_log.epochs.path = Path("/dev/full")
    with project_log() as lines:
        run_log.write({"epoch": 0})
    assert any("CANNOT BE WRITTEN" in line for line in lines)
    run_log.epochs.path = tmp_path / "log.txt"
    run_log.write({"epoch": 1})
    assert run_log.epochs.path.read_text() == '{"epoch": 0}\n{"epoch": 1}\n'


# what a run was


def test_every_start_is_recorded(images, tmp_path):  # noqa: F811
    args = (*PRETRAIN, "--data_path", images, "--epochs", 1, "--seed", 7)
    train("pretrain", tmp_path, *args)
    train("pretrain", tmp_path, *args, "--resume", "auto")
    first, second = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert first["args"]["seed"] == 7 and (first["args"]["resume"], second["args"]["resume"]) == ("", "auto")
    assert first["command"] == sys.argv and first["versions"]["torch"] == torch.__version__
    assert first["hosts"] == [f"{socket.gethostname()}: cpu"]
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (first["git"] or {"revision": ""})["revision"] == head


# images that fail


@pytest.mark.parametrize("how", ["truncated", "deleted"])
def test_image_that_fails_after_listing_is_named_or_skipped_and_counted(how, tmp_path):
    for i in range(4):
        write_image(tmp_path / f"{i}.jpg", i)
    files, bad = list_images(tmp_path), tmp_path / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:300]) if how == "truncated" else bad.unlink()
    with pytest.raises(UserError, match="1.jpg.*--skip_bad_images"):
        Images(files, eval_transform(32))[1]
    skipping = Images(files, eval_transform(32), skip_bad=True)
    assert torch.equal(torch.as_tensor(skipping[1][0]), torch.as_tensor(skipping[2][0]))
    with project_log() as lines:
        report_bad(skipping)
    assert "skipped 1 images" in lines[0] and str(bad) in lines[0]


# a run that is stopped within an epoch, by the script's own way


def stop_at(monkeypatch, *calls: int) -> None:
    """As if SIGTERM came before the given questions, counted over this process's life."""
    ask, count = running.Signals.ask, [0]

    def asked(self, save, **when):
        count[0] += 1
        if count[0] in calls:
            self.seen[15] = 0.0
        return ask(self, save, **when)

    monkeypatch.setattr(running.Signals, "ask", asked)


RUNS = {
    "pretrain": (*PRETRAIN, "--norm_pix_loss", "--accum_iter", 2, "--batch_size", 2, "--epochs", 2),
    "finetune": (*FINETUNE, "--epochs", 2, "--drop_path", 0.2),
    "linprobe": (*LINPROBE, "--epochs", 2),
}
# 12 batches, 2 a step, in pretraining; 6 batches and an evaluation in the others
STOPS = {"pretrain": (1, 4, 6), "finetune": (2, 6, 6), "linprobe": (6, 7)}
LEFT = {
    "pretrain": ["partial-0-2.pth", "partial-0-10.pth", "partial-1-10.pth"],
    "finetune": ["partial-0-2.pth", "partial-1-1.pth", "partial-1-6.pth"],
    "linprobe": ["partial-0-6.pth", "partial-1-6.pth"],
}


@pytest.mark.parametrize("name", RUNS)
def test_run_stopped_within_epochs_ends_bit_for_bit_as_the_one_without_a_stop(name, images, tmp_path, monkeypatch):  # noqa: F811
    args = (*RUNS[name], "--data_path", images, "--save_every", 1)
    train(name, tmp_path / "whole", *args)
    for stop, left in zip(STOPS[name], LEFT[name], strict=True):
        with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
            stop_at(patch, stop)
            train(name, tmp_path / "parts", *args, "--resume", "auto")
        assert stopped.value.exit_code == 75 and stopped.value.signals == {15}
        assert list(checkpoints(tmp_path / "parts").values())[-1].name == left
    train(name, tmp_path / "parts", *args, "--resume", "auto")
    for epoch in (0, 1):
        whole, parts = (load(tmp_path / which / f"checkpoint-{epoch}.pth") for which in ("whole", "parts"))
        for key in whole.keys() - {"args"}:
            assert_same(whole[key], parts[key], key)
    assert log_txt(tmp_path / "whole") == log_txt(tmp_path / "parts")


SMALL = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
EARLIER = {  # script -> file, its options; what they had been is in the file's `args`
    "pretrain": ("partial-1-2.pth", ("--norm_pix_loss",)),
    "finetune": ("checkpoint-0.pth", ("--nb_classes", 3, "--drop_path", 0.2, "--aa", "")),
}


@pytest.mark.parametrize("name", EARLIER)
def test_checkpoint_of_an_earlier_revision_goes_on_as_it_did_there(name, golden, tmp_path, monkeypatch):
    """The files, and the weights in which they ended, are those of revision 37b8df4, whose groups had another order."""
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    monkeypatch.setitem(models_mae.MODELS, "small", partial(models_mae.MaskedAutoencoderViT, **SMALL, **decoder))
    monkeypatch.setitem(models_vit.MODELS, "small", partial(models_vit.VisionTransformer, **SMALL))
    file, more = EARLIER[name]
    (tmp_path / "run").mkdir()
    shutil.copy(GOLDEN / f"resume_{name}.pth", tmp_path / "run" / file)
    given = (
        "--model small --input_size 16 --batch_size 4 --num_workers 0 --epochs 2 --warmup_epochs 1 --blr 0.1".split()
    )
    given += [
        "--data_path",
        write_image_folder(tmp_path / "images", n_train=4, n_val=1),
        "--resume",
        "auto",
        "--blr",
        0.1,
        *more,
    ]
    said = train(name, tmp_path / "run", *given, *ON_CPU)
    assert "goes on at epoch 1" in said and "differs" not in said
    state, data = load(tmp_path / "run" / "checkpoint-1.pth"), golden(f"resume_{name}")
    assert state["optimizer"]["state"][0]["step"] == data["step/0"].item()
    expected = data.group("model")
    assert state["model"].keys() == expected.keys()
    for (
        key,
        value,
    ) in expected.items():  # in float32, whose sums end differently with the release of torch and the processor
        found = state["model"][key]
        if key.endswith("attn.qkv.bias"):  # the keys' have no gradient but rounding, which Adam makes steps of lr from
            (*found, keys), (*value, their_keys) = ((q, v, k) for q, k, v in (found.chunk(3), value.chunk(3)))
            steps = state["optimizer"]["state"][0]["step"].item()
            assert (keys - their_keys).abs().max() <= 2 * steps * 0.1 * 4 / 256, key  # two ways of the highest rate
        assert_close(found, value, rtol=0, atol=1e-6, msg=key)


def test_run_goes_on_at_the_same_image_when_the_batch_is_cut_otherwise(images, tmp_path, monkeypatch):  # noqa: F811
    """As on another number of processes: every image once an epoch, in the order of the run without a stop."""
    iterate, taken = datasets.TrainSampler.__iter__, []

    def noted(self):
        for batch in iterate(self):
            taken.extend(batch)
            yield batch

    monkeypatch.setattr(datasets.TrainSampler, "__iter__", noted)
    args = (*PRETRAIN, "--data_path", images, "--epochs", 2, "--resume", "auto")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 2)  # of 6 steps of 4 images
        train("pretrain", tmp_path, *args, "--batch_size", 2, "--accum_iter", 2)
    said = train("pretrain", tmp_path, *args, "--batch_size", 1, "--accum_iter", 4)
    assert "goes on at epoch 0, batch 8" in said and "effective batch 4 (was" not in said
    assert taken == [(epoch, index) for epoch in (0, 1) for index in image_order(0, epoch, 24)]
    assert load(tmp_path / "checkpoint-1.pth")["optimizer"]["state"][0]["step"] == 12


def test_evaluation_ends_at_the_first_batch_after_a_signal(tmp_path):
    one, batches = saver(tmp_path), []
    read(one, 3, 7)

    def model(imgs):
        batches.append(imgs)
        one.signals.seen[15] = 0.0
        return torch.zeros(len(imgs), 3)

    model.eval, model.buffers = lambda: None, lambda: []
    loader = [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))] * 5
    with pytest.raises(Stopped) as stopped:
        evaluate(model, loader, ENV, None, sharded=False, run=one)
    assert len(batches) == 1 and stopped.value.exit_code == 75
    assert names(tmp_path) == ["partial-3-7.pth"], "the epoch's training is done, its evaluation is not"


def test_max_accuracy_is_carried_over(images, tmp_path):  # noqa: F811
    args = (*CLASSIFY, "--blr", 1.0, "--data_path", images)
    train("linprobe", tmp_path, *args, "--epochs", 1)
    path = tmp_path / "checkpoint-0.pth"
    state = load(path)
    assert state["best"] == (state["max_accuracy"], 0)
    torch.save({**state, "max_accuracy": 99.5, "best": (99.5, 0)}, path)
    said = train("linprobe", tmp_path, *args, "--epochs", 2, "--resume", "auto")
    assert re.findall("Max accuracy: .*", said)[-1] == "Max accuracy: 99.50%"
    assert os.readlink(tmp_path / "checkpoint-best.pth") == "checkpoint-0.pth"
    assert load(tmp_path / "checkpoint-1.pth")["max_accuracy"] == 99.5
    assert checkpoints(tmp_path).keys() == {(1, 0), (2, 0)}


def test_scripts_refuse_a_folder_that_holds_a_run_before_they_look_at_the_data(tmp_path):
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n')
    args = main_pretrain.get_args_parser().parse_args(["--output_dir", str(tmp_path), "--data_path", "/nowhere"])
    with pytest.raises(UserError, match="holds a run already"):
        main_pretrain.main(args)
    logging.getLogger("mae").handlers.clear()


def test_parts_frozen_by_hand_stay_so_in_every_start(images, tmp_path, monkeypatch):  # noqa: F811
    """At the place that main_finetune.py names, whether the weights come from --finetune or from --resume."""
    source = (ROOT / "main_finetune.py").read_text()
    place = re.search(r"\n    # every start passes here.*\n", source)
    edited = ModuleType("edited")
    exec(source.replace(place[0], "\n    model.blocks[:2].requires_grad_(False)\n"), edited.__dict__)
    monkeypatch.setitem(MAINS, "edited", edited)
    torch.save({"model": models_vit.vit_tiny_patch4(num_classes=3).state_dict()}, tmp_path / "b.pth")
    args = (*FINETUNE, "--data_path", images, "--finetune", tmp_path / "b.pth", "--cls_token")
    train("edited", tmp_path / "parts", *args, "--epochs", 1)
    (tmp_path / "b.pth").rename(tmp_path / "c.pth")  # a run that goes on does without
    train("edited", tmp_path / "parts", *args, "--epochs", 2, "--resume", "auto")
    start, end = load(tmp_path / "c.pth")["model"], load(tmp_path / "parts" / "checkpoint-1.pth")["model"]
    same = {name for name in start if torch.equal(start[name], end[name])}
    assert {name for name in start if name.startswith(("blocks.0.", "blocks.1."))} <= same
    assert not any(name.startswith(("blocks.2.", "blocks.3.", "patch_embed.")) and "weight" in name for name in same)
