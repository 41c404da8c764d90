"""Parts of a classifier fine-tuned, and an average of its weights."""

import pytest
import torch
from helpers import assert_same, load, quiet_run, write_image_folder
from safetensors.torch import load_file
from test_not_finite import poison
from test_saving import stop_at
from test_scripts import FINETUNE, log_txt, train
from test_speed import kept_for_backward
from timm.utils import ModelEmaV3
from torch import nn

import main_evaluate
import main_finetune
import models_vit
from util import flops
from util.dist import Dist
from util.errors import UserError
from util.export import export
from util.run.exits import Stopped
from util.step import Step
from util.weights import checkpoint
from util.weights.build import open_model

LAST_MLP = ("blocks.5.norm2.", "blocks.5.mlp.")
BEHIND = ("norm.", "fc_norm.", "head.")
TUNED = {  # --tune_blocks -> how the names begin of what is trained, of 6 blocks
    "0": ("head.",),
    "0.5": (*LAST_MLP, *BEHIND),
    "1": ("blocks.5.", *BEHIND),
    "4": ("blocks.2.", "blocks.3.", "blocks.4.", "blocks.5.", *BEHIND),
    "6": ("blocks.", *BEHIND),
    "all": ("",),
}


def six_blocks(**options) -> models_vit.VisionTransformer:
    options = {"img_size": 32, "num_classes": 3, "global_pool": True, "drop_path_rate": 0.5, **options}
    return models_vit.VisionTransformer(patch_size=8, embed_dim=24, depth=6, num_heads=3, **options)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 training and 9 validation images: 6 steps of 4."""
    return write_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(models_vit.MODELS, "six", six_blocks)


@pytest.fixture
def start(tmp_path):
    """Weights to start from, without a head that fits, as those of pretraining."""
    torch.manual_seed(1)
    weights = six_blocks(num_classes=7).state_dict() | six_blocks(num_classes=7, global_pool=False).state_dict()
    torch.save({"model": weights}, tmp_path / "start.pth")
    return tmp_path / "start.pth"


def command(images, start, *more):
    given = (*FINETUNE, "--data_path", images, "--model", "six", "--finetune", start, "--drop_path", 0.5)
    return (*given, "--warmup_epochs", 0, "--blr", 0.5, *more)


@pytest.mark.parametrize(("tuned", "pooled"), [*zip(TUNED, [True, False] * 3, strict=True), ("0", False)])
def test_what_is_trained_and_nothing_else_changes(tuned, pooled, images, start, tmp_path):
    """From the start and resumed: by the names of what a run has changed, and by what its optimizer keeps."""
    args = command(images, start, "--tune_blocks", tuned, "--global_pool" if pooled else "--cls_token")
    train("finetune", tmp_path / "run", *args, "--epochs", 1)
    train("finetune", tmp_path / "run", *args, "--epochs", 2, "--resume", "auto")
    first = load(start)["model"]
    ends = [load(tmp_path / "run" / f"checkpoint-{epoch}.pth") for epoch in (0, 1)]
    trained = {name for name in ends[0]["model"] if name.startswith(TUNED[tuned])}
    for before, after in ((first, ends[0]["model"]), (ends[0]["model"], ends[1]["model"])):
        for name in after.keys() - {"head.weight", "head.bias"}:
            assert torch.equal(before[name], after[name]) == (name not in trained), name
    for end in ends:
        assert set(end["trained"]) == trained
        assert len(end["optimizer"]["state"]) == len(trained)
    assert not torch.equal(*(end["model"]["head.weight"] for end in ends))


@pytest.mark.parametrize("tuned", [0, 0.5, 1, 4, 6])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_frozen_parts_get_no_gradient_and_stay_out_of_the_graph(tuned, checkpointed):
    model = six_blocks()
    models_vit.freeze_all_but_last(model, tuned)
    model.set_grad_checkpointing(checkpointed)
    model.train()
    entered = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: entered.update({i: out.requires_grad}))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    names = {name for name, param in model.named_parameters() if param.grad is not None}
    assert names == {name for name, _ in model.named_parameters() if name.startswith(TUNED[str(tuned)])}
    first = 5 if tuned == 0.5 else 6 - tuned
    assert entered == {i: i >= first for i in range(6)}


@pytest.mark.parametrize("tuned", [0, 0.5, 1, 4])
def test_stochastic_depth_is_off_in_frozen_parts_alone(tuned):
    """Two passes in training mode are equal up to the first trained part, and differ behind it."""
    torch.manual_seed(0)
    model, imgs = six_blocks(drop_path_rate=0.9), torch.randn(8, 3, 32, 32)
    models_vit.freeze_all_but_last(model, tuned)
    seen = []
    for block in model.blocks:
        block.norm2.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))  # behind attention
        block.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    for _ in range(2):
        model.train()
        model(imgs)
    frozen = {0: 12, 0.5: 11, 1: 10, 4: 4}[tuned]  # halves of blocks, of 12
    same = [torch.equal(one, two) for one, two in zip(seen[:12], seen[12:], strict=True)]
    assert same == [True] * frozen + [False] * (12 - frozen)
    model.eval()
    assert torch.equal(model(imgs), model(imgs))


@pytest.mark.parametrize("tuned", ["7", "24"])
def test_more_blocks_than_there_are_is_an_error_that_names_both(tuned, images, start):
    with pytest.raises(UserError, match=f"--tune_blocks {tuned}: the model has 6 blocks. Choose 0 to 6"):
        train("finetune", None, *command(images, start, "--tune_blocks", tuned, "--output_dir", "", "--log_dir", ""))


@pytest.mark.parametrize("text", ["-1", "1.5", "half", "nan", "inf", "", "1e3", "0.25"])
def test_no_number_of_blocks_is_refused_by_the_parser(text, capsys):
    with pytest.raises(SystemExit) as left:
        main_finetune.get_args_parser().parse_args([f"--tune_blocks={text}"])
    assert left.value.code == 2 and "--tune_blocks" in capsys.readouterr().err


def test_one_block_of_24_keeps_a_twentieth_for_backward_and_has_its_arithmetic_counted():
    model = models_vit.VisionTransformer(embed_dim=96, depth=24, num_heads=3, num_classes=10, global_pool=True)
    imgs = torch.randn(1, 3, 224, 224)
    whole = kept_for_backward(model, lambda: model(imgs))
    assert flops.frozen_share(model) == 0
    models_vit.freeze_all_but_last(model, 1)
    assert kept_for_backward(model, lambda: model(imgs)) < whole / 20
    assert flops.frozen_share(model) == pytest.approx(23 / 24)
    # of 6 operations a multiply-add, the 4 of the backward pass are left out
    rates = flops.throughput(1e9, 1, Dist(torch.device("cpu")), 1.0, flops.frozen_share(model)).rates(1.0)
    assert rates["mfu"] == pytest.approx((2 + 4 / 24) * 1e9 / 1e12)


@pytest.mark.parametrize("tuned", [0, 0.5, 1, 4])
def test_ddp_waits_for_no_gradient_of_a_frozen_part(tuned, tmp_path):
    """It would say so in the pass behind one in which a gradient failed to come."""
    model = six_blocks()
    models_vit.freeze_all_but_last(model, tuned)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        ddp_model = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(3):
            ddp_model(torch.randn(2, 3, 32, 32)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert model.head.weight.grad is not None and model.pos_embed.grad is None


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.5, 0.0)])
def test_betas_are_the_optimizer_s(betas, images, start, tmp_path):
    train("finetune", tmp_path, *command(images, start, "--opt_betas", *betas, "--epochs", 1))
    groups = load(tmp_path / "checkpoint-0.pth")["optimizer"]["param_groups"]
    assert {tuple(group["betas"]) for group in groups} == {betas}
    train("finetune", tmp_path / "as_ever", *command(images, start, "--epochs", 1))
    groups = load(tmp_path / "as_ever" / "checkpoint-0.pth")["optimizer"]["param_groups"]
    assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.999)}


# --- an average of the weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("fused", [True, False])
def test_average_is_the_closed_form_over_the_steps_that_were_taken(decay, fused):
    """d^n w0 + (1 - d) sum of d^(n - k) wk, in float64. A step that is left out has the weights of the one before."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    average = ModelEmaV3(model, decay)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    step = Step(model, optimizer, torch.device("cpu"), accum_iter=2, average=average)
    weights = [model.weight.detach().double().clone()]
    for i in range(24):
        factor = float("nan") if i == 9 else 1.0
        step(lambda: (model(torch.randn(4, 3)) ** 2).mean() * factor, update=i % 2 == 1)  # noqa: B023
        if i == 14:
            step.drop()  # in the middle of a step, as where a run is rolled back
        if i % 2 == 1 and not (i == 15 or (i == 9 and not fused)):  # there the host leaves the average out, too
            weights.append(model.weight.detach().double().clone())
    n = len(weights) - 1
    expected = decay**n * weights[0] + (1 - decay) * sum(decay ** (n - k) * weights[k] for k in range(1, n + 1))
    assert n == (11 if fused else 10) and not torch.equal(weights[0], weights[-1])
    torch.testing.assert_close(average.module.weight.double(), expected, rtol=1e-5, atol=1e-6)


