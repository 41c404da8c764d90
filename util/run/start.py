"""What comes before all else in a script, and what is kept of each start: runs.jsonl, and config.yaml."""

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

from util import cli, options
from util.dist import Dist, check_ranks_agree, gather_on_all, init_distributed, on_main
from util.log import log, setup_logging
from util.run import report, resume
from util.weights import build

PACKAGES = ("torchvision", "timm", "numpy", "pillow", "tensorboard")
ROOT = Path(__file__).resolve().parents[2]


def begin(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Dist:
    """Join the other processes, open train.log, say what was asked for, as it differs from the parser's defaults.

    Raises UserError where --output_dir holds a run already that is not to be resumed, or --report_to lacks a package.
    """
    env = init_distributed(args.device, args.dist_url, args.dist_timeout)
    setup_logging(env, args.output_dir)
    cli.warn_ineffective(args)
    log.info(options.table(args, parser))
    for name in ("finetune", "init", "resume"):  # a released file's name becomes its URL, in checkpoints as well
        if source := getattr(args, name, ""):
            setattr(args, name, build.find(source))
    check_ranks_agree(env, cli.shared(args))
    on_main(env, lambda: report.check(getattr(args, "report_to", "none")))
    if not getattr(args, "eval", False):
        resume.refuse_second_run(env, args.output_dir, args.resume)
        resume.take_channels(env, args)
    return env


def record_start(env: Dist, args: argparse.Namespace) -> None:
    """Append this start to runs.jsonl: command, options (seed included), versions, git revision, hosts and devices; and
    write config.yaml, without the options of a submission.

    All ranks call it; rank 0 writes, where --output_dir is not empty.
    """
    hosts = gather_on_all(f"{socket.gethostname()}: {_device(env)}")
    if not (env.is_main and args.output_dir):
        return
    record = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "args": options.plain(args),
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
    options.write(args, args.output_dir, leave_out=resume.SUBMISSION)


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
