"""One run at a time in a folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ON_CPU, _environment, run, write_image_folder
from test_saving import saver

from util.errors import UserError
from util.run import lock
from util.run import run as running

pytestmark = pytest.mark.skipif(lock.fcntl is None, reason="this system has no such locks")

HOLD = """
import multiprocessing, sys, time
from pathlib import Path
from util.run.lock import take
file = take(Path(sys.argv[1]))
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """(A process that holds the lock of `tmp_path`, the pid of one that it has forked, as loader workers are.)"""
    command = [sys.executable, "-c", HOLD, tmp_path / ".lock"]
    process = subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)


def test_a_second_process_is_refused_and_told_who_has_the_folder(tmp_path, holder):
    before = time.monotonic()
    with pytest.raises(UserError, match=rf"{tmp_path} is in use by another run \(process {holder.pid} on .*\): stop"):
        lock.take(tmp_path / ".lock", wait_seconds=0.4)
    assert 0.4 <= time.monotonic() - before < 20


def test_a_killed_run_gives_the_folder_up_though_its_workers_live(tmp_path, holder):
    holder.kill()
    holder.wait()
    file = lock.take(tmp_path / ".lock")
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    os.close(file)


def test_a_run_that_is_about_to_leave_is_waited_for(tmp_path, holder):
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
    os.close(lock.take(tmp_path / ".lock", wait_seconds=30))
    killer.wait()


def test_a_saver_waits_two_minutes_or_half_of_what_others_wait_for_it(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(running, "take", lambda path, seconds: waits.append((path, seconds)))
    saver(tmp_path, dist_timeout=10.0)
    saver(tmp_path, dist_timeout=1.0)
    assert waits == [(tmp_path / ".lock", 120), (tmp_path / ".lock", 30)]


def test_a_saver_gives_the_folder_up_when_its_run_is_over_or_refused(tmp_path):
    def is_free() -> bool:
        command = [sys.executable, "-c", "import os, sys; from pathlib import Path; from util.run.lock import take; "
                   "os.close(take(Path(sys.argv[1])))", tmp_path / ".lock"]  # fmt: skip
        return subprocess.run(command, env=_environment(), capture_output=True).returncode == 0

    with saver(tmp_path) as one:
        one.save_epoch(5)
        assert not is_free()
    assert is_free()
    with pytest.raises(UserError, match="holds a run already"):
        saver(tmp_path, resume="")
    assert is_free()


def test_a_run_does_not_write_over_the_one_that_it_has_waited_for(tmp_path, holder):
    """Both found the folder empty, and were started without --resume."""
    (tmp_path / "saved").write_bytes(b"")
    files = f"{tmp_path}/saved {tmp_path}/checkpoint-3.pth"
    leaver = subprocess.Popen(["sh", "-c", f"sleep 0.5; mv {files}; kill -9 {holder.pid}"])
    with pytest.raises(UserError, match="holds a run already"):
        saver(tmp_path, resume="")
    assert leaver.wait() == 0


def test_a_folder_in_which_nothing_can_be_made_stops_no_run(tmp_path):
    (tmp_path / ".lock").mkdir()
    assert lock.take(tmp_path / ".lock") is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_full_disk_is_no_trouble_on_the_way_out():
    os.close(lock.take(Path("/dev/full")))


def test_a_file_system_without_locks_stops_no_run(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "lockf", no_locks)
    assert lock.take(tmp_path / ".lock") is None


@pytest.mark.slow
def test_a_script_leaves_a_folder_in_use_alone(tmp_path, holder):
    """What the other run is writing stays."""
    images = write_image_folder(tmp_path / "images", n_train=2)
    (tmp_path / "checkpoint-3.tmp").write_text("half")
    options = ("--data_path", images, "--model", "mae_vit_tiny_patch4", "--input_size", 32, "--batch_size", 2,
               "--epochs", 1, "--output_dir", tmp_path, "--log_dir", "", "--dist_timeout", 0.01, *ON_CPU)  # fmt: skip
    done = run("main_pretrain.py", *options, code=2)
    assert done.stderr.startswith(f"error: --output_dir {tmp_path} is in use by another run (process {holder.pid} on ")
    assert (tmp_path / "checkpoint-3.tmp").exists() and not (tmp_path / "log.txt").exists()
