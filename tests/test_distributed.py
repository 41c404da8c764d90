"""Several processes: the same step as one process, gradients sent once, the same evaluation; who launched us.

`torchrun test_distributed.py FOLDER` runs `worker`, whose results the tests read.
"""

import gc
import json
import os
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ON_CPU, assert_same, load, quiet_run, torchrun, write_image, write_image_folder
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import engine_finetune
import engine_pretrain
import main_evaluate
import main_finetune
import main_pretrain
import util.run.start
from engine_finetune import evaluate
from models_mae import mae_vit_tiny_patch4
from models_vit import vit_tiny_patch4
from util import dist, rng
from util.data.datasets import Images
from util.data.loader import eval_loader
from util.dist import Dist, _launched, check_ranks_agree, init_distributed, mean_over_ranks, shutdown, wrap
from util.errors import FailedError, NonFiniteLossError, UserError
from util.lr_sched import Schedule
from util.step import Step
from util.transforms import eval_transform

EFFECTIVE_BATCH, N_STEPS = 8, 2
# rank -> what it holds of each optimizer step: (batch_size, accum_iter), which make up the same effective batch
SPLITS = {"whole": (8, 1), "halves": (4, 1), "quarters": (2, 2)}


def steps(env: Dist, batch_size: int, accum_iter: int) -> dict:
    """Two optimizer steps of a tiny autoencoder on given images and noise; all arithmetic in float32."""
    rng.seed_init(0)
    model = mae_vit_tiny_patch4(img_size=16)
    ddp_model = wrap(model, env)
    # plain gradient descent: Adam would blow up rounding in small gradients to whole steps
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = Step(ddp_model, optimizer, env.device, accum_iter=accum_iter, clip_grad=0.5)
    generator = torch.Generator().manual_seed(1)
    imgs = torch.randn(N_STEPS * EFFECTIVE_BATCH, 3, 16, 16, generator=generator)
    noise = torch.rand(N_STEPS * EFFECTIVE_BATCH, 16, generator=generator)
    losses, norms = [], []
    for i in range(N_STEPS * accum_iter):
        first = (i * env.world_size + env.rank) * batch_size
        part = slice(first, first + batch_size)
        loss = step(lambda: ddp_model(imgs[part], noise=noise[part])[0], update=(i + 1) % accum_iter == 0)  # noqa: B023
        losses.append(mean_over_ranks(loss))
        norms.append(step.grad_norm)
    losses = torch.stack(losses).reshape(N_STEPS, accum_iter).mean(dim=1)
    norms = torch.stack(norms[accum_iter - 1 :: accum_iter])
    return {"model": dict(model.state_dict()), "losses": losses, "norms": norms}


def reductions(env: Dist) -> list[int]:
    """How many buckets of gradients travelled in each of 9 forward passes, 3 per optimizer step."""
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), env)
    sent = []

    def count(group, bucket):
        sent[-1] += 1
        return allreduce_hook(group, bucket)

    model.register_comm_hook(None, count)
    step = Step(model, torch.optim.SGD(model.parameters(), lr=0.1), env.device, accum_iter=3)
    for i in range(9):
        sent.append(0)
        step(lambda: model(torch.ones(2, 4)).sum(), update=(i + 1) % 3 == 0)
    return sent


def evaluation(env: Dist, folder: Path, sharded: bool) -> dict:
    """The figures of a classifier with running statistics, which differ on ranks other than 0, on 7 images."""
    rng.seed_init(0)
    model = vit_tiny_patch4(img_size=16, num_classes=10)
    model.head = nn.Sequential(nn.BatchNorm1d(64, affine=False), nn.Linear(64, 10))
    model.head[0].running_mean.fill_(env.rank)
    model.head[0].running_var.fill_(1 + env.rank)
    files = [(str(path), i) for i, path in enumerate(sorted(folder.glob("*.png")))]
    assert len(files) == 7
    loader = eval_loader(Images(files, eval_transform(16)), 2, env, sharded, num_workers=0, pin_mem=False)
    return evaluate(model, loader, env, None, sharded)


