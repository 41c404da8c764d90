"""CONTRIBUTING.md's diffs: each applies to a copy of the code, which then trains, resumes and draws a picture."""

import re
import shutil
import subprocess
import sys

import pytest
from helpers import ON_CPU, ROOT, _environment, load, write_image_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CHANGES = re.findall(
    r"^\*\*(An? [a-z ]+)\.\*\* .*?\n\n```diff\n(.*?)```\n\n`(.*?)`$",
    (ROOT / "CONTRIBUTING.md").read_text(),
    re.M | re.S,
)
TWICE = """
import sys, main_pretrain
for epochs in ("1", "2"):
    args = main_pretrain.get_args_parser().parse_args([*sys.argv[1:], "--epochs", epochs, "--resume", "auto"])
    main_pretrain.main(args)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("images"), n_train=4, n_val=2)


def test_all_changes_are_there():
    assert {name for name, _, _ in CHANGES} == {
        "A mask", "A target", "A loss", "A data source", "An optimizer", "A model size",
    }  # fmt: skip
    for _, diff, _ in CHANGES:
        added = [line for line in diff.splitlines() if re.match(r"\+(?!\+\+)\s*\S", line)]
        assert len(added) <= 12, "a dozen lines at most"
        assert diff.count("--- a/") == 1, "one file"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "diff", "options"), CHANGES, ids=[name for name, *_ in CHANGES])
def test_change_trains_resumes_and_draws(name, diff, options, images, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "util", copy / "util", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copy)
    subprocess.run(["git", "apply", "--unsafe-paths", "-"], input=diff, text=True, cwd=copy, check=True)
    out, common = tmp_path / "out", ("--batch_size", 4, "--warmup_epochs", 1, "--num_workers", 0, *ON_CPU)
    model = () if "--model" in options else ("--model", "mae_vit_tiny_patch4", "--input_size", 32)
    where = ("--data_path", images, "--output_dir", out, "--log_dir", out, "--picture_every", 1, "--save_every", 1)
    command = [sys.executable, "-c", TWICE, *map(str, (*model, *common, *where)), *options.split()]
    done = subprocess.run(
        command, cwd=copy, env=_environment(PYTHONPATH=str(copy)), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goes on at epoch 1" in done.stdout and "from here on" not in done.stdout
    assert load(out / "checkpoint-1.pth")["epoch"] == 1
    accumulator = EventAccumulator(str(out), size_guidance={"images": 0})
    accumulator.Reload()
    assert [picture.step for picture in accumulator.Images("reconstructions")] == [0, 1]
