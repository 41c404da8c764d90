"""What goes wrong outside of the program: processes are killed or told to leave, disks are full or gone.

The kills at random moments are in faults.py, which can be run by itself.
"""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import OPTIONS, assert_same_end, check_files
from helpers import ROOT, _environment, load, torchrun, write_image_folder

from util.run.files import checkpoints

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("by", "processes", "kills"), [("KILL", 1, 70), ("KILL", 2, 30), ("TERM,USR1", 2, 6), ("INT", 1, 3)]
)
def test_run_cut_short_at_random_moments_ends_bit_for_bit_as_the_undisturbed_one(by, processes, kills):
    command = [sys.executable, str(ROOT / "tests" / "faults.py"), "--by", by]
    command += ["--processes", str(processes), "--kills", str(kills)]
    done = subprocess.run(command, env=_environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} lives ended by {by}" in done.stdout and "all ended alike" in done.stdout
    if by == "KILL":
        assert int(re.search(r"(\d+) in a save", done.stdout)[1]) > kills / 5


def options(folder: Path, name: str, *more: object) -> list[str]:
    args = (*OPTIONS, "--data_path", folder / "images", "--output_dir", folder / name, *more)
    return [str(arg) for arg in args]


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def said(folder: Path) -> str:
    return (folder / "train.log").read_text() if (folder / "train.log").exists() else ""


def workers(launcher: subprocess.Popen) -> dict[int, int]:
    """Rank -> process id of the scripts that torchrun started."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = re.search(r"PPid:\s(\d+)", (path / "status").read_text())[1]
            if int(parent) == launcher.pid and (rank := re.search(rb"\0RANK=(\d+)\0", (path / "environ").read_bytes())):
                found[int(rank[1])] = int(path.name)
        except OSError:
            pass  # it has just ended
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers through /proc")
def test_torchrun_restarts_after_a_killed_rank_and_saves_at_sigterm(tmp_path):
    """One of two ranks is killed, and the restarted run is told to leave: the same end as without all that."""
    write_image_folder(tmp_path / "images", n_train=40, n_val=1)
    torchrun("main_pretrain.py", *options(tmp_path, "whole", "--num_workers", 1))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    args = options(tmp_path, "parts", "--num_workers", 1)
    launcher = subprocess.Popen(
        [*launch, "--monitor-interval=0.5", str(ROOT / "main_pretrain.py"), *args],
        env=_environment(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        until(lambda: checkpoints(tmp_path / "parts"))
        os.kill(workers(launcher)[1], signal.SIGKILL)
        until(lambda: "goes on at epoch" in said(tmp_path / "parts"))
        at = len(said(tmp_path / "parts"))
        until(lambda: "Epoch: [" in said(tmp_path / "parts")[at:])
        launcher.send_signal(signal.SIGTERM)  # as SLURM does: the launcher hands it on
        output, _ = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert "stopped by SIGTERM: all is saved" in output, output
    check_files(tmp_path / "parts")
    newest = list(checkpoints(tmp_path / "parts").values())[-1]
    assert load(newest)["world_size"] == 2
    torchrun("main_pretrain.py", *args)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, of 6 MB: a checkpoint of the tiny model takes 3."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def start(folder: Path, output_dir: Path, *more: object) -> subprocess.Popen:
    args = (*options(folder, "none", *more), "--output_dir", str(output_dir))
    command = [sys.executable, str(ROOT / "main_pretrain.py"), *args]
    return subprocess.Popen(
        command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


def test_full_disk_stops_no_training_and_a_later_save_succeeds(small_disk, tmp_path):
    write_image_folder(tmp_path / "images", n_train=40, n_val=1)
    out = small_disk / "run"
    process = start(tmp_path, out, "--epochs", 3)
    try:
        until(lambda: checkpoints(out))
        (small_disk / "others").write_bytes(bytes(6_000_000 - 3_500_000))  # somebody fills what is left
    except OSError:
        pass
    try:
        until(lambda: "COULD NOT BE SAVED" in said(out) or process.poll() is not None)
        assert process.poll() is None
        check_files(out)  # the old ones are whole
        (small_disk / "others").unlink()
        subprocess.run(["mount", "-o", "remount,size=60m", small_disk], check=True)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "COULD NOT BE SAVED ([Errno 28] No space left" in output, output
    check_files(out)
    assert load(out / "checkpoint-2.pth")["epoch"] == 2
    assert len((out / "log.txt").read_text().splitlines()) == 3


def read_only(folder: Path, on: bool) -> bool:
    """Forbid, or allow, new files in `folder`, to root too; False where that is beyond our rights."""
    if os.geteuid():
        folder.chmod(0o555 if on else 0o755)
        return True
    try:
        return subprocess.run(["chattr", "+i" if on else "-i", folder], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def test_read_only_folder_stops_no_training_and_a_later_save_succeeds(tmp_path):
    write_image_folder(tmp_path / "images", n_train=40, n_val=1)
    out = tmp_path / "out"
    process = start(tmp_path, out, "--async_save", "on")
    try:
        until(lambda: checkpoints(out))
        if not read_only(out, True):
            pytest.skip("root may write everywhere, and chattr +i does not work here")
        until(lambda: "COULD NOT BE SAVED" in said(out))
        check_files(out)
        read_only(out, False)
        output, _ = process.communicate(timeout=120)
    finally:
        read_only(out, False)
        process.kill()
    assert process.returncode == 0 and re.search("not permitted|denied", output), output
    assert load(out / "checkpoint-1.pth")["epoch"] == 1


def test_killed_loader_worker_is_a_named_error(tmp_path):
    """As the kernel does where memory runs out."""
    write_image_folder(tmp_path / "images", n_train=40, n_val=1)
    process = start(tmp_path, tmp_path / "out", "--num_workers", 1, "--epochs", 50)
    try:
        until(lambda: "Epoch: [0]" in said(tmp_path / "out"))
        (worker,) = [int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(process.pid)]).split()]
        os.kill(worker, signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1, output
    assert "error: a loader worker died" in output and "lower --num_workers" in output


def test_stalled_disk_is_a_named_error_and_no_hang(tmp_path):
    """Opening a pipe that nobody writes to waits for ever, as a network disk may."""
    write_image_folder(tmp_path / "images", n_train=40, n_val=1)
    process = start(tmp_path, tmp_path / "out", "--num_workers", 1, "--loader_timeout", 3, "--epochs", 50)
    try:
        until(lambda: "Epoch: [0]" in said(tmp_path / "out"))
        os.mkfifo(tmp_path / "pipe")  # only now: no pipe is listed
        os.replace(tmp_path / "pipe", tmp_path / "images" / "train" / "ant" / "3.png")
        output, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 1, output
    assert "error: no image came (DataLoader timed out after 3" in output and "--loader_timeout" in output


def test_file_size_limit_stops_no_training_and_a_later_save_succeeds(tmp_path):
    """A quota, without the right to mount anything."""
    write_image_folder(tmp_path / "images", n_train=40, n_val=1)
    process = start(tmp_path, tmp_path / "out")
    try:
        until(lambda: checkpoints(tmp_path / "out"))
        no_limit = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1_000_000, no_limit[1]))
        until(lambda: "COULD NOT BE SAVED" in said(tmp_path / "out"))
        check_files(tmp_path / "out")
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, no_limit)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0 and "File too large" in output, output
    assert load(tmp_path / "out" / "checkpoint-1.pth")["epoch"] == 1
