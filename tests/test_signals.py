"""Signals: noted, agreed on by all ranks at little cost, and left to the trainer by its loader workers."""

import multiprocessing
import os
import signal
import subprocess
import time

import pytest
import torch
from test_saving import read, saver

from util.data.workers import leave_signals_to_the_trainer
from util.dist import SIGNALS, Dist
from util.run import exits, files
from util.run.exits import ASK_STEPS, EXIT_SAVED, Signals, Stopped

ONE, TWO = (Dist(torch.device("cpu"), world_size=n) for n in (1, 2))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_signal_is_noted_and_the_handler_before_comes_back(name):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with Signals(ONE) as noted:
        assert noted.ask(save=False) == (set(), False)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # torchrun repeats what the terminal has sent already
        assert noted.ask(save=True) == ({number}, True)
    assert signal.getsignal(number) is before


def test_signal_that_is_ignored_stays_so(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what runs in its background
    try:
        with Signals(ONE) as noted:
            os.kill(os.getpid(), signal.SIGINT)
            assert noted.ask(save=False) == (set(), False)
    finally:
        signal.signal(signal.SIGINT, before)


def test_second_ctrl_c_after_a_while_ends_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(exits.time, "monotonic", lambda: now[0])
    with Signals(ONE), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 1
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 3
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("step_seconds", "between"), [(0.001, ASK_STEPS), (0.25, 8), (30.0, 1)])
def test_ranks_ask_one_another_every_20_steps_or_about_every_2_seconds(step_seconds, between, monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr(exits.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(exits, "sum_over_ranks", lambda votes: asked.append(step) or votes)
    noted = Signals(TWO)
    for step in range(100):  # noqa: B007
        now[0] += step_seconds
        noted.ask(save=False)
    assert asked[:2] == [0, between] and {b - a for a, b in zip(asked[1:], asked[2:], strict=False)} == {between}


def test_what_one_rank_is_told_all_obey(monkeypatch):
    def with_the_other(votes):
        """Rank 0 was told nothing; rank 1 got SIGUSR2, and must have no say in times."""
        other = [float(number == signal.SIGUSR2) for number in SIGNALS]
        assert votes.dtype == torch.float32
        return votes + torch.tensor([*other, 0.0, 0.0])

    monkeypatch.setattr(exits, "sum_over_ranks", with_the_other)
    assert Signals(TWO).ask(save=True) == ({signal.SIGUSR2}, True)
    seen = []
    monkeypatch.setattr(exits, "sum_over_ranks", lambda votes: seen.extend(votes.tolist()) or votes)
    Signals(Dist(torch.device("cpu"), rank=1, world_size=2)).ask(save=True)
    assert seen == [0.0] * 6


@pytest.mark.parametrize("saved", [True, False])
def test_exit_code_says_whether_the_state_is_saved(saved, tmp_path, monkeypatch):
    if not saved:
        monkeypatch.setattr(files, "save", lambda path, state: os.stat("/nowhere/at/all"))
    with pytest.raises(Stopped) as stopped, saver(tmp_path, async_save="on") as one:
        read(one, 0, 3)
        os.kill(os.getpid(), signal.SIGTERM)
        assert one.due()
        one.save_part()
    assert stopped.value.exit_code == (EXIT_SAVED if saved else 1)
    assert ("NOT saved" in str(stopped.value)) != saved and "SIGTERM" in str(stopped.value)


def _worker(pipe: str, ready) -> None:
    leave_signals_to_the_trainer(0)
    ready.set()
    open(pipe).close()  # waits for ever, as reading from a stalled disk


def test_loader_worker_outlives_signals_to_the_whole_job_but_obeys_its_trainer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=_worker, args=(str(tmp_path / "pipe"), ready), daemon=True)
    worker.start()
    assert ready.wait(60)
    for name in ("TERM", "INT", "USR1", "USR2"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)  # from another process, as SLURM
    time.sleep(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0