AVERAGED = ("--model_ema", 0.7, "--epochs", 2)


@pytest.fixture(scope="module")
def averaged(images, tmp_path_factory):
    """A run of two epochs of 6 steps that nothing disturbed; as TINY, whose model the parser of every script knows."""
    folder = tmp_path_factory.mktemp("averaged")
    said = train("finetune", folder, *FINETUNE, "--data_path", images, *AVERAGED)
    return folder, said


def test_average_is_evaluated_beside_the_weights_and_saved(averaged, images, monkeypatch):
    folder, said = averaged
    lines = log_txt(folder)
    for name in ("loss", "acc1", "acc5"):
        assert all({f"test_{name}", f"test_{name}_ema"} <= line.keys() for line in lines)
    assert lines[-1]["test_loss"] != lines[-1]["test_loss_ema"]
    assert said.count("The average of the weights") == 2 and said.count("* Acc@1") == 4
    state = load(folder / "checkpoint-1.pth")
    assert state["model_ema"].keys() == state["model"].keys()
    assert not torch.equal(state["model"]["head.weight"], state["model_ema"]["head.weight"])


def test_average_goes_to_tensorboard_too(monkeypatch):
    model = nn.Linear(3, 2)
    run = quiet_run(Step(model, torch.optim.SGD(model.parameters(), 0.1), torch.device("cpu")))
    points = {}
    monkeypatch.setattr(run.log, "scalar", lambda tag, value, x: points.update({tag: (value, x)}))
    test = {"loss": 1.0, "acc1": 2.0, "acc5": 3.0, "loss_ema": 4.0, "acc1_ema": 5.0, "acc5_ema": 6.0}
    run.after_epoch(7, {"loss": 0.0, "lr": 0.0}, test)
    assert points == {f"perf/test_{name}": (value, 7) for name, value in test.items()}


