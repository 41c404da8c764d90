"""A real SLURM of one node, started for these tests: srun, submission through submitit, requeue, the time limit.

Skipped where SLURM is not installed (Debian and Ubuntu: apt-get install slurm-wlm munge) or cannot be started.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ON_CPU, ROOT, _environment, assert_same, load, write_image_folder

PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
EPOCHS = 40
# 24 images in steps of 4: six steps an epoch
RUN = (
    "--model", "mae_vit_tiny_patch4", "--input_size", "32", "--batch_size", "2", "--epochs", str(EPOCHS),
    "--warmup_epochs", "1", "--save_every", "2", "--num_workers", "0", *ON_CPU,
)  # fmt: skip

pytestmark = pytest.mark.slow

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# submitit_*.py asks for 10 CPUs a task, whatever this machine has
SlurmdParameters=config_overrides
# seconds from the request to leave until the kill; else 30
KillWait=4
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=40 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Commands to the SLURM of this module."""

    def __init__(self, configuration: Path) -> None:
        self.folder = configuration.parent
        self.env = {**_environment(OMP_NUM_THREADS="1"), "PATH": PATH, "SLURM_CONF": str(configuration)}

    def run(self, *command: object, timeout: float = 120) -> str:
        done = subprocess.run(
            list(map(str, command)), env=self.env, capture_output=True, text=True, timeout=timeout, cwd="/"
        )
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` tells: JobState, Restarts and so on."""
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "show", "job", job_id)))

    @contextlib.contextmanager
    def held(self, job_id: str) -> Iterator[None]:
        """The job's tasks stand still, until somebody continues them or the `with` ends."""
        listed = self.run("scontrol", "listpids", job_id).splitlines()[1:]
        tasks = [int(line.split()[0]) for line in listed]
        for pid in tasks:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in tasks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def wait_for(self, job_id: str, *states: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while (state := self.job(job_id)["JobState"]) not in states:
            assert time.monotonic() < deadline, f"still {state} after {seconds} s, not {states}"
            assert state not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), state
            time.sleep(0.2)


@contextlib.contextmanager
def daemon(folder: Path, *command: str, **env: str) -> Iterator[None]:
    """A process with its log in `folder`, ended on leaving."""
    with (folder / f"{Path(command[0]).name}.log").open("w") as log:
        process = subprocess.Popen(
            [shutil.which(command[0], path=PATH), *command[1:]], env={**os.environ, "PATH": PATH, **env}, stdout=log,
            stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """munged, slurmctld and slurmd on this machine."""
    programs = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
    if missing := [name for name in programs if not shutil.which(name, path=PATH)]:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd must be started by root")
    pytest.importorskip("submitit")
    with contextlib.ExitStack() as stack:
        # short, for a socket's name is at most 107 characters
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        folder.chmod(0o755)
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        configuration = folder / "slurm.conf"
        configuration.write_text(
            CONFIGURATION.format(
                host=socket.gethostname().split(".")[0], folder=folder, controller_port=free_port(),
                node_port=free_port(),
            )
        )  # fmt: skip
        munge = ["--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
        munge += [
            f"--pid-file={folder}/munge.pid",
            f"--seed-file={folder}/munge.seed",
            f"--log-file={folder}/munge.log",
        ]
        stack.enter_context(daemon(folder, "munged", *munge))
        stack.enter_context(daemon(folder, "slurmctld", "-D", SLURM_CONF=str(configuration)))
        stack.enter_context(daemon(folder, "slurmd", "-D", SLURM_CONF=str(configuration)))
        slurm = Slurm(configuration)
        ask, deadline = ["sinfo", "--noheader", "--format=%T"], time.monotonic() + 30
        while (answer := subprocess.run(ask, env=slurm.env, capture_output=True, text=True)).stdout.strip() != "idle":
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-500:] for path in folder.glob("*.log"))
                pytest.skip(f"SLURM does not start here: {answer.stdout}{answer.stderr}{logs}")
            time.sleep(0.2)
        yield slurm
        subprocess.run(["scancel", "--user=root"], env=slurm.env)
        deadline = time.monotonic() + 20  # slurmd leaves running tasks behind
        while subprocess.run(["squeue", "-h"], env=slurm.env, capture_output=True).stdout.strip():
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"), n_train=8, n_val=0)


@pytest.fixture(scope="module")
def undisturbed(slurm, images, tmp_path_factory) -> Path:
    """The folder of a run in two processes under plain srun."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, ROOT / "main_pretrain.py", "--data_path", images, *RUN]
    out = slurm.run("srun", "--ntasks=2", *command, "--output_dir", folder, "--log_dir", folder)
    (folder / "out").write_text(out)
    return folder


def submit(slurm: Slurm, images: Path, folder: Path, minutes: int) -> tuple[str, Path]:
    """Send the same run through submitit_pretrain.py; returns (job id, its folder) once it is in the middle."""
    out = slurm.run(
        sys.executable, ROOT / "submitit_pretrain.py", "--job_dir", folder / "%j", "--nodes", "1", "--ngpus", "2",
        "--timeout", minutes, "--data_path", images, *RUN,
    )  # fmt: skip
    job_id = out.strip().split("\n")[-1]
    folder = folder / job_id
    deadline = time.monotonic() + 90
    while not (folder / "checkpoint-2.pth").exists():
        assert time.monotonic() < deadline, [path.read_text()[-3000:] for path in folder.glob("*.err")]
        time.sleep(0.05)
    assert slurm.job(job_id)["JobState"] == "RUNNING"
    return job_id, folder


def continues(slurm: Slurm, job_id: str, folder: Path, undisturbed: Path) -> None:
    """The requeued job starts again, finds what it has saved, and ends with the weights of the undisturbed run."""
    saved = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pth")}
    assert f"checkpoint-{EPOCHS - 1}.pth" not in saved, "it had ended before"
    # SLURM lets a requeued job wait for two minutes
    slurm.run("scontrol", "update", f"JobId={job_id}", "StartTime=now", "TimeLimit=10")
    slurm.wait_for(job_id, "COMPLETED")
    assert slurm.job(job_id)["Restarts"] == "1"
    log = (folder / "train.log").read_text()
    assert log.count("resumed ") == 1
    for name, time_ns in saved.items():
        if (folder / name).exists():
            assert (folder / name).stat().st_mtime_ns == time_ns, f"{name} was computed again"
    ours, theirs = (load(folder / f"checkpoint-{EPOCHS - 1}.pth") for folder in (folder, undisturbed))
    for key in ("model", "optimizer", "epoch"):
        assert_same(ours[key], theirs[key], key)


def test_srun_alone_starts_one_run_of_two_processes(undisturbed):
    out = (undisturbed / "out").read_text()
    assert "2 x cpu" in out and "effective batch 4" in out
    assert out.count(f"Epoch: [{EPOCHS - 1}]  [5/6]") == 1, "one voice"
    assert len((undisturbed / "log.txt").read_text().splitlines()) == EPOCHS
    assert (undisturbed / f"checkpoint-{EPOCHS - 1}.pth").exists()


def test_pretraining_file_requeues_itself_and_goes_on(slurm, images, tmp_path):
    """docs/cluster/pretrain.sbatch. The first task that leaves makes srun send SIGTERM to the others, which must not
    change the exit code by which the job learns that all is saved.
    """
    places = f"DATA={images},OUT={tmp_path},CODE={ROOT},VENV={sys.prefix}"
    here = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=0")
    file = ROOT / "docs" / "cluster" / "pretrain.sbatch"
    job_id = slurm.run(
        "sbatch", "--parsable", *here, f"--export=ALL,{places}", f"--output={tmp_path}/said", file, *RUN,
        "--accum_iter", "1",
    ).strip()  # fmt: skip
    folder = tmp_path / job_id
    wait_until((folder / "checkpoint-2.pth").exists)
    slurm.run("scancel", "--signal=USR1", job_id)
    slurm.wait_for(job_id, "PENDING")  # nobody but the job itself asks for it
    slurm.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")
    slurm.wait_for(job_id, "COMPLETED")
    assert slurm.job(job_id)["Restarts"] == "1"
    said = (tmp_path / "said").read_text()
    assert said.count("all is saved") == said.count("resumed ") == 1, said[-3000:]
    epochs = [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]
    assert epochs == list(range(EPOCHS))


def wait_until(condition, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.1)


def test_requeued_job_ends_as_the_undisturbed_run(slurm, images, undisturbed, tmp_path):
    job_id, folder = submit(slurm, images, tmp_path, minutes=60)
    slurm.run("scontrol", "requeue", job_id)
    slurm.wait_for(job_id, "PENDING")
    continues(slurm, job_id, folder, undisturbed)


def test_job_at_its_time_limit_requeues_itself_and_ends_as_the_undisturbed_run(slurm, images, undisturbed, tmp_path):
    """SLURM sends the warning signal when SIGNAL_SECONDS are left: at once for a job that is cut to two minutes.

    It looks at its jobs' limits every 30 s. The job is held until then, or it would be through; SLURM's signal comes
    with a SIGCONT.
    """
    job_id, folder = submit(slurm, images, tmp_path, minutes=4)
    with slurm.held(job_id):
        slurm.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=2")
        slurm.wait_for(job_id, "PENDING")  # nobody but the job itself asks for it
    logs = "".join(path.read_text() for path in folder.glob("*_log.*"))
    assert "Caught signal SIGUSR2" in logs and "timed-out" in logs
    continues(slurm, job_id, folder, undisturbed)
