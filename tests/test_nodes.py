"""Two torchrun agents, as on two nodes, on this machine: one is killed with its trainer, comes back, and both go on."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ON_CPU, ROOT, _environment, assert_same, load, torchrun, write_image_folder

EPOCHS = 20
RUN = (
    "--model", "mae_vit_tiny_patch4", "--input_size", "32", "--batch_size", "2", "--epochs", str(EPOCHS),
    "--warmup_epochs", "1", "--save_every", "2", "--num_workers", "0", "--resume", "auto", *ON_CPU,
)  # fmt: skip


def tree(pid: int) -> list[int]:
    """A process and all that it started, directly or not."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found


def kill(agent: subprocess.Popen) -> None:
    """End an agent and its trainer as a power cut would."""
    for pid in tree(agent.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    agent.wait()


@contextlib.contextmanager
def agent(node: int, port: int, log: Path, *args: object) -> Iterator[subprocess.Popen]:
    """torchrun, as it is started on node 0 or 1; what it says goes to `log`."""
    launcher = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3",
        "--rdzv_id=mae", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}",
        # on one machine both could be the host; a node is taken for dead after 3 s without a sign, else after 15
        f"--rdzv_conf=is_host={int(node == 0)},keep_alive_interval=1,keep_alive_max_attempt=3",
    ]  # fmt: skip
    # PRETRAIN.md tells why: torch's agents that share a store with a trainer cannot take a newcomer in
    env = _environment(OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    with log.open("w") as file:
        command = [*launcher, ROOT / "main_pretrain.py", *RUN, *args]
        process = subprocess.Popen(list(map(str, command)), env=env, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            kill(process)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
def test_node_that_dies_and_comes_back_leaves_no_trace_in_the_weights(tmp_path):
    images = write_image_folder(tmp_path / "images", n_train=8, n_val=0)
    out = tmp_path / "out"
    args = ("--data_path", images, "--output_dir", out, "--log_dir", "")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    def logs() -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(tmp_path.glob("*.log")))

    with agent(0, port, tmp_path / "node-0.log", *args) as first:
        with agent(1, port, tmp_path / "node-1.log", *args) as second:
            deadline = time.monotonic() + 60
            while not (out / "checkpoint-2.pth").exists():
                assert time.monotonic() < deadline and first.poll() is second.poll() is None, logs()
                time.sleep(0.02)
            kill(second)
        assert not (out / f"checkpoint-{EPOCHS - 1}.pth").exists(), "it had ended before"
        with agent(1, port, tmp_path / "node-1-again.log", *args) as second:
            for process in (first, second):
                try:
                    assert process.wait(90) == 0, logs()
                except subprocess.TimeoutExpired:
                    pytest.fail(f"still waiting\n{logs()}")

    log = (out / "train.log").read_text()
    assert log.count("a fresh start") == 1 and log.count("resumed ") == 1 and "2 x cpu" in log
    torchrun("main_pretrain.py", *RUN, "--data_path", images, "--output_dir", tmp_path / "whole", "--log_dir", "")
    ours, theirs = (load(folder / f"checkpoint-{EPOCHS - 1}.pth") for folder in (out, tmp_path / "whole"))
    for key in ("model", "optimizer", "epoch"):
        assert_same(ours[key], theirs[key], key)
