"""The command line: options and defaults as people know them, help, and what is refused with which message."""

import argparse
import re
import runpy
import sys

import pytest
import torch
from helpers import ON_CPU, ROOT, project_log, write_image_folder

import main_evaluate
import main_finetune
import main_linprobe
import main_pretrain
import models_mae
import models_vit
from util import cli
from util.errors import UserError
from util.run import exits, slurm
from util.step import Step

MAINS = {"pretrain": main_pretrain, "finetune": main_finetune, "linprobe": main_linprobe}
SCRIPTS = [f"{kind}_{name}.py" for kind in ("main", "submitit") for name in MAINS]

# name: (pretrain, finetune, linprobe); ABSENT where the script has no such option
ABSENT = object()
DEFAULTS = {
    "batch_size": (64, 64, 512),
    "epochs": (400, 50, 90),
    "accum_iter": (1, 1, 1),
    "model": ("mae_vit_large_patch16", "vit_large_patch16", "vit_large_patch16"),
    "input_size": (224, 224, 224),
    "mask_ratio": (0.75, ABSENT, ABSENT),
    "norm_pix_loss": (False, ABSENT, ABSENT),
    "weight_decay": (0.05, 0.05, 0),
    "lr": (None, None, None),
    "blr": (1e-3, 1e-3, 0.1),
    "min_lr": (0, 1e-6, 0),
    "warmup_epochs": (40, 5, 10),
    "drop_path": (ABSENT, 0.1, ABSENT),
    "clip_grad": (ABSENT, None, ABSENT),
    "layer_decay": (ABSENT, 0.75, ABSENT),
    "color_jitter": (ABSENT, None, ABSENT),
    "aa": (ABSENT, "rand-m9-mstd0.5-inc1", ABSENT),
    "smoothing": (ABSENT, 0.1, ABSENT),
    "reprob": (ABSENT, 0.25, ABSENT),
    "remode": (ABSENT, "pixel", ABSENT),
    "recount": (ABSENT, 1, ABSENT),
    "resplit": (ABSENT, False, ABSENT),
    "mixup": (ABSENT, 0, ABSENT),
    "cutmix": (ABSENT, 0, ABSENT),
    "cutmix_minmax": (ABSENT, None, ABSENT),
    "mixup_prob": (ABSENT, 1.0, ABSENT),
    "mixup_switch_prob": (ABSENT, 0.5, ABSENT),
    "mixup_mode": (ABSENT, "batch", ABSENT),
    "finetune": (ABSENT, "", ""),
    "global_pool": (ABSENT, True, False),
    "nb_classes": (ABSENT, 1000, 1000),
    "eval": (ABSENT, False, False),
    "dist_eval": (ABSENT, False, False),
    "data_path": (None, None, None),  # on purpose: no site's folder
    "output_dir": ("./output_dir",) * 3,
    "log_dir": ("./output_dir",) * 3,
    "device": ("auto",) * 3,  # on purpose: the best one present
    "seed": (0, 0, 0),
    "resume": ("", "", ""),
    "start_epoch": (0, 0, 0),
    "num_workers": (10, 10, 10),
    "pin_mem": (True, True, True),
    "world_size": (1, 1, 1),
    "local_rank": (-1, -1, -1),
    "dist_url": ("env://",) * 3,
    "dist_on_itp": (False, False, False),
}  # fmt: skip
# what ours adds
NEW = {
    "amp": ("auto",) * 3,
    "compile": ("auto",) * 3,
    "grad_checkpointing": (False, False, False),
    "crop_min": (0.2, 0.08, 0.08),  # as in the recipes
    "hflip": (0.5,) * 3,
    "skip_bad_images": (False, False, False),
    "save_every": (20, 1, 1),  # epochs between checkpoints, which were fixed in the original
    "save_minutes": (30.0,) * 3,
    "keep_last": (None,) * 3,
    "async_save": ("auto",) * 3,
    "dist_timeout": (10.0,) * 3,
    "on_nan": ("stop",) * 3,
    "loader_timeout": (600.0,) * 3,
}  # fmt: skip
DEFAULTS |= NEW
SUBMISSION = {
    "ngpus": 8, "nodes": 2, "timeout": 4320, "job_dir": "", "partition": "", "use_volta32": False, "comment": "",
}  # fmt: skip


