"""Parts of a classifier fine-tuned, and an average of its weights."""

import pytest
import torch
from helpers import load
from test_scripts import FINETUNE, images, train  # noqa: F401
from test_speed import kept_for_backward

import main_finetune
import models_vit
from util import flops
from util.dist import Dist
from util.errors import UserError

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


def command(images, start, *more):  # noqa: F811
    given = (*FINETUNE, "--data_path", images, "--model", "six", "--finetune", start, "--drop_path", 0.5)
    return (*given, "--warmup_epochs", 0, "--blr", 0.5, *more)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("tuned", TUNED)
def test_what_is_trained_and_nothing_else_changes(tuned, pooled, images, start, tmp_path):  # noqa: F811
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
def test_more_blocks_than_there_are_is_an_error_that_names_both(tuned, images, start):  # noqa: F811
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
def test_betas_are_the_optimizer_s(betas, images, start, tmp_path):  # noqa: F811
    train("finetune", tmp_path, *command(images, start, "--opt_betas", *betas, "--epochs", 1))
    groups = load(tmp_path / "checkpoint-0.pth")["optimizer"]["param_groups"]
    assert {tuple(group["betas"]) for group in groups} == {betas}
    train("finetune", tmp_path / "as_ever", *command(images, start, "--epochs", 1))
    groups = load(tmp_path / "as_ever" / "checkpoint-0.pth")["optimizer"]["param_groups"]
    assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.999)}
