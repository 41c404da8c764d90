"""What a run was: a line in `output_dir`/runs.jsonl at every start, enough to do it again."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import torch

from util.dist import Dist, gather_on_all
from util.log import log

PACKAGES = ("torchvision", "timm", "numpy", "pillow", "tensorboard")
ROOT = Path(__file__).resolve().parent.parent


def append(env: Dist, args: argparse.Namespace) -> None:
    """Append this start to runs.jsonl: command, options (seed included), versions, git revision, hosts and devices.

    All ranks call it; rank 0 writes, where --output_dir is not empty.
    """
    hosts = gather_on_all(f"{socket.gethostname()}: {_device(env)}")
    if not (env.is_main and args.output_dir):
        return
    record = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "args": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "git": _git(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # with the CUDA that it was built for
            **{name: _version(name) for name in PACKAGES},
        },
        "hosts": hosts,  # one a rank
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    path = Path(args.output_dir) / "runs.jsonl"
    try:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        log.error(f"{path} CANNOT BE WRITTEN ({error})")


def _device(env: Dist) -> str:
    return torch.cuda.get_device_name(env.device) if env.device.type == "cuda" else env.device.type


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, str | bool] | None:
    """Revision of this code, and whether tracked files differ from it; None where there is no git or no repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