def evaluate_by_script(folder: Path, name: str, *more: str) -> list[str]:
    """What main_finetune.py --eval says about the 9 validation images, on rank 0; nothing on others."""
    args = (
        "--eval", "--resume", folder / "vit.pth", "--data_path", folder / "images", "--model", "vit_tiny_patch4",
        "--input_size", 16, "--nb_classes", 3, "--batch_size", 2, "--num_workers", 0, "--output_dir", folder / name,
        *ON_CPU, *more,
    )  # fmt: skip
    main_finetune.main(main_finetune.get_args_parser().parse_args([str(arg) for arg in args]))
    log = folder / name / "train.log"
    return [line.split(" ", 2)[2] for line in log.read_text().splitlines()] if log.is_file() else []


def of_bands(env: Dist, folder: Path) -> dict:
    """What a rank knows of 5 channels of float32 whose mean differs from file to file, and rank 0's log of an epoch."""
    util.run.start.init_distributed, main_finetune.shutdown = lambda *_: env, lambda: None
    output = folder / f"bands-{env.world_size}"
    words = (
        "--data_path", folder / "bands", "--in_chans", 5, "--output_dir", output, "--log_dir", "", "--epochs", 1,
        "--warmup_epochs", 0, "--model", "vit_tiny_patch4", "--input_size", 16, "--nb_classes", 3, "--num_workers", 0,
        "--batch_size", 4 // env.world_size, "--aa", "", "--reprob", 0, "--drop_path", 0, "--blr", 0.1,
        "--dist_eval", *ON_CPU,
    )  # fmt: skip
    args = main_finetune.get_args_parser().parse_args([str(word) for word in words])
    main_finetune.main(args)
    logged = json.loads((output / "log.txt").read_text()) if env.is_main else {}
    losses = [logged[name] for name in ("train_loss", "test_loss")] if env.is_main else []
    return {"mean": args.mean, "std": args.std, "pixel_type": args.pixel_type, "losses": losses}


def nan_error(env: Dist) -> str:
    """What an epoch of 5 steps raises where the last two batches of rank 1 hold a number that is none."""
    model = mae_vit_tiny_patch4(img_size=16)
    batches = [(torch.zeros(2, 3, 16, 16), None) for _ in range(5)]
    for imgs, _ in batches:
        imgs[:, :, ::2] = 1
    if env.rank == 1:
        batches[3][0][0] = batches[4][0][0] = float("nan")
    ddp_model = wrap(model, env)
    step = Step(ddp_model, torch.optim.SGD(model.parameters(), lr=0.01), env.device)
    try:
        engine_pretrain.train_one_epoch(
            ddp_model, batches, step, Schedule(0.01, 0.0, 0, 5), 2, quiet_run(step, env), mask_ratio=0.5, seed=0
        )
    except NonFiniteLossError as error:
        return str(error)
    return ""


def refusal(env: Dist, script, folder: Path, *options: object) -> str:
    """What a script says to this rank about options that other ranks do not have; nothing if it trains."""
    util.run.start.init_distributed, script.shutdown = lambda *_: env, lambda: None
    tiny = ("--model", "mae_vit_tiny_patch4" if script is main_pretrain else "vit_tiny_patch4", "--input_size", 16)
    args = (*tiny, "--batch_size", 2, "--num_workers", 0, *ON_CPU)
    if script is main_evaluate:
        args += ("--resume", folder / "vit.pth", "--classes", folder / "classes.txt", "--output_dir", folder / "table")
    else:
        args += ("--data_path", folder / "images", "--epochs", 1, "--output_dir", "", "--log_dir", "")
    try:
        script.main(script.get_args_parser().parse_args([str(option).format(folder) for option in (*args, *options)]))
    except UserError as error:
        return error.message
    return ""


