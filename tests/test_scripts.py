"""The scripts from data to files: what a run leaves, prints and resumes; evaluation; submission."""

import json
import logging
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ON_CPU, assert_same, load, run, write_image, write_image_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_linprobe
import main_pretrain
import models_mae
import models_vit
from util import speed
from util.dist import Dist
from util.log import setup_logging

MAINS = {"pretrain": main_pretrain, "finetune": main_finetune, "linprobe": main_linprobe}
SMALL = ("--input_size", 32, "--batch_size", 4, "--num_workers", 0, *ON_CPU)
PRETRAIN = (*SMALL, "--model", "mae_vit_tiny_patch4", "--warmup_epochs", 1)
CLASSIFY = (*SMALL, "--model", "vit_tiny_patch4", "--nb_classes", 3, "--warmup_epochs", 1)
# everything random that fine-tuning has: mixing, stochastic depth, RandAugment and erasing (the last three by default)
FINETUNE = (*CLASSIFY, "--mixup", 0.8, "--cutmix", 1.0, "--blr", 0.01)
LINPROBE = (*CLASSIFY, "--blr", 1.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 training and 9 validation images: 6 steps of 4; an odd number to evaluate."""
    return write_image_folder(tmp_path_factory.mktemp("images"))


def train(name, folder, *args):
    """Run main() in this process, writing into `folder`; returns the messages, which train.log holds too."""
    parser = MAINS[name].get_args_parser()
    output = [] if folder is None else ["--output_dir", folder, "--log_dir", folder]
    MAINS[name].main(parser.parse_args([str(arg) for arg in (*output, *args)]))
    if folder is None:
        return ""
    for handler in logging.getLogger("mae").handlers:
        handler.flush()
    lines = (Path(folder) / "train.log").read_text().splitlines()
    # each message comes after the time of day
    return "\n".join(re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", "", line) for line in lines)


def checkpoints(folder):
    """Names of checkpoints, without the link to the best."""
    return sorted(path.name for path in Path(folder).glob("checkpoint-*") if not path.is_symlink())


def log_txt(folder):
    return [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def pretrained(images, tmp_path_factory):
    """Three epochs without a stop: the folder, and what was said."""
    folder = tmp_path_factory.mktemp("pretrained")
    said = train("pretrain", folder, *PRETRAIN, "--data_path", images, "--epochs", 3, "--norm_pix_loss")
    return SimpleNamespace(folder=folder, said=said, last=folder / "checkpoint-2.pth")


@pytest.fixture(scope="module")
def finetuned(images, pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuned")
    said = train(
        "finetune", folder, *FINETUNE, "--data_path", images, "--epochs", 2, "--finetune", pretrained.last
    )  # fmt: skip
    return SimpleNamespace(folder=folder, said=said, last=folder / "checkpoint-1.pth")


@pytest.fixture(scope="module")
def probed(images, pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed")
    said = train(
        "linprobe", folder, *LINPROBE, "--data_path", images, "--epochs", 2, "--finetune", pretrained.last
    )  # fmt: skip
    return SimpleNamespace(folder=folder, said=said, last=folder / "checkpoint-1.pth")


@pytest.mark.parametrize("name", MAINS)
def test_scripts_choose_kernels_for_their_precision(name, images, tmp_path):
    options = {"pretrain": PRETRAIN, "finetune": FINETUNE, "linprobe": LINPROBE}[name]
    chosen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "choose_kernels", lambda model, dtype, device: chosen.append((type(model), dtype, device)))
        train(name, tmp_path, *options, "--data_path", images, "--epochs", 1, "--amp", "bf16")
    model = models_mae.MaskedAutoencoderViT if name == "pretrain" else models_vit.VisionTransformer
    assert chosen == [(model, torch.bfloat16, torch.device("cpu"))]


def test_classifiers_note_the_number_of_training_images(finetuned, probed):
    assert [load(run_.last)["n_images"] for run_ in (finetuned, probed)] == [24, 24]


# pretraining


def test_pretraining_saves_every_20_epochs_and_the_last(pretrained):
    assert checkpoints(pretrained.folder) == ["checkpoint-0.pth", "checkpoint-2.pth"]
    state = load(pretrained.last)
    told = {"world_size", "n_images", "images", "trained"}
    assert set(state) == {"model", "optimizer", "epoch", "scaler", "args", *told}
    assert state["epoch"] == 2 and state["n_images"] == 24 and state["args"]["mask_ratio"] == 0.75


def test_pretraining_writes_a_json_line_an_epoch(pretrained):
    lines = log_txt(pretrained.folder)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert all(set(line) == {"train_lr", "train_loss", "epoch"} for line in lines)
    assert all(math.isfinite(line["train_loss"]) and line["train_loss"] > 0 for line in lines)


def test_pretraining_learns(pretrained):
    first, *_, last = [line["train_loss"] for line in log_txt(pretrained.folder)]
    assert last < first


def test_learning_rate_is_scaled_warmed_up_and_cooled_down(pretrained):
    lr = 1e-3 * 4 / 256
    rates = [lr * i / 6 for i in range(6)]  # 6 steps an epoch, the first one of warm-up
    rates += [lr / 2 * (1 + math.cos(math.pi * i / 12)) for i in range(12)]
    means = [sum(rates[i : i + 6]) / 6 for i in (0, 6, 12)]
    assert [line["train_lr"] for line in log_txt(pretrained.folder)] == pytest.approx(means)


def curves(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_pretraining_draws_its_curves_over_a_thousand_points_an_epoch(pretrained):
    drawn = curves(pretrained.folder)
    assert set(drawn) == {"train_loss", "lr", "grad_norm", "images_per_second"}
    x = [int(1000 * (epoch + i / 6)) for epoch in range(3) for i in range(6)]
    assert [step for step, _ in drawn["train_loss"]] == [step for step, _ in drawn["lr"]] == x
    for line, first in zip(log_txt(pretrained.folder), (0, 6, 12), strict=True):
        for tag, key in (("train_loss", "train_loss"), ("lr", "train_lr")):
            mean = sum(value for _, value in drawn[tag][first : first + 6]) / 6
            assert mean == pytest.approx(line[key], rel=1e-5)


STEP_LINE = re.compile(
    r"^Epoch: \[(?P<epoch>\d+)\]  \[ *(?P<i>\d+)/(?P<n>\d+)\]  eta: \d+:\d\d:\d\d  lr: \d\.\d{6}  "
    r"loss: \d+\.\d{4} \(\d+\.\d{4}\)  time: \d+\.\d{4}  data: \d+\.\d{4}(?:  max mem: \d+)?  img/s: \d+\.\d  "
    r"grad_norm: \d+\.\d{4}$",
    re.MULTILINE,
)


def test_step_lines_have_the_known_format(pretrained):
    found = [(int(match["epoch"]), int(match["i"]), int(match["n"])) for match in STEP_LINE.finditer(pretrained.said)]
    assert found == [(epoch, i, 6) for epoch in range(3) for i in (0, 5)]


def test_steps_are_logged_every_20_with_medians_and_means(images, tmp_path):
    said = train("pretrain", tmp_path, *PRETRAIN, "--data_path", images, "--epochs", 1, "--batch_size", 1)
    matches = list(STEP_LINE.finditer(said))
    assert [match["i"] for match in matches] == ["0", "20", "23"]
    assert "[ 0/24]" in matches[0][0] and "[20/24]" in matches[1][0]
    losses = [value for _, value in curves(tmp_path)["train_loss"]]
    for match, n in zip(matches, (1, 21, 24), strict=True):
        median, mean = map(float, re.search(r"loss: (\S+) \((\S+)\)", match[0]).groups())
        window = sorted(losses[:n][-20:])
        assert median == pytest.approx((window[(len(window) - 1) // 2] + window[len(window) // 2]) / 2, abs=1e-4)
        assert mean == pytest.approx(sum(losses[:n]) / n, abs=1e-4)


# the same run again


RUNS = {"pretrain": (PRETRAIN + ("--norm_pix_loss",), 3), "finetune": (FINETUNE, 2), "linprobe": (LINPROBE, 2)}


def run_like(name, request):
    """(folder of the run without a stop, its options)."""
    args, epochs = RUNS[name]
    folder = request.getfixturevalue({"pretrain": "pretrained", "finetune": "finetuned", "linprobe": "probed"}[name])
    start = [] if name == "pretrain" else ["--finetune", request.getfixturevalue("pretrained").last]
    args = (*args, "--data_path", request.getfixturevalue("images"), "--epochs", epochs, *start)
    return folder, args


def assert_same_end(a, b):
    """Weights, optimizer and scaler: bit for bit."""
    for key in ("model", "optimizer", "scaler", "epoch"):
        assert_same(load(a)[key], load(b)[key], key)


@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_ends_bit_for_bit_as_the_one_without_a_stop(name, request, tmp_path):
    whole, args = run_like(name, request)
    said = train(name, tmp_path, *args, "--resume", whole.folder / "checkpoint-0.pth")
    assert "Epoch: [0]" not in said and "Epoch: [1]" in said
    assert_same_end(tmp_path / whole.last.name, whole.last)
    assert log_txt(tmp_path) == log_txt(whole.folder)[1:]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_number_of_workers_does_not_change_the_weights(name, request, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)  # else a small machine caps them
    whole, args = run_like(name, request)
    train(name, tmp_path, *args, "--num_workers", 2)
    assert_same_end(tmp_path / whole.last.name, whole.last)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_gradient_checkpointing_does_not_change_the_weights(name, request, tmp_path):
    # stochastic depth, too, is drawn the same way when a block is computed again
    whole, args = run_like(name, request)
    train(name, tmp_path, *args, "--grad_checkpointing")
    ours, theirs = load(tmp_path / whole.last.name)["model"], load(whole.last)["model"]
    for key in theirs:
        assert torch.allclose(ours[key], theirs[key], rtol=0, atol=1e-7), key


def test_seed_changes_the_weights(images, pretrained, tmp_path):
    train("pretrain", tmp_path, *PRETRAIN, "--data_path", images, "--epochs", 1, "--norm_pix_loss", "--seed", 1)
    ours, theirs = load(tmp_path / "checkpoint-0.pth"), load(pretrained.folder / "checkpoint-0.pth")
    assert not torch.equal(ours["model"]["cls_token"], theirs["model"]["cls_token"])


# classifiers


EVALUATED = re.compile(
    r"^\* Acc@1 (?P<acc1>\d+\.\d{3}) Acc@5 (?P<acc5>\d+\.\d{3}) loss (?P<loss>\d+\.\d{3})\n"
    r"Accuracy of the network on the (?P<n>\d+) test images: (?P<rounded>\d+\.\d)%(?P<more>\n.+)?$",
    re.MULTILINE,
)


@pytest.mark.parametrize("name", ["finetuned", "probed"])
def test_classifier_saves_logs_and_prints_every_epoch(name, request):
    result = request.getfixturevalue(name)
    assert checkpoints(result.folder) == ["checkpoint-0.pth", "checkpoint-1.pth"]
    lines = log_txt(result.folder)
    keys = {"train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"}
    assert [line["epoch"] for line in lines] == [0, 1] and all(set(line) == keys for line in lines)
    printed = list(EVALUATED.finditer(result.said))
    assert len(printed) == 2
    best = 0.0
    for match, line in zip(printed, lines, strict=True):
        for figure in ("acc1", "acc5", "loss"):
            assert match[figure] == f"{line[f'test_{figure}']:.3f}"
        assert match["n"] == "9" and match["rounded"] == f"{line['test_acc1']:.1f}"
        assert match["acc5"] == "100.000"  # among the best 3 of 3 classes
        best = max(best, line["test_acc1"])
        assert match["more"] == f"\nMax accuracy: {best:.2f}%"
    drawn = curves(result.folder)
    assert set(drawn) == {
        "loss",
        "lr",
        "grad_norm",
        "images_per_second",
        "perf/test_acc1",
        "perf/test_acc5",
        "perf/test_loss",
    }
    assert [step for step, _ in drawn["loss"]] == [int(1000 * (epoch + i / 6)) for epoch in (0, 1) for i in range(6)]
    for figure in ("acc1", "acc5", "loss"):
        expected = [(line["epoch"], pytest.approx(line[f"test_{figure}"])) for line in lines]
        assert drawn[f"perf/test_{figure}"] == expected


def test_number_of_parameters_is_that_of_the_trained_ones(finetuned, probed):
    tiny = sum(value.numel() for value in load(finetuned.last)["model"].values())
    assert log_txt(finetuned.folder)[0]["n_parameters"] == tiny
    assert log_txt(probed.folder)[0]["n_parameters"] == 64 * 3 + 3


def test_step_lines_of_classifiers_and_evaluation_have_the_known_format(finetuned):
    assert len(STEP_LINE.findall(finetuned.said)) == 4
    test_lines = re.findall(
        r"^Test:  \[(\d)/3\]  eta: \d:\d\d:\d\d  loss: \d+\.\d{4} \(\d+\.\d{4}\)  time: \S+  data: \S+$",
        finetuned.said,
        re.MULTILINE,
    )
    assert test_lines == ["0", "2"] * 2


@pytest.mark.parametrize(
    ("kind", "name", "args"), [("finetune", "finetuned", FINETUNE), ("linprobe", "probed", LINPROBE)]
)
def test_evaluation_prints_the_figures_of_the_last_epoch_and_no_more(kind, name, args, request, images, tmp_path):
    result = request.getfixturevalue(name)
    said = train(kind, tmp_path, *args, "--data_path", images, "--eval", "--resume", result.last)
    (match,) = EVALUATED.finditer(said)
    assert match[0] == list(EVALUATED.finditer(result.said))[-1][0].rsplit("\nMax", 1)[0]
    assert said.endswith(match[0]) and "Max accuracy" not in said and "Epoch:" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["train.log"]


def test_evaluation_needs_no_training_images(finetuned, tmp_path):
    (match,) = EVALUATED.finditer(evaluate_on(tmp_path, finetuned, n_val=2))
    assert match["n"] == "6"


def evaluate_on(root, finetuned, n_val, *args):
    """--eval on a new folder without train/."""
    images = write_image_folder(root / "images", n_train=0, n_val=n_val)
    resume = ["--eval", "--resume", finetuned.last]
    return train("finetune", root / "out", *FINETUNE, "--data_path", images, *resume, *args)


def test_broken_validation_images_are_listed(finetuned, tmp_path):
    write_image_folder(tmp_path / "images", n_train=0, n_val=2)
    broken = tmp_path / "images" / "val" / "bee" / "z.png"
    broken.write_bytes(b"no image")
    said = evaluate_on(tmp_path, finetuned, 2, "--skip_bad_images")
    assert "skipped 1 images" in said and str(broken) in said


def test_fine_tuning_changes_the_backbone_and_the_head(pretrained, finetuned):
    before, after = load(pretrained.last)["model"], load(finetuned.last)["model"]
    assert {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"} == after.keys() - before.keys()
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.3.mlp.fc1.weight"):
        # global pool: the class token takes part through attention alone, and learns too
        assert not torch.equal(before[name], after[name]), name
    assert after["head.weight"].abs().max() > 0


def test_probe_names_its_head_and_leaves_the_backbone(pretrained, probed):
    before, after = load(pretrained.last)["model"], load(probed.last)["model"]
    head = {"head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked", "head.1.weight", "head.1.bias"}
    assert {name for name in after if name.startswith("head.")} == head
    for name in after.keys() - head:
        assert torch.equal(before[name], after[name]), name
    assert "norm.weight" in after  # the probe reads the class token by default
    assert after["head.0.num_batches_tracked"] == 12
    first = load(probed.folder / "checkpoint-0.pth")["model"]
    assert not torch.equal(first["head.1.weight"], after["head.1.weight"])


def test_probe_of_the_pooled_tokens_runs(images, pretrained, tmp_path):
    start = ["--finetune", pretrained.last, "--global_pool", "--epochs", 1]
    train("linprobe", tmp_path, *LINPROBE, "--data_path", images, *start)
    assert "fc_norm.weight" in load(tmp_path / "checkpoint-0.pth")["model"]


# other inputs


def test_rectangles_run_through_all_three_scripts(images, tmp_path):
    size = ("--input_size", 16, 32, "--data_path", images, "--epochs", 1)
    train("pretrain", tmp_path / "p", *PRETRAIN, *size)
    start = ("--finetune", tmp_path / "p" / "checkpoint-0.pth")
    train("finetune", tmp_path / "f", *FINETUNE, *size, *start)
    train("linprobe", tmp_path / "l", *LINPROBE, *size, *start)
    for name in "pfl":
        assert load(tmp_path / name / "checkpoint-0.pth")["model"]["pos_embed"].shape == (1, 1 + 4 * 8, 64)
    # and on to a square of as many patches, where only the file's arguments tell the grid
    train("linprobe", tmp_path / "s", *LINPROBE, *size[3:], *start, "--input_size", 16)


@pytest.mark.parametrize("where", ["flat", "nested", "train"])
def test_pretraining_takes_images_without_classes(where, tmp_path):
    inside = {"flat": "", "nested": "a/b", "train": "train"}[where]
    for i in range(8):
        write_image(tmp_path / "images" / inside / f"{i}.png", i)
    if where == "train":  # where there is a train/, the rest is not for training
        write_image(tmp_path / "images" / "val" / "x.png", 9)
    said = train("pretrain", tmp_path / "out", *PRETRAIN, "--data_path", tmp_path / "images", "--epochs", 1)
    read = tmp_path / "images" / ("train" if where == "train" else "")
    assert f"images below {read}\n" in said and "8 training images, 2 batches" in said
    assert checkpoints(tmp_path / "out") == ["checkpoint-0.pth"]


def test_skipped_images_are_listed_every_epoch(tmp_path):
    for i in range(8):
        write_image(tmp_path / "images" / f"{i}.png", i)
    broken = tmp_path / "images" / "3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    args = (*PRETRAIN, "--data_path", tmp_path / "images", "--epochs", 2, "--skip_bad_images")
    said = train("pretrain", tmp_path / "out", *args)
    assert said.count("skipped 1 images") == 2 and said.count(str(broken)) == 2


@pytest.mark.parametrize("name", RUNS)
def test_empty_output_dir_saves_nothing(name, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(name, None, *RUNS[name][0], "--data_path", images, "--epochs", 1, "--output_dir", "", "--log_dir", "")
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_may_be_elsewhere_or_nowhere(images, tmp_path):
    args = (*PRETRAIN, "--data_path", images, "--epochs", 1, "--output_dir", tmp_path / "out")
    train("pretrain", None, *args, "--log_dir", tmp_path / "board")
    assert set(curves(tmp_path / "board")) == {"train_loss", "lr", "grad_norm", "images_per_second"}
    train("pretrain", None, *args, "--log_dir", "", "--resume", "auto")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".lock",
        "checkpoint-0.pth",
        "config-1.yaml",
        "config.yaml",
        "log.jsonl",
        "log.txt",
        "runs.jsonl",
        "status.json",
        "train.log",
    ]


def test_next_run_closes_the_log_of_the_last(tmp_path):
    env = Dist(torch.device("cpu"))
    setup_logging(env, str(tmp_path / "first"))
    (file,) = [handler for handler in logging.getLogger("mae").handlers if isinstance(handler, logging.FileHandler)]
    setup_logging(env, str(tmp_path / "second"))
    assert file.stream is None


def test_accumulation_takes_fewer_steps_at_a_higher_rate(images, tmp_path):
    args = (*PRETRAIN, "--data_path", images, "--epochs", 1, "--warmup_epochs", 0)
    said = train("pretrain", tmp_path, *args, "--accum_iter", 4)
    # 24 images in steps of 16: one step of 4 batches
    assert "effective batch 16" in said and "4 batches an epoch" in said
    assert {int(state["step"]) for state in load(tmp_path / "checkpoint-0.pth")["optimizer"]["state"].values()} == {1}
    assert {group["lr"] for group in load(tmp_path / "checkpoint-0.pth")["optimizer"]["param_groups"]} == {1e-3 / 16}
    first, last = (line for line in said.splitlines() if "eta: " in line)
    assert "grad_norm" not in first and "grad_norm" in last  # none is known before the first update


# as processes


def local_job(script, job_dir, processes, *args):
    """Submit to this machine and wait for the end: the job's folder and id, what rank 0 wrote, and all errors."""
    submission = ("--cluster", "local", "--nodes", 1, "--ngpus", processes, "--timeout", 5, "--job_dir", job_dir)
    done = run(script, *submission, *args)
    job_id = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"\d+", job_id)  # alone, so that scripts can take it
    folder = Path(str(job_dir).replace("%j", job_id))
    results = [folder / f"{job_id}_{rank}_result.pkl" for rank in range(processes)]
    until = time.monotonic() + 180
    while not all(path.exists() for path in results):
        assert time.monotonic() < until, "\n".join(path.read_text() for path in folder.glob("*.err"))
        time.sleep(0.2)
    errors = "\n".join(path.read_text() for path in folder.glob(f"{job_id}_*.err"))
    return SimpleNamespace(folder=folder, id=job_id, said=(folder / f"{job_id}_0_log.out").read_text(), errors=errors)