@pytest.mark.parametrize("stop", [3, 7, 8, 11])
def test_average_of_a_run_that_was_stopped_is_bit_for_bit_that_of_one_that_was_not(
    stop, averaged, images, tmp_path, monkeypatch
):
    """Within the first epoch, in the evaluation of the weights, in that of the average, within the second epoch."""
    args = (*FINETUNE, "--data_path", images, *AVERAGED, "--resume", "auto")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, stop)
        train("finetune", tmp_path, *args)
    train("finetune", tmp_path, *args)
    whole, parts = (load(folder / "checkpoint-1.pth") for folder in (averaged[0], tmp_path))
    for key in ("model", "model_ema", "optimizer"):
        assert_same(whole[key], parts[key], key)
    assert log_txt(averaged[0]) == log_txt(tmp_path)


def test_average_is_rolled_back_with_the_weights(images, tmp_path, monkeypatch):
    poison(monkeypatch, 13, 14)  # behind 6 batches and two evaluations of 3; read at the end of the second epoch
    said = train("finetune", tmp_path, *FINETUNE, "--data_path", images, *AVERAGED, "--on_nan", "rollback")
    assert said.count("back to the last checkpoint") == 1
    ends = [load(tmp_path / f"checkpoint-{epoch}.pth") for epoch in (0, 1)]
    for key in ("model", "model_ema"):
        assert_same(dict(ends[0][key]), dict(ends[1][key]))


