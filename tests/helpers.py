"""What several test files share: small image folders, scripts as subprocesses, the project's log, checkpoints."""

import argparse
import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # under `pytest` as under `python -m pytest`
    sys.path.insert(0, str(ROOT))

CLASSES = ("ant", "bee", "cat")
# the same arithmetic on every machine: float32 on the CPU
ON_CPU = ("--device", "cpu", "--amp", "off")


def write_image(path: Path, key: int, size: tuple[int, int] = (32, 32)) -> None:
    """An RGB image of `size` (width, height): smooth colours with some noise, decided by `key`."""
    random = np.random.default_rng(key)
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = smooth + random.integers(-20, 21, smooth.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path)


def write_image_folder(root: Path, n_train: int = 8, n_val: int = 3, classes: tuple[str, ...] = CLASSES) -> Path:
    """train/<class>/ with `n_train` images each and val/<class>/ with `n_val`; returns `root`."""
    key = 0
    for split, n_images in (("train", n_train), ("val", n_val)):
        for name in classes:
            for i in range(n_images):
                write_image(root / split / name / f"{i}.png", key)
                key += 1
    return root


def _environment(**variables: str) -> dict[str, str]:
    """Ours, without what a launcher around the tests may have set."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "TORCHELASTIC_", "SUBMITIT_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **variables}


def run(script: str, *args: object, cwd: Path | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a script of the project as a user would; fails unless it exits with `code`."""
    return _run([sys.executable, str(ROOT / script), *map(str, args)], cwd, code, _environment())


def torchrun(script: str | Path, *args: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a script in several processes on this machine; fails unless all of them succeed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return _run([*launcher, str(ROOT / script), *map(str, args)], None, 0, _environment(OMP_NUM_THREADS="1"))


def _run(command: list[str], cwd: Path | None, code: int, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, f"exit code {done.returncode}, not {code}\n{done.stdout}\n{done.stderr}"
    return done


def quiet_run(step, env=None, **options):
    """A Run for `step`, for engines that are called by themselves: it saves and writes nothing."""
    from util.dist import Dist
    from util.run.run import Run

    defaults = dict(
        epochs=9, batch_size=1, accum_iter=step.accum_iter, save_every=1, save_minutes=None, keep_last=None, resume="",
        async_save="off", dist_timeout=10.0, on_nan="stop", start_epoch=0, output_dir="", log_dir="", peak_tflops=None,
    )  # fmt: skip
    model = getattr(step.model, "module", step.model)
    return Run(env or Dist(step.device), argparse.Namespace(**defaults | options), model, step)


@contextlib.contextmanager
def project_log() -> Iterator[list[str]]:
    """The messages that the project logs inside the `with`, one string each."""
    messages: list[str] = []
    log = logging.getLogger("mae")
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    level = log.level
    log.setLevel(logging.DEBUG)
    log.addHandler(handler)
    try:
        yield messages
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def load(path: Path) -> dict:
    """A checkpoint as anybody may load it: without running anything from it."""
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same(a: object, b: object, where: str = "") -> None:
    """Equal bit for bit: nested dicts, lists and tensors, as in checkpoints."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where