# name: (script, options of rank 0, options of rank 1); {} is the folder of the images
DIFFERENT = {
    "--batch_size": (main_pretrain, ("--batch_size", 2), ("--batch_size", 1)),
    "--epochs": (main_pretrain, ("--epochs", 1), ("--epochs", 2)),
    "--blr": (main_pretrain, (), ("--blr", 0.5)),
    "--output_dir": (main_pretrain, ("--output_dir", "{}/out"), ()),
    "--resume": (main_pretrain, ("--resume", "auto", "--output_dir", "{}/out"), ("--output_dir", "{}/out")),
    "--mixup": (main_finetune, (), ("--mixup", 0.8)),
    "training images": (main_pretrain, ("--data_path", "{}/images"), ("--data_path", "{}/more")),
    "images": (main_finetune, ("--data_path", "{}/images", "--nb_classes", 3),
               ("--data_path", "{}/renamed", "--nb_classes", 3)),
    "own": (main_evaluate, ("--set", "own={}/images/val"), ("--set", "own={}/renamed/val")),
    "--per_class": (main_evaluate, ("--set", "own={}/images/val"), ("--set", "own={}/copy/val", "--per_class")),
}  # fmt: skip


def worker(folder: Path) -> None:
    env = init_distributed("cpu")
    refusals = {name: refusal(env, script, folder, *each[env.rank]) for name, (script, *each) in DIFFERENT.items()}
    # each rank its own copy, device and workers
    own = ("--data_path", folder / ("images", "copy")[env.rank], "--num_workers", env.rank, "--device", "cpu")
    refusals["nothing"] = refusal(env, main_pretrain, folder, *own)
    # the script finds this group, which stays for the other checks
    util.run.start.init_distributed, engine_finetune.shutdown = lambda *_: env, lambda: None
    results = {
        "script": evaluate_by_script(folder, f"rank-{env.rank}", "--dist_eval"),
        "env": [env.rank, env.local_rank, env.world_size, env.local_world_size],
        "steps": {name: steps(env, *SPLITS[name]) for name in ("halves", "quarters")},
        "reductions": reductions(env),
        "sharded": evaluation(env, folder, sharded=True),
        "unsharded": evaluation(env, folder, sharded=False),
        "nan": nan_error(env),
        "refusals": refusals,
        "bands": of_bands(env, folder),
    }
    torch.save(results, folder / f"rank-{env.rank}.pth")
    shutdown()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes found, and the folder of the images."""
    folder = tmp_path_factory.mktemp("two")
    for i in range(7):
        write_image(folder / f"{i}.png", i, (16, 16))
    write_image_folder(folder / "images", n_train=2, n_val=3)
    shutil.copytree(folder / "images", folder / "copy")
    shutil.copytree(folder / "images", folder / "more")
    write_image(folder / "more" / "train" / "ant" / "more.png", 0)
    shutil.copytree(folder / "images", folder / "renamed")
    (folder / "renamed" / "val" / "ant" / "0.png").rename(folder / "renamed" / "val" / "ant" / "9.png")
    for i, path in enumerate(sorted((folder / "images").rglob("*.png"))):
        image = folder / "bands" / path.relative_to(folder / "images").with_suffix(".npy")
        image.parent.mkdir(parents=True, exist_ok=True)
        np.save(image, np.random.default_rng(i).normal(10 * i, 1 + i, (16, 16, 5)).astype(np.float32))
    rng.seed_init(0)
    model = vit_tiny_patch4(img_size=16, num_classes=3, global_pool=True)
    nn.init.normal_(model.head.weight)
    torch.save({"model": model.state_dict()}, folder / "vit.pth")
    (folder / "classes.txt").write_text("\n".join(sorted(path.name for path in (folder / "images" / "val").iterdir())))
    torchrun(__file__, folder)
    return SimpleNamespace(folder=folder, ranks=[load(folder / f"rank-{rank}.pth") for rank in (0, 1)])


@pytest.mark.slow
def test_processes_know_their_place(two_processes):
    assert [found["env"] for found in two_processes.ranks] == [[0, 0, 2, 2], [1, 1, 2, 2]]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["halves", "quarters"])
def test_two_processes_take_the_step_of_one_with_the_whole_batch(split, two_processes):
    whole = steps(Dist(torch.device("cpu")), *SPLITS["whole"])
    rng.seed_init(0)
    start = mae_vit_tiny_patch4(img_size=16).state_dict()
    change = torch.cat([(whole["model"][name] - start[name]).flatten() for name in start]).norm()
    # each gradient was clipped, by its norm over the whole batch, to a step of 0.1 * 0.5
    assert (whole["norms"] > 0.6).all() and 0.05 < change < 0.1001
    for rank in two_processes.ranks:
        found = rank["steps"][split]
        assert torch.allclose(found["losses"], whole["losses"], atol=1e-6)
        assert torch.allclose(found["norms"], whole["norms"], atol=1e-5)
        for name, value in whole["model"].items():
            assert torch.allclose(found["model"][name], value, atol=1e-6), name
    assert_same(two_processes.ranks[0]["steps"], two_processes.ranks[1]["steps"])


@pytest.mark.slow
def test_two_processes_measure_and_normalise_by_the_mean_and_std_of_all_images(two_processes, monkeypatch):
    first, second = (rank["bands"] for rank in two_processes.ranks)
    losses = first.pop("losses"), second.pop("losses")
    everything = [np.load(path) for path in (two_processes.folder / "bands" / "train").rglob("*.npy")]
    np.testing.assert_allclose(first["mean"], np.mean(everything, axis=(0, 1, 2), dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(first["std"], np.std(everything, axis=(0, 1, 2), dtype=np.float64), rtol=1e-6)
    assert first == second and first["pixel_type"] == "float32"
    for module, name in ((util.run.start, "init_distributed"), (main_finetune, "shutdown")):
        monkeypatch.setattr(module, name, getattr(module, name))  # as it is now, afterwards
    whole = of_bands(Dist(torch.device("cpu")), two_processes.folder)
    assert whole.pop("losses") == pytest.approx(losses[0], rel=1e-5) and whole == first


@pytest.mark.slow
def test_gradients_travel_once_per_optimizer_step(two_processes):
    for rank in two_processes.ranks:
        sent = [number > 0 for number in rank["reductions"]]
        assert sent == [False, False, True] * 3


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sharded", "unsharded"])
def test_two_processes_evaluate_an_odd_number_of_images_as_one(how, two_processes):
    one = evaluation(Dist(torch.device("cpu")), two_processes.folder, sharded=True)
    assert one["acc1"] * 7 % 100 == pytest.approx(0) and 0 < one["acc5"] < 100
    for rank in two_processes.ranks:
        assert rank[how] == pytest.approx(one, rel=1e-6)


@pytest.mark.slow
def test_script_shards_its_evaluation_and_prints_the_figures_of_one_process(two_processes):
    rank_0, rank_1 = (rank["script"] for rank in two_processes.ranks)
    one = evaluate_by_script(two_processes.folder, "one")
    assert rank_0[-2:] == one[-2:] and "on the 9 test images" in one[-1] and one[-2].startswith("* Acc@1 ")
    assert any("[4/5]" in line for line in one)
    assert any("[2/3]" in line for line in rank_0)  # 5 of the images
    assert rank_1 == []


@pytest.mark.slow
def test_loss_that_is_not_a_number_on_one_rank_stops_both(two_processes):
    for rank in two_processes.ranks:
        assert "Epoch: [2]" in rank["nan"] and "at iteration 4 " in rank["nan"]


@pytest.mark.slow
def test_run_in_two_processes_resumes_bit_for_bit_and_speaks_with_one_voice(tmp_path):
    images = write_image_folder(tmp_path / "images", n_train=4, n_val=1)
    args = (
        "--data_path", images, "--model", "mae_vit_tiny_patch4", "--input_size", 32, "--batch_size", 2,
        "--accum_iter", 2, "--epochs", 2, "--warmup_epochs", 1, "--save_every", 1, "--num_workers", 1, *ON_CPU,
    )  # fmt: skip

    def start(name, *more):
        return torchrun("main_pretrain.py", *args, "--output_dir", tmp_path / name, "--log_dir", tmp_path / name, *more)

    whole = start("whole").stdout
    assert "2 x cpu" in whole and "effective batch 8" in whole
    # 12 images in steps of 8: one step of 2 batches for each rank; rank 0 alone reports it
    assert whole.count("Epoch: [0]  [1/2]") == 1
    assert len((tmp_path / "whole" / "log.txt").read_text().splitlines()) == 2
    resumed = start("resumed", "--resume", tmp_path / "whole" / "checkpoint-0.pth").stdout
    assert "Epoch: [0]" not in resumed and "Epoch: [1]" in resumed
    a, b = (load(tmp_path / name / "checkpoint-1.pth") for name in ("whole", "resumed"))
    for key in ("model", "optimizer", "epoch"):
        assert_same(a[key], b[key], key)
    before = load(tmp_path / "whole" / "checkpoint-0.pth")["model"]["decoder_pred.bias"]
    assert not torch.equal(before, a["model"]["decoder_pred.bias"])


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENT)
def test_ranks_that_differ_all_say_in_what_before_the_first_step(name, two_processes):
    said = [rank["refusals"][name] for rank in two_processes.ranks]
    assert said[0] == said[1] and said[0].startswith(f"the processes differ in {name} (") and said[0].count(" (") == 1
    assert " on rank 0, " in said[0] and " on rank 1)" in said[0]


@pytest.mark.slow
def test_ranks_with_copies_of_the_same_images_and_own_workers_train(two_processes):
    assert [rank["refusals"]["nothing"] for rank in two_processes.ranks] == ["", ""]


def test_ranks_that_agree_with_one_another_are_named_together(monkeypatch):
    values = [{"--epochs": "1"}] * 3 + [{"--epochs": "2", "--new": "True"}] + [{"--epochs": "1"}] * 2
    monkeypatch.setattr(dist, "gather_on_all", lambda value: values)
    with pytest.raises(UserError) as error:
        check_ranks_agree(Dist(torch.device("cpu"), rank=3, world_size=6), {"--epochs": 2})
    assert "--epochs (1 on ranks 0-2, 4-5, 2 on rank 3); --new (not given on ranks 0-2, 4-5, True on rank 3)" in str(
        error.value
    )
    assert error.value.told
    values[3] = values[0]
    check_ranks_agree(Dist(torch.device("cpu")), {})


FILES = [("/a/x/0.png", 0), ("/a/x/1.png", 0), ("/a/y/0.png", 1)]


@pytest.mark.parametrize(
    ("files", "same"),
    [
        ([(path.replace("/a/", "/mnt/b/c/"), label) for path, label in FILES], True),
        (FILES[:2], False),
        ([FILES[1], FILES[0], FILES[2]], False),
        ([*FILES[:2], ("/a/y/0.jpg", 1)], False),
        ([*FILES[:2], ("/a/y/0.png", 0)], False),
        ([("/a/x0.png", 0), ("/a/x/1.png", 0), ("/a/y/0.png", 1)], False),
        ([("/a/x/\udce9.png", 0), *FILES[1:]], False),
    ],
    ids=["elsewhere", "fewer", "another order", "another name", "another label", "another folder", "not UTF-8"],
)
def test_digest_of_images_tells_other_lists(files, same):
    digests = [Images(each, None).digest() for each in (FILES, files)]
    assert (digests[0] == digests[1]) == same


# launchers


@pytest.fixture
def launcher(monkeypatch):
    """Sets variables, in an environment without those of any launcher; takes them all back at the end."""
    ours = [name for name in os.environ if name.startswith(("SLURM_", "OMPI_"))]
    for name in [*ours, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]:
        monkeypatch.setenv(name, "")  # so that it goes back to what it was, whoever sets it
        monkeypatch.delenv(name)

    def set_variables(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_variables


BATCH_SCRIPT = {"SLURM_JOB_ID": 1234, "SLURM_PROCID": 0, "SLURM_NTASKS": 8, "SLURM_NNODES": 2, "SLURM_LOCALID": 0}
STEP = {
    **BATCH_SCRIPT, "SLURM_STEP_ID": 3, "SLURM_STEP_NUM_TASKS": 8, "SLURM_STEP_NUM_NODES": 2,
    "SLURM_STEP_NODELIST": "node[7-8]",
}  # fmt: skip


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in that expands this one list of nodes."""
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")


