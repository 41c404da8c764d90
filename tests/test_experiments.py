"""The paper's experiments: their rows are what the scripts take, and one runs end to end, killed and continued."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT

import main_finetune
import main_linprobe
import main_pretrain
from experiments import report
from experiments.stages import commands, stages_of
from experiments.tables import EXPERIMENTS, FINE_TUNED, LINEAR, Experiment, Row, options

MAINS = {"pretrain": main_pretrain, "finetune": main_finetune, "linprobe": main_linprobe}
ALL_ROWS = [(name, row) for name, experiment in EXPERIMENTS.items() for row in experiment.rows]


def runnable(row, scale):
    stages = stages_of(row, scale, 0)
    return {} if any(stage.unknown() for stage in stages.values()) else stages


@pytest.mark.parametrize("launcher", ["torchrun", "submitit"])
def test_every_command_for_imagenet_is_one_that_its_script_takes_with_the_paper_s_batch(launcher):
    seen = set()
    for name, row in ALL_ROWS:
        for stage in runnable(row, "imagenet").values():
            left = set()
            for command in commands(stage, launcher, "out"):
                words = shlex.split(command)
                script = next(word for word in words if word.endswith(".py"))
                kind, processes = re.match(r"(?:main|submitit)_(\w+)\.py", script)[1], 8
                given = words[words.index(script) + 1 :]
                folder = given[given.index("--output_dir" if launcher == "torchrun" else "--job_dir") + 1]
                if launcher == "submitit":
                    nodes = given.index("--nodes")
                    processes *= int(given[nodes + 1])
                    given = [*given[:nodes], *given[nodes + 4 :]]  # --nodes N --ngpus 8
                    job = given.index("--job_dir")
                    given = [*given[:job], *given[job + 2 :]]
                args = MAINS[kind].get_args_parser().parse_args(given)
                usual = {"pretrain": 4096, "finetune": 1024, "linprobe": 16384}[kind]
                wanted = usual if row.pretrain or kind != "finetune" else 4096
                assert args.batch_size * args.accum_iter * processes == wanted, (name, row.name)
                if getattr(args, "finetune", ""):
                    assert args.finetune in left, "what it starts from is left by a command before"
                left.add(f"{folder}/checkpoint-{args.epochs - 1}.pth")
                seen.add(kind)
    assert seen == set(MAINS)


def test_every_row_on_digits_is_one_that_its_scripts_take():
    for _, row in ALL_ROWS:
        for stage in runnable(row, "digits").values():
            for each in (stage, stage.after):
                if each:
                    args = MAINS[each.script].get_args_parser().parse_args(each.words("runs"))
                    assert args.device == "cpu" and args.log_dir == "" and args.epochs == each.epochs


def test_rows_that_share_a_pretraining_run_it_once_and_seeds_do_not():
    rows = [(name, row, runnable(row, "digits")) for name, row in ALL_ROWS]
    default = {stages[LINEAR].after.name for name, row, stages in rows
               if stages and row.pretrain and row.digits == "" and row.linprobe is not None}  # fmt: skip
    assert len(default) == 1
    everything = [stage.after.name for _, row, stages in rows for stage in stages.values() if stage.after]
    assert len(set(everything)) < len(everything) / 2
    row = EXPERIMENTS["figure5"].rows[0]
    assert stages_of(row, "digits", 0)[LINEAR].name != stages_of(row, "digits", 1)[LINEAR].name


def test_the_published_figures_are_those_of_the_documents():
    text = (ROOT / "PRETRAIN.md").read_text()
    ablations = text[text.index("Table 1; not measured here") :]
    for name in (f"table1{letter}" for letter in "abcdef"):
        for row in EXPERIMENTS[name].rows:
            assert f"{row.published[FINE_TUNED]} / {row.published[LINEAR]}" in ablations, (name, row.name)


def test_options_are_read_as_a_shell_would():
    assert options("--a 1 --flag --betas 0.9 0.95 --aa ''") == {"a": "1", "flag": "", "betas": "0.9 0.95", "aa": "''"}


MEASURED = {"a": {FINE_TUNED: [90.0, 92.0, 94.0]}, "b": {FINE_TUNED: [80.0]}}
TOY = Experiment("toy", [Row("a", published={FINE_TUNED: 84.9}), Row("b", published={FINE_TUNED: None})])


def test_the_table_has_mean_deviation_and_what_is_published():
    lines = report.table("toy1", TOY, TOY.rows, MEASURED, 3, "python -m experiments toy1").splitlines()
    assert lines[4:6] == ["| a | 92.0 ± 2.0 | 84.9 |", "| b | 80.0 | – |"]
    assert "3 seeds" in lines[7] and "`python -m experiments toy1`" in lines[7]


def test_error_bars_are_as_long_as_the_deviation():
    def blue_rows(values):
        picture = report.plot(TOY, TOY.rows, {"a": {FINE_TUNED: values}, "b": {FINE_TUNED: [80.0, 100.0]}})
        left = picture.width * 0.1
        column = next(x for x in range(int(left), picture.width // 2) if picture.getpixel((x, 60)) == report.PALE)
        return sum(picture.getpixel((column + 5, y)) == report.BLUE for y in range(41, 269))  # beside the paper's

    small, large = blue_rows([89.0, 91.0]), blue_rows([85.0, 95.0])
    assert large - 9 > 2 * (small - 9) > 0  # 9 pixels are the dot itself


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_page_shows_the_numbers_of_three_seeds(name):
    rows = json.loads((ROOT / "docs" / "experiments" / f"{name}.json").read_text())["rows"]
    page = (ROOT / "docs" / "EXPERIMENTS.md").read_text()
    assert f"`python -m experiments {name}`" in page and f"experiments/{name}.png" in page
    table = page.split(f"### {name}: ")[1].split("###")[0]
    shown = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines() if line.startswith("| ")}
    expected = [row for row in EXPERIMENTS[name].rows if runnable(row, "digits")]
    assert rows.keys() == {row.name for row in expected}
    for row in expected:
        for seeds in rows[row.name].values():
            values = np.array([seeds[seed]["acc1"] for seed in "012"])
            assert f"{values.mean():.1f} ± {values.std(ddof=1):.1f} |" in shown[row.name]


def start(output, *more):
    command = [sys.executable, "-m", "experiments", "figure5", "--rows", "10", "75", "--seeds", 1, "--jobs", 1,
               "--epochs_scale", 0.02, "--output", output, *more]  # fmt: skip
    return subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_figure_5_end_to_end_killed_and_continued(tmp_path):
    first = start(tmp_path)
    line = first.stdout.readline()
    assert re.match(r"figure5  1/2  (10|75): fine-tuned [\d.]+, linear probe [\d.]+  \(", line), first.stderr.read()
    time.sleep(2)  # into the next row
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = json.loads((tmp_path / "figure5" / "results.json").read_text())["rows"]
    assert len(before) == 1 and not (tmp_path / "figure5" / "table.md").exists()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/log.txt")
            if path.parent.name.startswith(("finetune", "linprobe"))}  # fmt: skip
    second = start(tmp_path)
    said, wrong = second.communicate(timeout=400)
    assert second.returncode == 0, wrong
    assert {path: path.stat().st_mtime_ns for path in done} == done, "what is done is not done again"
    after = json.loads((tmp_path / "figure5" / "results.json").read_text())["rows"]
    assert set(after) == {"10", "75"} and before.items() <= after.items()
    assert len(list(tmp_path.glob("runs/pretrain-*"))) == 2, "one for both numbers of a row"
    table = (tmp_path / "figure5" / "table.md").read_text()
    for row, numbers in after.items():
        fine_tuned, linear = (numbers[metric]["0"]["acc1"] for metric in (FINE_TUNED, LINEAR))
        assert f"| {row} | {fine_tuned:.1f} | " in table and f" | {linear:.1f} | " in table
    assert (tmp_path / "figure5" / "plot.png").stat().st_size > 1000 and table in said


@pytest.mark.parametrize(
    ("words", "word"), [((), "no experiment"), (("figure5", "--scale", "imagenet"), "--print"),
                        (("figure5", "--rows", "11"), "no row")]
)  # fmt: skip
def test_bad_input_is_named(words, word, capsys, monkeypatch, tmp_path):
    from experiments import __main__ as command
    from util.errors import UserError

    monkeypatch.setattr(command.digits, "written", lambda folder: folder)
    monkeypatch.setattr(command.digits, "write_tokenizer", lambda path, data: None)
    args = command.get_args_parser().parse_args([*words, "--output", str(tmp_path)])
    with pytest.raises(UserError, match=word):
        command.main(args)