def parse(name, *args):
    return MAINS[name].get_args_parser().parse_args([str(arg) for arg in args])


# options and defaults


@pytest.mark.parametrize("option", DEFAULTS)
@pytest.mark.parametrize("name", MAINS)
def test_option_has_the_known_default(name, option):
    expected = dict(zip(MAINS, DEFAULTS[option], strict=True))[name]
    if expected is ABSENT:
        return  # ours may accept more
    assert vars(parse(name))[option] == expected
    assert isinstance(vars(parse(name))[option], bool) == isinstance(expected, bool)
    assert f"--{option}" in MAINS[name].get_args_parser()._option_string_actions


@pytest.mark.parametrize("name", MAINS)
def test_flags_switch_their_option(name):
    flags = ["dist_on_itp", *(["norm_pix_loss"] if name == "pretrain" else ["eval", "dist_eval"])]
    args = vars(parse(name, *[f"--{flag}" for flag in flags], "--no_pin_mem"))
    assert all(args[flag] is True for flag in flags)
    assert args["pin_mem"] is False
    assert parse(name, "--no_pin_mem", "--pin_mem").pin_mem is True


@pytest.mark.parametrize("name", ["finetune", "linprobe"])
def test_pooling_is_chosen_by_two_flags(name):
    assert parse(name, "--global_pool").global_pool is True
    assert parse(name, "--cls_token").global_pool is False


def test_published_pretraining_command_is_understood():
    parser = slurm.get_args_parser(main_pretrain)
    args = parser.parse_args(
        "--job_dir /jobs --nodes 8 --use_volta32 --batch_size 64 --model mae_vit_large_patch16 --norm_pix_loss "
        "--mask_ratio 0.75 --epochs 800 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --data_path /in".split()
    )
    assert (args.nodes, args.ngpus, args.epochs, args.blr) == (8, 8, 800, 1.5e-4)
    assert args.use_volta32 and args.norm_pix_loss


def test_published_finetuning_command_is_understood():
    args = main_finetune.get_args_parser().parse_args(
        "--accum_iter 4 --batch_size 32 --model vit_base_patch16 --finetune c.pth --epochs 100 --blr 5e-4 "
        "--layer_decay 0.65 --weight_decay 0.05 --drop_path 0.1 --mixup 0.8 --cutmix 1.0 --reprob 0.25 --dist_eval "
        "--data_path /in --local_rank 3 --color_jitter 0.4 --clip_grad 3 --cutmix_minmax 0.2 0.8 --remode rand".split()
    )
    assert (args.accum_iter, args.layer_decay, args.mixup, args.cutmix) == (4, 0.65, 0.8, 1.0)
    assert args.dist_eval and args.cutmix_minmax == [0.2, 0.8]


@pytest.mark.parametrize(
    ("given", "expected"), [(["64"], 64), (["64", "96"], (64, 96)), (["96", "64"], (96, 64)), (["64", "64"], (64, 64))]
)
@pytest.mark.parametrize("name", MAINS)
def test_input_size_is_a_side_or_height_and_width(name, given, expected):
    assert parse(name, "--input_size", *given).input_size == expected


@pytest.mark.parametrize("name", MAINS)
def test_submission_adds_its_options_and_keeps_the_script_s(name):
    args = vars(slurm.get_args_parser(MAINS[name]).parse_args([]))
    assert {option: args[option] for option in SUBMISSION} == SUBMISSION
    own = vars(parse(name))
    assert {option: args[option] for option in own} == own


# help