def test_srun_tells_rank_and_where_to_meet(launcher, scontrol):
    launcher(**STEP | {"SLURM_PROCID": 5, "SLURM_LOCALID": 1})
    assert _launched() == (5, 1, 8, 4)
    assert os.environ["MASTER_ADDR"] == "node7"
    port = os.environ.pop("MASTER_PORT")
    assert 1024 < int(port) < 65536
    launcher(**STEP | {"SLURM_PROCID": 0})  # another task of the step agrees
    assert _launched() == (0, 0, 8, 4) and os.environ.pop("MASTER_PORT") == port
    launcher(**STEP | {"SLURM_STEP_ID": 4})  # the next step does not collide with it
    assert _launched() and os.environ["MASTER_PORT"] != port


def test_srun_respects_a_given_meeting_point(launcher):
    launcher(**STEP, MASTER_ADDR="10.0.0.1", MASTER_PORT=4567)
    assert _launched() == (0, 0, 8, 4)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "4567")


def test_srun_on_one_node_needs_no_scontrol(launcher, monkeypatch):
    monkeypatch.setenv("PATH", "")
    launcher(**STEP | {"SLURM_STEP_NUM_NODES": 1, "SLURM_STEP_NODELIST": "node7"})
    assert _launched() == (0, 0, 8, 8)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_tasks_that_do_not_spread_evenly_are_rounded_up_per_node(launcher):
    launcher(**STEP | {"SLURM_STEP_NUM_TASKS": 3}, MASTER_ADDR="node7")
    assert _launched() == (0, 0, 3, 2)