def test_run_without_average_has_none_and_one_may_start_from_its_weights(images, tmp_path):
    args = (*FINETUNE, "--data_path", images)
    train("finetune", tmp_path, *args, "--epochs", 1)
    before = load(tmp_path / "checkpoint-0.pth")
    assert "model_ema" not in before and not any("ema" in key for key in log_txt(tmp_path)[0])
    said = train("finetune", tmp_path, *args, *AVERAGED, "--model_ema", 0.999999, "--resume", "auto")
    assert "has no average of the weights: that of --model_ema starts from its weights" in said
    end = load(tmp_path / "checkpoint-1.pth")
    assert_same_but_for_rounding(end["model_ema"], before["model"])
    said = train("finetune", tmp_path, *args, "--epochs", 3, "--resume", "auto")
    assert "--model_ema None (was 0.999999)" in said
    assert "model_ema" not in load(tmp_path / "checkpoint-2.pth")


def assert_same_but_for_rounding(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-4, msg=name)


def test_average_is_used_by_whatever_reads_a_checkpoint(averaged, images, tmp_path):
    """FILE#model_ema in --eval, --finetune, open_model, export and main_evaluate.py."""
    folder, _ = averaged
    file = folder / "checkpoint-1.pth"
    weights, line = load(file)["model_ema"], log_txt(folder)[-1]
    said = train(
        "finetune", tmp_path / "eval", *FINETUNE, "--data_path", images, "--eval", "--resume", f"{file}#model_ema"
    )
    assert f"* Acc@1 {line['test_acc1_ema']:.3f} Acc@5 100.000 loss {line['test_loss_ema']:.3f}" in said
    model = open_model(f"{file}#model_ema")
    assert_same(dict(model.state_dict()), dict(weights))
    assert model.classes == ["ant", "bee", "cat"]
    path, _ = export(f"{file}#model_ema", "safetensors", output=tmp_path / "out")
    assert_same(load_file(path), {name: value.contiguous() for name, value in weights.items()})
    train("finetune", tmp_path / "more", *FINETUNE, "--data_path", images, "--finetune", f"{file}#model_ema", "--lr", 0,
          "--min_lr", 0, "--epochs", 1)  # fmt: skip
    assert_same(dict(load(tmp_path / "more" / "checkpoint-0.pth")["model"]), dict(weights))
    # one table holds one of the two
    sets = [
        "--set",
        f"own={images / 'val'}",
        "--output_dir",
        str(tmp_path / "table"),
        "--device",
        "cpu",
        "--amp",
        "off",
    ]
    table = main_evaluate.get_args_parser().parse_args(["--resume", f"{file}#model_ema", *sets])
    main_evaluate.main(table)
    assert f"{line['test_acc1_ema']:.2f}"[:4] in (tmp_path / "table" / "results.md").read_text()
    table.resume = str(file)
    with pytest.raises(UserError, match="name another"):
        main_evaluate.main(table)


def test_average_that_a_file_lacks_is_an_error_that_says_so(tmp_path):
    torch.save({"model": six_blocks().state_dict()}, tmp_path / "plain.pth")
    for read in (checkpoint.load, open_model):
        with pytest.raises(UserError, match="plain.pth has no average of the weights"):
            read(f"{tmp_path}/plain.pth#model_ema")


ODD = {
    "NaN": lambda weights: weights["head.bias"].fill_(float("nan")),
    "another shape": lambda weights: weights.update({"head.bias": torch.zeros(4)}),
    "lacking": lambda weights: weights.pop("head.bias"),
    "no tensor": lambda weights: weights.update({"head.bias": "zero"}),
    "sparse": lambda weights: weights.update({"head.bias": torch.zeros(3).to_sparse()}),
    "a name": lambda weights: weights.update({7: torch.zeros(3)}),
}


@pytest.mark.parametrize("change", ODD)
def test_odd_average_is_refused_in_one_message(change, averaged, images, tmp_path):
    state = load(averaged[0] / "checkpoint-0.pth")
    ODD[change](state["model_ema"])
    torch.save(state, tmp_path / "odd.pth")
    args = (*FINETUNE, "--data_path", images, *AVERAGED, "--output_dir", "", "--log_dir", "")
    for resume in (("--resume", tmp_path / "odd.pth"), ("--eval", "--resume", f"{tmp_path / 'odd.pth'}#model_ema")):
        with pytest.raises(UserError, match="odd.pth"):
            train("finetune", None, *args, *resume)
