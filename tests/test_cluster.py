"""docs/cluster: the batch files, run with an srun that only records; the parts of the image.

A real SLURM runs one of the files in test_slurm_real.py.
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import test_documents
from helpers import ROOT
from packaging.requirements import Requirement

import main_finetune
import main_linprobe
import main_pretrain
from util.run import slurm

FOLDER = ROOT / "docs" / "cluster"
MAINS = {"pretrain": main_pretrain, "finetune": main_finetune, "linprobe": main_linprobe}
EFFECTIVE = {"pretrain": 4096, "finetune": 1024, "linprobe": 16384}
each_file = pytest.mark.parametrize("name", MAINS)


@pytest.fixture
def job(tmp_path):
    """Runs a batch file as SLURM would, with an srun that records its words and leaves with `code`.

    Returns (exit code, words of srun or None, words of scontrol or None, stderr).
    """
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text("activated=yes\n")
    for command, leave in (("srun", "exit $SRUN"), ("scontrol", "")):
        path = tmp_path / "bin" / command
        path.write_text(f"#!/bin/bash\nprintf '%s\\0' \"$@\" > '{tmp_path}/{command}'\n{leave}\n")
        path.chmod(0o755)

    def run(name, *options, code=0, tasks=32, lacking=(), **more):
        env = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_NTASKS": str(tasks), "SLURM_CPUS_PER_TASK": "10",
            "SLURM_JOB_ID": "1234", "SLURM_SUBMIT_DIR": str(ROOT), "VENV": str(tmp_path), "DATA": "/a b/imagenet",
            "OUT": "/shared/mae", "FROM": "encoder.pth", "SRUN": str(code), **more,
        }  # fmt: skip
        env = {key: value for key, value in env.items() if key not in lacking}
        script = tmp_path / "spooled"  # SLURM runs a copy from elsewhere
        shutil.copy(FOLDER / f"{name}.sbatch", script)
        done = subprocess.run(["bash", script, *options], env=env, cwd=tmp_path, capture_output=True, text=True)
        records = [tmp_path / command for command in ("srun", "scontrol")]
        words = [path.read_text().split("\0")[:-1] if path.exists() else None for path in records]
        return done.returncode, *words, done.stderr

    return run


def parsed(name, words):
    """The options that the script gets of srun's words."""
    at = words.index(f"main_{name}.py")
    assert words[at - 1] == "python"
    return MAINS[name].get_args_parser().parse_args(words[at + 1 :])


def in_documents(name):
    """The options of the recipe's command, in the page that tells it."""
    page = "PRETRAIN.md" if name == "pretrain" else "FINETUNE.md"
    launcher = "srun " if name == "pretrain" else "python "
    lines = [line for line in test_documents.commands(page) if line.startswith(launcher) and f" main_{name}.py" in line]
    return MAINS[name].get_args_parser().parse_args(shlex.split(lines[0].split(f"main_{name}.py")[1]))


@each_file
def test_the_published_recipe_is_what_a_file_runs(name, job):
    code, words, requeued, _ = job(name, tasks=64 if name == "pretrain" else 32)
    assert (code, requeued) == (0, None)
    ours, documented = vars(parsed(name, words)), vars(in_documents(name))
    assert (ours.pop("data_path"), ours.pop("resume")) == ("/a b/imagenet", "auto")
    assert ours.pop("output_dir") == ours.pop("log_dir") == "/shared/mae/1234"
    if name != "pretrain":
        assert (ours.pop("finetune"), ours.pop("dist_eval")) == ("encoder.pth", True)
        assert ours.pop("accum_iter") * 32 == documented["accum_iter"], "the command is for one GPU"
    assert ours == {key: documented[key] for key in ours}


@each_file
@pytest.mark.parametrize("tasks", [1, 8, 16])
def test_accumulation_keeps_the_effective_batch(name, tasks, job):
    args = parsed(name, job(name, tasks=tasks)[1])
    assert args.batch_size * args.accum_iter * tasks == EFFECTIVE[name]


@each_file
def test_options_behind_the_file_win(name, job):
    options = ["--batch_size", "2", "--accum_iter", "3", "--output_dir", "/else where", "--epochs", "7"]
    args = parsed(name, job(name, *options)[1])
    assert (args.batch_size, args.accum_iter, args.output_dir, args.epochs) == (2, 3, "/else where", 7)


@each_file
@pytest.mark.parametrize("code", [0, 1, 2, 3, 75, 143])
def test_a_job_is_requeued_where_a_signal_came_and_else_not(name, code, job):
    left, _, requeued, _ = job(name, code=code)
    assert left == code and requeued == (["requeue", "1234"] if code == 75 else None)


@pytest.mark.parametrize(
    ("restarts", "more", "expected"), [(29, {}, True), (30, {}, False), (3, {"RESTARTS": "3"}, False)]
)
def test_requeues_end_somewhere(restarts, more, expected, job):
    _, _, requeued, said = job("pretrain", code=75, SLURM_RESTART_COUNT=str(restarts), **more)
    assert bool(requeued) == expected == ("not again" not in said)