SINGLE = {"no launcher": {}, "batch script": BATCH_SCRIPT, "step of one task": STEP | {"SLURM_STEP_NUM_TASKS": 1}}


@pytest.mark.parametrize("variables", SINGLE.values(), ids=SINGLE)
def test_batch_script_and_step_of_one_task_are_a_single_process(variables, launcher):
    launcher(**variables)
    env = init_distributed("cpu")
    assert (env.rank, env.world_size, env.local_world_size) == (0, 1, 1)
    assert not torch.distributed.is_initialized()


def test_torchrun_goes_before_srun_and_a_group_of_one_works(launcher):
    launcher(**STEP, RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=0)
    try:
        env = init_distributed("cpu")
        assert (env.rank, env.world_size) == (0, 1) and torch.distributed.is_initialized()
        model = nn.Linear(2, 2)
        assert wrap(model, env) is model
    finally:
        shutdown()
    assert not torch.distributed.is_initialized()


def test_mpirun_tells_its_rank_with_a_meeting_point_alone(launcher):
    """Without one, each process would be its own run, and all would write the same files."""
    variables = {"RANK": 3, "LOCAL_RANK": 1, "SIZE": 4, "LOCAL_SIZE": 2}
    launcher(**{f"OMPI_COMM_WORLD_{name}": value for name, value in variables.items()})
    with pytest.raises(UserError, match="MASTER_ADDR"):
        init_distributed("cpu")
    assert _launched() == (3, 1, 4, 2)
    launcher(MASTER_ADDR="node7", MASTER_PORT=4567)
    assert _launched() == (3, 1, 4, 2)


