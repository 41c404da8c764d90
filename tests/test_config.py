"""--config, what a run leaves for it, --help by need, and the table of what differs from the defaults."""

import argparse
import re
import sys

import pytest
import yaml
from helpers import ON_CPU, assert_same, load, project_log, write_image_folder

import main_evaluate
import main_finetune
import main_linprobe
import main_pretrain
from util import cli, options
from util.errors import UserError
from util.run import resume, slurm

MAINS = {"pretrain": main_pretrain, "finetune": main_finetune, "linprobe": main_linprobe, "evaluate": main_evaluate}
PARSERS = {name: main.get_args_parser for name, main in MAINS.items()}
PARSERS |= {
    f"submitit {name}": lambda main=main: slurm.get_args_parser(main)
    for name, main in MAINS.items()
    if name != "evaluate"
}


def given(monkeypatch, name, *words):
    monkeypatch.setattr(sys, "argv", [f"main_{name}.py", *map(str, words)])
    return cli.parse(PARSERS[name](), "A script.")


def from_file(monkeypatch, tmp_path, name, text, *words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return given(monkeypatch, name, "--config", path, *words)


def refused(monkeypatch, tmp_path, capsys, name, text, *words):
    with pytest.raises(SystemExit) as exit_:
        from_file(monkeypatch, tmp_path, name, text, *words)
    assert exit_.value.code == 2
    usage, error = capsys.readouterr().err.strip().split("\n")
    assert usage.startswith("usage: main_") and "Traceback" not in error
    return error


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(monkeypatch, tmp_path):
    text = "batch_size: 8\nblr: 1e-3\nwarmup_epochs: 5\ninput_size: [64, 96]\n"
    args = from_file(monkeypatch, tmp_path, "pretrain", text, "--warmup_epochs", 7)
    assert (args.batch_size, args.blr, args.warmup_epochs, args.input_size) == (8, 1e-3, 7.0, (64, 96))
    assert args.epochs == 400 and not hasattr(args, "config")


SAME = [
    ("pretrain", "amp: off", "--amp=off"),  # which YAML takes for false
    ("pretrain", "compile: on", "--compile=on"),
    ("pretrain", "blr: 1e-3", "--blr=1e-3"),  # for text
    ("pretrain", "seed: 010", "--seed=010"),  # for 8
    ("pretrain", "norm_pix_loss: yes", "--norm_pix_loss"),
    ("pretrain", "norm_pix_loss: false", ""),
    ("pretrain", "pin_mem: off", "--no_pin_mem"),
    ("pretrain", "no_pin_mem: true", "--no_pin_mem"),
    ("pretrain", "no_pin_mem: 'False'", "--pin_mem"),
    ("pretrain", "input_size: 96", "--input_size=96"),
    ("pretrain", "input_size: [96]", "--input_size=96"),
    ("pretrain", "output_dir: ''", "--output_dir="),
    ("pretrain", "data_path: -x", "--data_path=-x"),
    ("pretrain", "data_path: null", ""),
    ("pretrain", "lr:", ""),
    ("pretrain", "", ""),
    ("pretrain", "# nothing\n", ""),
    ("pretrain", "train_split: 2012-01-01", "--train_split=2012-01-01"),  # for a date
    ("finetune", "cls_token: true", "--cls_token"),
    ("finetune", "global_pool: false", "--cls_token"),
    ("finetune", "cutmix_minmax: [0.2, 0.8]", "--cutmix_minmax 0.2 0.8"),
    ("pretrain", "in_chans: 2\nmean: [0.5, -4.2e-05]\nstd: [1, .5]", "--in_chans 2 --mean 0.5 -4.2e-05 --std 1 0.5"),
    ("finetune", "opt_betas: [0.9, 95e-2]", "--opt_betas 0.9 0.95"),
    ("finetune", "tune_blocks: null", "--tune_blocks=all"),
    ("finetune", "tune_blocks: all", ""),
    ("finetune", "aa: ''", "--aa="),
    ("evaluate", "set: [a=/x, b=/y]", "--set a=/x --set b=/y"),
    ("evaluate", "set: a=/x", "--set a=/x"),
    ("evaluate", "global_pool: null", ""),
    ("submitit pretrain", "job_dir: /x/%j\nnodes: 8", "--job_dir=/x/%j --nodes=8"),
]


@pytest.mark.parametrize(("name", "text", "words"), SAME)
def test_a_file_means_what_the_command_line_means(name, text, words, monkeypatch, tmp_path):
    assert from_file(monkeypatch, tmp_path, name, text) == given(monkeypatch, name, *words.split())


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("pretrain", "bath_size: 8", ["'bath_size'", "nearest: batch_size"]),
        ("pretrain", "batch-size: 8\nlearning_rates: 1", ["nearest: batch_size", "'learning_rates'"]),
        ("pretrain", "nodes: 8", ["'nodes'"]),
        ("pretrain", "config: x", ["'config'"]),
        ("pretrain", "help_all: true", ["'help_all'"]),
        ("pretrain", "batch_size: big", ["argument --batch_size", "'big' is not a whole number"]),
        ("pretrain", "batch_size: 1.5", ["argument --batch_size"]),
        ("pretrain", "batch_size: null", ["argument --batch_size", "null"]),
        ("pretrain", "batch_size: [1, 2]", ["argument --batch_size", "one value"]),
        ("pretrain", "batch_size: {a: 1}", ["argument --batch_size"]),
        ("pretrain", "Batch_Size: 8", ["nearest: batch_size"]),
        ("pretrain", f"epochs: {'9' * 5000}", ["argument --epochs", "'999"]),
        ("pretrain", "crop_ratio: 1", ["argument --crop_ratio", "2 values", "'1'"]),
        ("pretrain", "crop_ratio: [1, 2, 3]", ["argument --crop_ratio", "2 values", "'3'"]),
        ("pretrain", "mean: [0.5, --lr, 3]", ["argument --mean", "'--lr' is no value"]),
        ("pretrain", 'output_dir: "a\\0b"', ["argument --output_dir", "is no path"]),
        ("pretrain", "no_norm_pix_loss: true", ["nearest: norm_pix_loss"]),
        ("pretrain", "save_minutes: 1:30", ["argument --save_minutes", "1:30"]),
        ("pretrain", "input_size: [1, null]", ["argument --input_size", "null"]),
        ("pretrain", "input_size: [64, 64, 3]", ["argument --input_size", "3 numbers"]),
        ("pretrain", "input_size: []", ["argument --input_size"]),
        ("pretrain", "norm_pix_loss: 1", ["argument --norm_pix_loss", "true or false", "'1'"]),
        ("pretrain", "amp: maybe", ["argument --amp", "maybe"]),
        ("pretrain", "report_to: tensorbord", ["argument --report_to", "tensorbord"]),
        ("finetune", "cutmix_minmax: 0.2", ["argument --cutmix_minmax"]),
        ("finetune", "cls_token: true\nglobal_pool: true", ["cls_token and global_pool are one option"]),
        ("pretrain", "epochs: 3\nepochs: 4", ["epochs is given twice"]),
        ("pretrain", "epochs", ["lines such as"]),
        ("pretrain", "- epochs", ["lines such as"]),
        ("pretrain", "epochs: [", ["no YAML"]),
        ("pretrain", "[" * 5000, ["no YAML"]),
        ("pretrain", "epochs: !!python/object/apply:os.getcwd []", ["no YAML"]),
        ("pretrain", "? [1, 2]\n: 3", ["no YAML"]),
        ("pretrain", "1: 3", ["no option is named '1'"]),
        ("pretrain", "\x00", ["no YAML"]),
        ("pretrain", "epochs: &a [*a]", ["--epochs"]),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(name, text, words, monkeypatch, tmp_path, capsys):
    error = refused(monkeypatch, tmp_path, capsys, name, text)
    assert all(word in error for word in [str(tmp_path / "c.yaml"), *words]), error
    assert len(error) < 800


def test_a_file_that_is_not_there_or_no_text_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\xfd")
    for name, words in {"none.yaml": "No such file", "b.yaml": "no YAML", ".": "directory"}.items():
        with pytest.raises(SystemExit) as exit_:
            given(monkeypatch, "pretrain", "--config", tmp_path / name)
        assert exit_.value.code == 2
        assert words in (error := capsys.readouterr().err) and f"--config {tmp_path}" in error


def test_an_error_of_the_command_line_does_not_blame_the_file(monkeypatch, tmp_path, capsys):
    error = refused(monkeypatch, tmp_path, capsys, "pretrain", "epochs: 3", "--epochs", "x")
    assert "--config" not in error and "'x'" in error


@pytest.mark.parametrize("name", PARSERS)
def test_the_command_line_wins_over_each_flag_of_the_file(name, monkeypatch, tmp_path):
    for action in PARSERS[name]()._actions:
        if action.nargs == 0:
            (option,) = action.option_strings
            opposite = f"--no_{action.dest}" if action.const else f"--{action.dest}"
            if action.dest == "global_pool":
                opposite = {"--global_pool": "--cls_token", "--cls_token": "--global_pool"}[option]
            args = from_file(monkeypatch, tmp_path, name, f"{option.removeprefix('--')}: true", opposite)
            assert getattr(args, action.dest) == (not action.const)


def test_repeated_options_of_the_command_line_replace_those_of_the_file(monkeypatch, tmp_path):
    args = from_file(monkeypatch, tmp_path, "evaluate", "set: [a=/x, b=/y]", "--set", "c=/z")
    assert [name for name, _ in args.set] == ["c"]


# what a run leaves


FULL = {
    "pretrain": "--data_path /x --norm_pix_loss --input_size 64 96 --blr 1.5e-4 --no_pin_mem --target pca --lr 1e-5",
    "finetune": "--data_path ~/x --in_chans 4 --mean -1e-5 -3 -.5 -2.5E+03 --std 1 2 3 4e-3 --cls_token "
    "--cutmix_minmax 0.2 0.8 --tune_blocks 0.5 --opt_betas 0.9 0.95 --aa= --report_to wandb,mlflow --reprob 0",
    "linprobe": "--data_path null --output_dir= --train_split on --val_split ~ --dataset 007 --crop_min 1e-1",
    "evaluate": "--set a=/x --set b=/y=z --imagenet_c /c --input_size 448 --predictions é.csv",
}


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("more", [True, False])
def test_the_file_that_a_run_leaves_is_the_same_run(name, more, monkeypatch, tmp_path):
    args = given(monkeypatch, name, *(FULL[name].split() if more else ()))
    options.write(args, tmp_path)
    assert given(monkeypatch, name, "--config", tmp_path / "config.yaml") == args
    assert list(yaml.safe_load((tmp_path / "config.yaml").read_text())) == list(vars(args)), "any reader's YAML"


def test_options_of_a_submission_are_not_those_of_its_run(monkeypatch, tmp_path):
    args = given(monkeypatch, "submitit linprobe", "--job_dir", "/x/%j", "--epochs", 3)
    options.write(args, tmp_path, resume.SUBMISSION)
    own = vars(given(monkeypatch, "linprobe", "--config", tmp_path / "config.yaml"))
    assert own["epochs"] == 3 and vars(args).keys() - own.keys() == resume.SUBMISSION
    assert given(monkeypatch, "submitit linprobe", "--config", tmp_path / "config.yaml", "--job_dir", "/x/%j") == args


def test_a_file_of_other_options_is_kept(monkeypatch, tmp_path):
    def start(*words):
        with project_log() as lines:
            options.write(given(monkeypatch, "pretrain", *words), tmp_path)
        return " ".join(lines)

    assert start("--epochs", 1) == "" and start("--epochs", 1) == ""
    assert "config-1.yaml" in start("--epochs", 2) and "config-2.yaml" in start("--epochs", 3)
    assert start("--epochs", 3) == ""
    epochs = {path.name: yaml.safe_load(path.read_text())["epochs"] for path in tmp_path.iterdir()}
    assert epochs == {"config.yaml": 3, "config-1.yaml": 1, "config-2.yaml": 2}
    (tmp_path / "config.yaml").write_text("epochs: [")  # edited, and broken
    start("--epochs", 3)
    assert (tmp_path / "config-3.yaml").read_text() == "epochs: ["


def test_a_full_disk_stops_no_run(monkeypatch, tmp_path):
    with project_log() as lines:
        options.write(given(monkeypatch, "pretrain"), tmp_path / "not there")
    assert "CANNOT BE WRITTEN" in lines[0]


# help, and the table


def said(monkeypatch, capsys, name, option):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        given(monkeypatch, name, option)
    assert exit_.value.code in (0, None)
    return capsys.readouterr().out


def shown_options(text):
    return re.findall(r"^  (?:-h, )?--(\w+)", text, re.MULTILINE)


@pytest.mark.parametrize("name", PARSERS)
def test_help_has_what_is_needed_first_in_less_than_100_lines(name, monkeypatch, capsys):
    text = said(monkeypatch, capsys, name, "--help")
    assert len(text.splitlines()) < 100
    shown = shown_options(text)
    assert shown[0] == ("resume" if name == "evaluate" else "data_path") and "config" in shown
    assert set(shown) <= set(options.NEEDED) and shown == sorted(shown, key=options.NEEDED.index)
    every = shown_options(said(monkeypatch, capsys, name, "--help_all"))
    own = [string for action in PARSERS[name]()._actions for string in action.option_strings]
    assert sorted(every) == sorted([string.removeprefix("--") for string in own] + ["help", "help_all", "config"])
    assert every[: len(shown)] == shown and f"--help_all lists {len(every) - len(shown)} more" in text


def test_each_needed_option_is_one_of_some_script(monkeypatch, capsys):
    known = {string for name in PARSERS for a in PARSERS[name]()._actions for string in a.option_strings}
    assert {f"--{name}" for name in options.NEEDED} - known == {"--config", "--help", "--help_all"}


def test_the_table_has_what_differs_from_the_defaults(monkeypatch):
    args = given(monkeypatch, "pretrain", "--data_path", "/a b", "--blr", 1e-3, "--epochs", 7, "--no_pin_mem")
    args.extra = 3
    command, head, *rows = options.table(args, main_pretrain.get_args_parser()).split("\n")
    assert command == "command: main_pretrain.py --data_path '/a b' --blr 0.001 --epochs 7 --no_pin_mem"
    assert head.split() == ["option", "value", "default"]
    cells = {row.split("  ")[1]: row for row in rows}
    assert set(cells) == {"--epochs", "--data_path", "--pin_mem", "--extra"}
    assert cells["--epochs"].split() == ["--epochs", "7", "400"]
    assert cells["--pin_mem"].split() == ["--pin_mem", "off", "on"]
    assert len({row.rindex(row.split()[-1]) for row in [head, *rows]}) == 1, "aligned"
    plain = options.table(argparse.Namespace(**vars(given(monkeypatch, "pretrain"))), main_pretrain.get_args_parser())
    assert plain == "command: main_pretrain.py"


def test_a_run_that_is_started_from_its_file_is_the_same_run(monkeypatch, tmp_path):
    """Of the script itself, with its checks: refused in the folder that holds it, and elsewhere bit for bit."""
    images, (first, second) = write_image_folder(tmp_path / "images", 4, 1), (tmp_path / "a", tmp_path / "b")
    tiny = ("--model", "mae_vit_tiny_patch4", "--input_size", 16, "--batch_size", 4, "--num_workers", 0, *ON_CPU)
    where = ("--output_dir", first, "--log_dir", "")
    args = given(
        monkeypatch, "pretrain", *tiny, *where, "--data_path", images, "--epochs", 1, "--norm_pix_loss", "--seed", 3
    )
    main_pretrain.main(args)
    config = ("--config", first / "config.yaml")
    with pytest.raises(UserError, match="holds a run already .*--resume auto"):
        main_pretrain.main(given(monkeypatch, "pretrain", *config))
    main_pretrain.main(given(monkeypatch, "pretrain", *config, "--output_dir", second))
    assert_same(load(first / "checkpoint-0.pth")["model"], load(second / "checkpoint-0.pth")["model"])
    assert "norm_pix_loss: true" in (second / "config.yaml").read_text()
    said = (first / "train.log").read_text()
    assert "Namespace(" not in said and re.search(r"--seed +3 +0\n", said)