@pytest.mark.slow
def test_submitted_job_runs_and_goes_on_when_it_is_requeued(images, tmp_path):
    args = (*PRETRAIN, "--data_path", images, "--batch_size", 2)
    first = local_job("submitit_pretrain.py", tmp_path / "job", 2, *args, "--epochs", 1)
    assert "2 x cpu" in first.said, first.errors
    assert checkpoints(first.folder) == ["checkpoint-0.pth"]
    assert [line["epoch"] for line in log_txt(first.folder)] == [0]
    # started again in its folder, as a requeue does
    second = local_job("submitit_pretrain.py", tmp_path / "job", 2, *args, "--epochs", 2)
    assert second.id != first.id
    assert "Epoch: [1]" in second.said and "Epoch: [0]" not in second.said, second.errors
    assert [line["epoch"] for line in log_txt(first.folder)] == [0, 1]
    assert load(first.folder / "checkpoint-1.pth")["epoch"] == 1


@pytest.mark.slow
def test_submitted_classifier_finds_its_folder_by_the_job_s_id(images, finetuned, tmp_path):
    args = (*LINPROBE, "--global_pool", "--data_path", images, "--finetune", finetuned.last, "--epochs", 1)
    job = local_job("submitit_linprobe.py", tmp_path / "run_%j", 1, *args)
    assert job.folder == tmp_path / f"run_{job.id}"
    assert checkpoints(job.folder) == ["checkpoint-0.pth"], job.errors
    assert "1 x cpu" in job.said
    assert not (tmp_path / "run_").exists()