@pytest.mark.parametrize(
    ("named", "variables"),
    [
        ("RANK", {"RANK": "abc", "WORLD_SIZE": 2}),
        ("RANK", {"RANK": 2, "WORLD_SIZE": 2}),
        ("RANK", {"RANK": -1, "WORLD_SIZE": 2}),
        ("WORLD_SIZE", {"RANK": 0, "WORLD_SIZE": 0}),
        ("WORLD_SIZE", {"RANK": 0, "WORLD_SIZE": "2.0"}),
        ("WORLD_SIZE", {"RANK": 0, "WORLD_SIZE": "9" * 5000}),
        ("LOCAL_RANK", {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": "first"}),
        ("LOCAL_WORLD_SIZE", {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 0}),
        ("MASTER_ADDR", {"RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": 4567}),
        ("MASTER_PORT", {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "node7", "MASTER_PORT": ""}),
        ("MASTER_PORT", {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "node7", "MASTER_PORT": 65536}),
        ("SLURM_STEP_NUM_TASKS", STEP | {"SLURM_STEP_NUM_TASKS": "8(x2)"}),
        ("SLURM_PROCID", STEP | {"SLURM_PROCID": 8}),
        ("SLURM_JOB_ID", STEP | {"SLURM_JOB_ID": "", "MASTER_ADDR": "node7"}),
        ("SLURM_STEP_NODELIST", STEP | {"PATH": ""}),
        ("OMPI_COMM_WORLD_SIZE", {"OMPI_COMM_WORLD_SIZE": "four"}),
        ("OMPI_COMM_WORLD_RANK", {"OMPI_COMM_WORLD_SIZE": 4, "OMPI_COMM_WORLD_RANK": 4}),
    ],
)
def test_variable_of_a_launcher_that_makes_no_sense_is_refused_by_name(named, variables, launcher):
    launcher(**variables)
    with pytest.raises(UserError) as error:
        init_distributed("cpu")
    assert error.value.message.startswith((f"{named}=", f"{named}:")) and len(error.value.message) < 400


EMPTY = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"), "")


@pytest.mark.parametrize(
    "variables", [{"RANK": 0, "WORLD_SIZE": 1}, {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "node7"}, EMPTY]
)
def test_one_process_without_a_meeting_point_and_empty_variables_run_alone(variables, launcher):
    launcher(**variables)
    assert init_distributed("cpu").world_size == 1 and not torch.distributed.is_initialized()


def test_port_that_another_program_has_is_named(launcher):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        launcher(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with pytest.raises(UserError, match=f"127.0.0.1:{port} .*MASTER_PORT"):
            init_distributed("cpu", timeout_minutes=0.02)


def test_process_that_was_started_alone_says_whom_it_waits_for(launcher, capsys):
    """As the shell of `srun -n 8 --pty bash` does."""
    launcher(**STEP | {"SLURM_STEP_NUM_NODES": 1})
    with pytest.raises(FailedError, match="in vain .*SLURM_STEP_NUM_TASKS"):
        init_distributed("cpu", timeout_minutes=0.04)
    said = capsys.readouterr().err
    assert said.startswith("rank 0 of 8 waits at 127.0.0.1:") and "for ranks 1-7, at most 0.04 minutes" in said
    assert "SLURM_STEP_NUM_TASKS" in said and said.count("\n") == 1


def test_one_process_of_mpirun_needs_no_meeting_point(launcher):
    launcher(OMPI_COMM_WORLD_RANK=0, OMPI_COMM_WORLD_SIZE=1)
    assert _launched() is None


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
    gc.collect()  # as util/run/exits.py does, and why