@each_file
@pytest.mark.parametrize(
    ("what", "told"),
    [({"lacking": ["DATA"]}, "DATA: is not set"), ({"lacking": ["OUT"]}, "OUT: is not set"),
     ({"lacking": ["FROM"]}, "FROM: is not set"), ({"tasks": 24}, "24 GPUs"), ({"VENV": "/nowhere"}, "/nowhere"),
     ({"CODE": "/nowhere"}, "/nowhere")],
)  # fmt: skip
def test_what_cannot_run_ends_before_anything_starts(name, what, told, job):
    code, words, requeued, said = job(name, **what)
    if name == "pretrain" and "FROM" in told:
        assert code == 0 and words
    else:
        assert code and words is None and requeued is None and told in said, said


def test_an_image_brings_python_and_the_folders_are_bound(job):
    words = job("pretrain", IMAGE="/shared/mae.sif", VENV="/nowhere")[1]
    at = words.index("apptainer")
    assert words[at : at + 3] == ["apptainer", "exec", "--nv"] and words[words.index("python") - 1] == "/shared/mae.sif"
    assert words[words.index("--bind") + 1] == f"{ROOT},/a b/imagenet,/shared/mae"


@each_file
def test_slurm_is_asked_for_what_submitit_asks_for(name):
    asked = dict(re.findall(r"--([\w-]+)=(\S+)", "".join(re.findall(r"^#SBATCH.*\n", text(name), re.MULTILINE))))
    defaults = vars(slurm.get_args_parser(MAINS[name]).parse_args([]))
    assert asked["signal"] == f"USR1@{slurm.SIGNAL_SECONDS}"
    assert int(asked["ntasks-per-node"]) == int(asked["gpus-per-node"]) == defaults["ngpus"]
    assert asked["mem"] == f"{slurm.MEM_GB_PER_GPU * defaults['ngpus']}G"
    assert int(asked["cpus-per-task"]) == slurm.CPUS_PER_TASK
    assert "--requeue" in text(name) and asked["open-mode"] == "append"
    assert asked["nodes"] == ("8" if name == "pretrain" else "4")


def text(name):
    return (FOLDER / f"{name}.sbatch").read_text()


def test_files_differ_in_their_recipes_alone():
    assert len({re.search(r"# the same lines.*?\n\n(?=run main)", text(name), re.DOTALL)[0] for name in MAINS}) == 1


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", *FOLDER.glob("*.sbatch")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# the image


def instructions() -> list[tuple[str, str]]:
    """(name, rest) of the Dockerfile's instructions in order, continued lines joined."""
    whole = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in whole.splitlines() if line.strip()]


def context() -> set[str]:
    """The files of the repository that .dockerignore lets into a build: as Docker says, the last pattern that fits."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    patterns = [line for line in (ROOT / ".dockerignore").read_text().split("\n") if line and line[0] != "#"]
    found = set()
    for file in listed.stdout.split("\n")[:-1]:
        parts = [file, *map(str, Path(file).parents)]
        sent = True
        for pattern in patterns:
            name = pattern.removeprefix("!").removeprefix("**/")
            tails = {part.split("/", i)[-1] for part in parts for i in range(part.count("/") + 1)}
            among = tails if "**/" in pattern else parts
            if any(fnmatch.fnmatch(part, name) and part.count("/") == name.count("/") for part in among):
                sent = pattern.startswith("!")
        if sent:
            found.add(file)
    return found


def test_the_dockerfile_copies_what_is_there_and_runs_as_a_user():
    names, sent = [name for name, _ in instructions()], context()
    assert names[0] == "ARG" and names[1] == "FROM" and set(names) <= {
        "ARG", "FROM", "RUN", "ENV", "COPY", "USER", "WORKDIR", "ENTRYPOINT", "CMD"
    }  # fmt: skip
    copied = set()
    for name, rest in instructions():
        if name == "COPY":
            sources = [word for word in rest.split()[:-1] if not word.startswith("--")]
            assert all(source == "." or source in sent for source in sources), rest
            copied |= {f"/tmp/{Path(source).name}" for source in sources}
        if name == "RUN":
            files = re.findall(r"--(?:requirement|constraint) (\S+)", rest)
            assert set(files) <= copied, "installed before it is copied"
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users == ["mae"] and names.index("USER") < names.index("CMD")
    assert "useradd" in dict(instructions()[: names.index("USER")])["RUN"]
    assert [json.loads(rest)[0] for name, rest in instructions() if name in ("CMD", "ENTRYPOINT")] == ["tini", "python"]


def test_constraints_are_of_every_requirement_and_within_its_range():
    pins = dict(line.split("==") for line in (FOLDER / "constraints.txt").read_text().split() if "==" in line)
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    required = [requirement for line in lines if line for requirement in [Requirement(line)]]
    on_312 = [r for r in required if not r.marker or r.marker.evaluate({"python_version": "3.12"})]
    assert {r.name for r in on_312} == set(pins)
    assert all(pins[r.name] in r.specifier for r in on_312)
    assert int(pins["torch"].split(".")[0]) == int(version("torch").split(".")[0])


def test_what_the_image_gets_is_enough_to_train_and_no_more(tmp_path):
    sent = context()
    assert {"main_pretrain.py", "util/run/slurm.py", "experiments/tables.py", "LICENSE", "requirements.txt"} <= sent
    assert not [f for f in sent if f.startswith(("tests/", "demo/", ".git")) or f.endswith((".md", ".png", ".ipynb"))]
    for file in sent:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    modules = ["main_pretrain", "main_finetune", "main_linprobe", "main_evaluate", "util.export", "experiments.report"]
    code = f"import {', '.join(modules)}; import util.cli; print(util.cli.__file__)"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "util" / "cli.py"), done.stderr