@pytest.mark.slow
def test_commands_print_their_lines_and_exit_with_0(images, tmp_path):
    args = (*PRETRAIN, "--data_path", images, "--epochs", 1, "--output_dir", tmp_path / "p", "--log_dir", "")
    done = run("main_pretrain.py", *args, cwd=tmp_path)
    assert [match["i"] for match in STEP_LINE.finditer(done.stdout)] == ["0", "5"]
    assert "Traceback" not in done.stderr
    start = ("--finetune", tmp_path / "p" / "checkpoint-0.pth", "--output_dir", "f", "--log_dir", "f")
    done = run("main_finetune.py", *FINETUNE, "--data_path", images, "--epochs", 1, *start, cwd=tmp_path)
    assert done.stdout.splitlines()[-2].startswith("Max accuracy: ")
    trained = next(EVALUATED.finditer(done.stdout))
    evaluation = ("--eval", "--resume", "f/checkpoint-0.pth", "--output_dir", "", "--log_dir", "")
    done = run("main_finetune.py", *FINETUNE, "--data_path", images, *evaluation, cwd=tmp_path)
    assert next(EVALUATED.finditer(done.stdout)).groupdict() == {**trained.groupdict(), "more": None}
    assert not (tmp_path / "output_dir").exists()


@pytest.mark.slow
def test_command_with_a_broken_image_names_it_without_a_traceback(tmp_path):
    for i in range(8):
        write_image(tmp_path / "images" / f"{i}.png", i)
    broken = tmp_path / "images" / "3.png"
    broken.write_bytes(b"no image")
    nothing = ("--epochs", 1, "--output_dir", "", "--log_dir", "", "--num_workers", 1)
    done = run("main_pretrain.py", *PRETRAIN, "--data_path", tmp_path / "images", *nothing, code=2)
    assert done.stderr.splitlines()[-1].startswith(f"error: cannot decode {broken} (")
    assert "Traceback" not in done.stderr