def help_of(script, monkeypatch, capsys):
    """What `python SCRIPT --help_all` prints: option -> its text on one line."""
    monkeypatch.setenv("COLUMNS", "10000")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "argv", [script, "--help_all"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert exit_.value.code in (0, None)
    text = capsys.readouterr().out
    return {match[1]: match[0] for match in re.finditer(r"^ +(?:-h, )?--(\w+).*(?:\n {10,}.*)*", text, re.MULTILINE)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_default_and_the_models(script, monkeypatch, capsys):
    name = re.match(r"\w+_(\w+)\.py", script)[1]
    shown = help_of(script, monkeypatch, capsys)
    options = {option: values[list(MAINS).index(name)] for option, values in DEFAULTS.items()}
    options |= SUBMISSION if script.startswith("submitit") else {}
    for option, default in options.items():
        if default is ABSENT:
            continue
        if isinstance(default, bool):
            default = "on" if default else "off"
        # 0 and 0.0 are the same number
        wanted = [f"(default: {'none' if default in (None, '') else default})", f"(default: {default}.0)"]
        assert any(text in shown[option] for text in wanted), shown[option]
    assert all("(default: " in text for option, text in shown.items() if not option.startswith("help")), shown
    models = models_mae.MODELS if name == "pretrain" else models_vit.MODELS
    assert all(re.search(rf"\b{model}\b", shown["model"]) for model in models)


def test_help_of_pretraining_names_no_option_that_it_lacks(monkeypatch, capsys):
    assert "--aa" in help_of("main_finetune.py", monkeypatch, capsys)["decode"]
    shown = help_of("main_pretrain.py", monkeypatch, capsys)
    named = set(re.findall(r"--([a-z]\w+)", " ".join(shown.values())))
    assert named <= set(shown), named - set(shown)


# values that are refused


BAD = [
    ("pretrain", "mask_ratio", "0"), ("pretrain", "mask_ratio", "1"), ("pretrain", "mask_ratio", "-0.5"),
    ("pretrain", "mask_ratio", "1.5"), ("pretrain", "mask_ratio", "nan"), ("pretrain", "mask_ratio", "abc"),
    ("pretrain", "model", "vit_base_patch16"), ("finetune", "model", "mae_vit_base_patch16"),
    *[(name, "batch_size", value) for name in MAINS for value in ("0", "-1", "1.5")],
    ("pretrain", "epochs", "0"), ("pretrain", "accum_iter", "0"), ("pretrain", "save_every", "0"),
    ("pretrain", "lr", "-0.1"), ("finetune", "lr", "nan"), ("linprobe", "lr", "inf"), ("pretrain", "blr", "-1e-3"),
    ("finetune", "min_lr", "-1e-6"), ("finetune", "weight_decay", "-0.05"), ("finetune", "warmup_epochs", "-1"),
    ("pretrain", "input_size", "0"), ("pretrain", "input_size", "-32"), ("pretrain", "input_size", "big"),
    ("finetune", "drop_path", "1.5"), ("finetune", "clip_grad", "0"), ("finetune", "layer_decay", "0"),
    ("finetune", "smoothing", "-0.1"), ("finetune", "smoothing", "1"), ("finetune", "reprob", "2"),
    ("finetune", "remode", "blue"), ("finetune", "recount", "0"), ("finetune", "mixup", "-1"),
    ("finetune", "cutmix", "nan"), ("finetune", "mixup_prob", "1.1"), ("finetune", "mixup_mode", "all"),
    ("finetune", "nb_classes", "0"), ("linprobe", "nb_classes", "ten"), ("pretrain", "num_workers", "-1"),
    ("pretrain", "seed", "-1"), ("pretrain", "start_epoch", "-1"), ("pretrain", "amp", "int8"),
    ("pretrain", "crop_min", "0"), ("linprobe", "crop_min", "1.1"), ("pretrain", "hflip", "-0.5"),
    ("linprobe", "compile", "maybe"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "option", "value"), BAD)
def test_bad_value_is_refused_by_name(name, option, value, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(name, f"--{option}={value}")
    assert exit_.value.code == 2
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert f"argument --{option}" in last and value in last


PARSERS = {
    "submitit": slurm.get_args_parser(main_finetune),
    **{name: main.get_args_parser() for name, main in {**MAINS, "evaluate": main_evaluate}.items()},
}
PATHS = [(name, a.dest) for name in PARSERS for a in PARSERS[name]._actions if a.metavar in ("FILE", "FOLDER")]


def test_all_options_that_take_paths_are_seen():
    assert {("submitit", "job_dir"), ("pretrain", "init"), ("evaluate", "imagenet_c")} < set(PATHS) and len(PATHS) > 25


@pytest.mark.parametrize(("name", "option"), PATHS)
def test_tilde_is_the_home_folder_though_the_shell_leaves_it_alone(name, option, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    parser = PARSERS[name]
    for given, meant in {
        "~/x": "/home/me/x", "~": "/home/me", "~/a/~/b": "/home/me/a/~/b", "./~x": "./~x", "/a/~/b": "/a/~/b", "": "",
        "https://host/~me/w.pth": "https://host/~me/w.pth",
    }.items():  # fmt: skip
        assert vars(parser.parse_args([f"--{option}={given}"]))[option] == meant
    with pytest.raises(SystemExit):
        parser.parse_args([f"--{option}=~nobody-of-this-name/x"])
    assert f"argument --{option}" in capsys.readouterr().err


def test_three_sides_are_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("pretrain", "--input_size", "64", "96", "3")
    assert exit_.value.code == 2
    assert "--input_size" in (error := capsys.readouterr().err) and "3 numbers" in error


def test_options_without_effect_are_named_in_a_warning():
    args = parse("finetune", "--local_rank", "1", "--resplit", "--dist_on_itp")
    with project_log() as lines:
        cli.warn_ineffective(args)
        cli.warn_ineffective(parse("finetune"))
    assert len(lines) == 1
    assert all(option in lines[0] for option in ("--local_rank", "--resplit", "--dist_on_itp"))


def test_user_error_ends_with_its_message_alone(capsys):
    def main(args):
        raise UserError("lower --batch_size")

    with pytest.raises(SystemExit) as exit_:
        exits.run(main, argparse.Namespace())
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: lower --batch_size\n"


# submission


def submit(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["submitit_pretrain.py", *map(str, args)])
    with pytest.raises(SystemExit) as exit_:
        slurm.submit(main_pretrain)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ")
    return err


def test_submission_without_job_dir_says_what_to_set(monkeypatch, capsys):
    error = submit(monkeypatch, capsys)
    assert "--job_dir" in error and "%j" in error


def test_submission_without_submitit_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", None)  # import raises ImportError
    assert "pip install submitit" in submit(monkeypatch, capsys, "--job_dir", tmp_path)


def test_local_submission_of_two_nodes_is_refused(monkeypatch, capsys, tmp_path):
    assert "--nodes" in submit(monkeypatch, capsys, "--cluster", "local", "--nodes", 2, "--job_dir", tmp_path)


class Recorder:
    """Stands in for submitit's executor."""

    def __init__(self, **given):
        self.given = given
        Recorder.last = self

    def update_parameters(self, **parameters):
        self.parameters = parameters

    def submit(self, job):
        self.job = job
        return argparse.Namespace(job_id="4711")


def test_submission_asks_slurm_for_what_its_options_say(monkeypatch, capsys, tmp_path):
    import submitit

    monkeypatch.setattr(submitit, "AutoExecutor", Recorder)
    monkeypatch.setenv("PYTHONPATH", "")  # submission adds the project to it
    options = "--nodes 3 --ngpus 4 --timeout 60 --partition gpu --use_volta32 --comment urgent --epochs 7".split()
    monkeypatch.setattr(sys, "argv", ["submitit_pretrain.py", "--job_dir", str(tmp_path / "new" / "%j"), *options])
    slurm.submit(main_pretrain)
    assert capsys.readouterr().out == "4711\n"
    expected = {
        "name": "mae", "nodes": 3, "tasks_per_node": 4, "gpus_per_node": 4, "cpus_per_task": 10, "mem_gb": 160,
        "timeout_min": 60, "slurm_partition": "gpu", "slurm_constraint": "volta32gb", "slurm_comment": "urgent",
    }  # fmt: skip
    assert Recorder.last.parameters.items() >= expected.items()
    assert Recorder.last.given["folder"] == str(tmp_path / "new" / "%j")
    assert (tmp_path / "new").is_dir()
    job = Recorder.last.job
    assert job.script is main_pretrain and job.args.epochs == 7
    # what submitit submits at SLURM's warning signal is the same job
    again = job.checkpoint().function
    assert isinstance(again, slurm.Job) and (again.script, again.args) == (job.script, job.args)


def test_submission_asks_for_no_more_than_was_said(monkeypatch, tmp_path):
    import submitit

    monkeypatch.setattr(submitit, "AutoExecutor", Recorder)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "argv", ["submitit_pretrain.py", "--job_dir", str(tmp_path), "--device", "cpu"])
    slurm.submit(main_pretrain)
    absent = {"slurm_partition", "slurm_constraint", "slurm_comment", "gpus_per_node"}
    assert not absent & Recorder.last.parameters.keys()
    assert (Recorder.last.parameters["nodes"], Recorder.last.parameters["tasks_per_node"]) == (2, 8)


# what main() refuses before the first step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("images"), n_train=2, n_val=1)


def refused(monkeypatch, name, *args):
    """The message of the UserError that main() raises before it takes a step."""

    def no_step(*_, **__):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(Step, "__call__", no_step)
    model = "mae_vit_tiny_patch4" if name == "pretrain" else "vit_tiny_patch4"
    common = ["--model", model, "--input_size", 32, "--batch_size", 2, "--num_workers", 0, *ON_CPU]
    nowhere = ["--output_dir", "", "--log_dir", ""]
    classes = [] if name == "pretrain" else ["--nb_classes", 3]
    with pytest.raises(UserError) as error:
        MAINS[name].main(parse(name, *common, *nowhere, *classes, *args))
    return error.value.message


each_script = pytest.mark.parametrize("name", MAINS)
each_classifier = pytest.mark.parametrize("name", ["finetune", "linprobe"])


@each_script
def test_crop_ratio_reaches_the_crop(name, monkeypatch, folder):
    assert "--crop_ratio 2.0 0.5" in refused(monkeypatch, name, "--data_path", folder, "--crop_ratio", 2, 0.5)


@each_script
def test_no_data_path_is_refused(name, monkeypatch):
    assert "--data_path is not given" in refused(monkeypatch, name)


@each_script
def test_missing_folder_is_refused_by_name(name, monkeypatch, tmp_path):
    assert str(tmp_path / "nowhere") in refused(monkeypatch, name, "--data_path", tmp_path / "nowhere")


@each_classifier
@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_split_is_refused_by_name(name, split, monkeypatch, tmp_path):
    write_image_folder(tmp_path, 2, 1)
    (tmp_path / split).rename(tmp_path / "elsewhere")
    message = refused(monkeypatch, name, "--data_path", tmp_path)
    assert str(tmp_path / split) in message and "train/ and val/" in message


def test_folder_without_images_is_refused_for_pretraining(monkeypatch, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    assert f"no images below {tmp_path}" in refused(monkeypatch, "pretrain", "--data_path", tmp_path)


@each_classifier
@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class_folder_is_refused_by_name(name, split, monkeypatch, tmp_path):
    write_image_folder(tmp_path, 2, 1)
    (tmp_path / split / "dog").mkdir()
    message = refused(monkeypatch, name, "--data_path", tmp_path, "--nb_classes", 4)
    assert "'dog'" in message and "no image" in message


@each_classifier
def test_different_class_lists_are_refused_by_name(name, monkeypatch, tmp_path):
    write_image_folder(tmp_path, 2, 1)
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "dog")
    message = refused(monkeypatch, name, "--data_path", tmp_path)
    assert "only in train ['cat']" in message and "only in val ['dog']" in message


@each_classifier
def test_other_number_of_classes_is_refused_with_both_numbers(name, folder, monkeypatch):
    message = refused(monkeypatch, name, "--data_path", folder, "--nb_classes", 1000)
    assert "--nb_classes 1000" in message and "3 class folders" in message


@each_script
def test_batch_larger_than_the_data_is_refused_with_both_numbers(name, folder, monkeypatch):
    message = refused(monkeypatch, name, "--data_path", folder, "--batch_size", 4, "--accum_iter", 2)
    assert "6 training images" in message and "step of 8" in message and "--batch_size" in message


@pytest.mark.parametrize("mixing", [["--mixup", 0.8], ["--cutmix", 1.0], ["--cutmix_minmax", 0.2, 0.8]])
def test_odd_batch_is_refused_with_mixing(mixing, folder, monkeypatch):
    message = refused(monkeypatch, "finetune", "--data_path", folder, "--batch_size", 3, *mixing)
    assert "--batch_size 3 is odd" in message


@each_script
@pytest.mark.parametrize(("size", "bad"), [([30], 30), ([32, 34], 34), ([34, 32], 34)])
def test_size_that_patches_do_not_divide_is_refused_with_sizes_that_do(name, size, bad, folder, monkeypatch):
    message = refused(monkeypatch, name, "--data_path", folder, "--input_size", *size)
    below = bad // 4 * 4
    assert str(bad) in message and f"{below} or {below + 4}" in message


@pytest.mark.parametrize("ratio", [1e-9, 0.999])
def test_ratio_that_leaves_no_patch_on_one_side_is_refused(ratio, folder, monkeypatch):
    message = refused(monkeypatch, "pretrain", "--data_path", folder, "--mask_ratio", ratio)
    assert f"mask_ratio {ratio}" in message and "64 patches" in message


@each_classifier
def test_evaluation_without_a_checkpoint_is_refused(name, folder, monkeypatch):
    assert "--resume" in refused(monkeypatch, name, "--data_path", folder, "--eval")


@pytest.mark.parametrize("accum_iter", [1, 4])
def test_probe_of_one_image_a_process_is_refused(accum_iter, folder, monkeypatch):
    """Batch normalisation has no deviation of one image, however many batches make a step."""
    options = ("--data_path", folder, "--batch_size", 1, "--accum_iter", accum_iter)
    message = refused(monkeypatch, "linprobe", *options)
    assert "--batch_size 1" in message and "2 or more" in message


@each_script
def test_missing_checkpoint_is_refused_by_name(name, folder, monkeypatch):
    assert "no checkpoint lost.pth" in refused(monkeypatch, name, "--data_path", folder, "--resume", "lost.pth")


@each_script
def test_cuda_without_a_gpu_is_refused(name, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused(monkeypatch, name, "--data_path", folder, "--device", "cuda")
    assert "--device cuda" in message and "--device cpu" in message


def test_unknown_device_is_refused_by_name(folder, monkeypatch):
    assert "--device abacus" in refused(monkeypatch, "pretrain", "--data_path", folder, "--device", "abacus")


@pytest.mark.parametrize(
    ("option", "values"), [("--aa", ["nonsense"]), ("--cutmix_minmax", [0.8, 0.2])], ids=["aa", "cutmix_minmax"]
)
def test_augmentation_that_cannot_be_is_refused_by_name(option, values, folder, monkeypatch):
    assert option in refused(monkeypatch, "finetune", "--data_path", folder, option, *values)


def test_auto_takes_the_cpu_where_there_is_nothing_better(monkeypatch):
    from util.dist import init_distributed

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    env = init_distributed("auto")
    assert (env.device.type, env.rank, env.world_size) == ("cpu", 0, 1)
