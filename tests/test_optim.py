"""From gradients to weights: optimizers, decay, schedules, positions, the optimizer step, and both engines."""

import io
import math
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import timm.optim
import torch
import torch.nn.functional as F
from helpers import assert_same, project_log, quiet_run, write_image_folder
from PIL import Image
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import engine_finetune
import engine_pretrain
import main_finetune
import main_linprobe
import main_pretrain
import models_mae
import models_vit
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util.crop import RandomResizedCrop
from util.dist import Dist
from util.errors import NonFiniteLossError, UserError
from util.lars import LARS
from util.lr_decay import get_layer_id_for_vit, param_groups_lrd
from util.lr_sched import Schedule, adjust_learning_rate, scaled_lr
from util.pos_embed import (
    get_1d_sincos_pos_embed_from_grid,
    get_2d_sincos_pos_embed,
    get_2d_sincos_pos_embed_from_grid,
    interpolate_pos_embed,
)
from util.run.resume import load_training_state
from util.run.run import Run
from util.run.run_log import RunLog
from util.step import Step, autocast_dtype

CPU = Dist(torch.device("cpu"))
SIZES = ["base_patch16", "large_patch16"]


class Curves(RunLog):
    """Keeps what the engines write to TensorBoard, and writes none."""

    def __init__(self) -> None:
        super().__init__(CPU, "", "")
        self.points: dict[str, list[tuple[int, float]]] = {}

    def scalar(self, tag: str, value: float, x: int) -> None:
        self.points.setdefault(tag, []).append((x, value))

    def of(self, step: Step, env: Dist = CPU):
        """A run that writes here."""
        run = quiet_run(step, env)
        run.log = self
        return run

    def values(self, tag: str) -> list[float]:
        return [value for _, value in self.points[tag]]

    def x(self, tag: str) -> list[int]:
        return [x for x, _ in self.points[tag]]


class WithNoise(nn.Module):
    """The masked autoencoder, masked by the next of `noise` [passes, N, L] whenever the engine calls it."""

    def __init__(self, model: nn.Module, noise: torch.Tensor) -> None:
        super().__init__()
        self.model, self.noise = model, iter(noise)

    def forward(self, imgs, mask_ratio):
        return self.model(imgs, mask_ratio, next(self.noise))


def small_mae() -> MaskedAutoencoderViT:
    return MaskedAutoencoderViT(16, 4, 3, 24, 2, 3, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=4)


def small_vit(**options) -> VisionTransformer:
    options = {"img_size": 16, "patch_size": 4, "num_classes": 5, "global_pool": True} | options
    return VisionTransformer(embed_dim=24, depth=3, num_heads=3, **options)


def named_groups(model: nn.Module, groups: list[dict]) -> dict[str, dict]:
    """Parameter name -> its group, for parameters that are each in exactly one group."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], group) for group in groups for p in group["params"]]
    assert len(dict(found)) == len(found), "a parameter is in two groups"
    return dict(found)


# --- LARS ---------------------------------------------------------------------------------------------------------


def test_lars_takes_the_recorded_steps(golden):
    data = golden("lars")
    layer = nn.Linear(12, 5)
    layer.load_state_dict({"weight": data["w0"], "bias": data["b0"]})
    optimizer = LARS(layer.parameters(), **data.config)
    for i in range(8):
        loss = F.cross_entropy(layer(data["x"]), data["y"])
        assert loss.item() == pytest.approx(data["loss"][i].item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert_close(layer.weight.data, data[f"w{i + 1}"], rtol=1e-5, atol=1e-5)
        assert_close(layer.bias.data, data[f"b{i + 1}"], rtol=1e-5, atol=1e-5)


def test_lars_decays_and_rescales_matrices_alone():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    w, b = layer.weight.data.clone(), layer.bias.data.clone()
    optimizer = LARS(layer.parameters(), lr=0.5, weight_decay=0.1, momentum=0.8, trust_coefficient=0.01)
    mu_w, mu_b = torch.zeros(3, 4), torch.zeros(3)
    for _ in range(3):
        layer.weight.grad, layer.bias.grad = torch.randn(3, 4), torch.randn(3)
        update = layer.weight.grad + 0.1 * w
        mu_w = 0.8 * mu_w + update * (0.01 * w.norm() / update.norm())
        mu_b = 0.8 * mu_b + layer.bias.grad
        w, b = w - 0.5 * mu_w, b - 0.5 * mu_b
        optimizer.step()
    assert_close(layer.weight.data, w)
    assert_close(layer.bias.data, b)


def test_lars_steps_plainly_from_a_zero_matrix_and_stays_at_a_zero_gradient():
    zero, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    unused = nn.Parameter(torch.ones(2, 2))
    zero.grad, still.grad = torch.full((2, 2), 3.0), torch.zeros(2, 2)
    LARS([zero, still, unused], lr=0.1).step()
    assert_close(zero.data, torch.full((2, 2), -0.3))
    assert torch.equal(still, torch.ones(2, 2))
    assert torch.equal(unused, torch.ones(2, 2))


# --- optimizers of all kinds, saved and resumed -------------------------------------------------------------------


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers in one, as users of torch's Muon combine them: it takes matrices alone."""

    def __init__(self, model: nn.Module) -> None:
        matrices = [param for param in model.parameters() if param.ndim == 2]
        others = [param for param in model.parameters() if param.ndim != 2]
        super().__init__([*matrices, *others], {"lr": 0.01})
        self.both = [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(others, lr=0.01, fused=True)]

    def step(self, closure=None):
        for optimizer in self.both:
            optimizer.step(closure)

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self.both]

    def load_state_dict(self, state):
        for optimizer, one in zip(self.both, state, strict=True):
            optimizer.load_state_dict(one)


def of_model(make, **options):
    return lambda model: make(model.parameters(), lr=0.01, **options)


OPTIMIZERS = {
    "AdamW": of_model(torch.optim.AdamW),
    "AdamW fused": of_model(torch.optim.AdamW, fused=True, amsgrad=True),
    "SGD": of_model(torch.optim.SGD),
    "SGD momentum": of_model(torch.optim.SGD, momentum=0.9, nesterov=True),
    "Adafactor": of_model(torch.optim.Adafactor),
    "Muon": lambda model: torch.optim.Muon([param for param in model.parameters() if param.ndim == 2], lr=0.01),
    "Muon and AdamW": MuonAndAdamW,
    "LARS": of_model(LARS, weight_decay=0.1),
    "Rprop": of_model(torch.optim.Rprop),
    # timm's: with factors, a counter in the group, weights kept after some steps
    **{
        name: lambda model, name=name: timm.optim.create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.05)
        for name in (
            "kron",  # lists, and a generator's state beside (compiles for 10 s)
            "adafactor", "adafactorbv", "muon", "lion", "lamb", "adan", "madgrad", "nadamw", "adopt", "mars",
            "laprop", "rmsproptf", "sgdp", "novograd", "lars", "adabelief", "lookahead_adamw", "lookahead_adan",
        )
    },
}  # fmt: skip


def varied_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 24, 4, 4), nn.Flatten(), nn.LayerNorm(96), nn.Linear(96, 20), nn.Linear(20, 2), nn.Linear(2, 2)
    )


def train_varied(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Each step's images and draws depend on its number; the last layer never gets a gradient."""
    for step in steps:
        torch.manual_seed(step)
        model[:-1](torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def off_and_back(state: object) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def go_on(state: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As --resume does."""
    model.load_state_dict(state["model"])
    load_training_state("checkpoint.pth", state, optimizer, torch.amp.GradScaler("cpu", enabled=False))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "kron" else name for name in OPTIMIZERS]
)
def test_any_optimizer_goes_on_bit_for_bit(name):
    whole, first, second = varied_model(0), varied_model(0), varied_model(1)
    one, two, three = (OPTIMIZERS[name](model) for model in (whole, first, second))
    train_varied(whole, one, range(12))
    train_varied(first, two, range(8))  # past the sixth, where Lookahead first keeps something
    state = off_and_back({"model": first.state_dict(), "optimizer": two.state_dict(), "epoch": 0})
    train_varied(second, three, range(3))  # as before a rollback
    go_on(state, second, three)
    assert_same(second.state_dict(), first.state_dict())
    train_varied(second, three, range(8, 12))
    assert_same(second.state_dict(), whole.state_dict())
    assert_same(three.state_dict(), one.state_dict())


ODD_LAYOUTS = {
    "stride 0": lambda moment: torch.full((1,), 0.5).expand(moment.shape),
    "transposed": lambda moment: moment.transpose(0, -1).contiguous().transpose(0, -1),
    "channels-last": lambda moment: (
        moment.contiguous(memory_format=torch.channels_last) if moment.ndim == 4 else moment
    ),
    "in double": lambda moment: moment.double(),
    "in a larger storage": lambda moment: torch.stack([moment, moment, moment], -1)[..., 1],
}


@pytest.mark.parametrize("layout", ODD_LAYOUTS)
@pytest.mark.parametrize("name", ["AdamW", "AdamW fused", "LARS", "lion"])
def test_moments_are_laid_out_as_their_parameters_however_the_file_has_them(name, layout):
    """The fused kernel pairs numbers by their place in memory, and writes as many as the parameter has."""
    model, plain = varied_model(0), varied_model(0)
    optimizer, expected = OPTIMIZERS[name](model), OPTIMIZERS[name](plain)
    train_varied(model, optimizer, range(3))
    state = off_and_back({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 0})
    for moments in state["optimizer"]["state"].values():
        moments |= {key: ODD_LAYOUTS[layout](moments[key]) for key in moments if key != "step"}
    ordinary = off_and_back(state)
    for moments in ordinary["optimizer"]["state"].values():
        moments |= {key: moments[key].float().contiguous().clone() for key in moments}
    go_on(state, model, optimizer)
    plain.load_state_dict(ordinary["model"])
    expected.load_state_dict(ordinary["optimizer"])
    for param, moments in optimizer.state.items():
        assert {moment.stride() for key, moment in moments.items() if key != "step"} == {param.stride()}
        assert all(moment.untyped_storage().nbytes() == moment.nbytes for moment in moments.values())
    for one, two in ((model, optimizer), (plain, expected)):
        train_varied(one, two, range(3, 6))
    assert_same(model.state_dict(), plain.state_dict())


def test_moments_that_share_memory_are_parted():
    model = varied_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    train_varied(model, optimizer, range(1))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 0}
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg_sq"] = moments["exp_avg"]
    go_on(off_and_back(state), model, optimizer)
    places = [value.data_ptr() for moments in optimizer.state.values() for value in moments.values()]
    assert len(set(places)) == len(places) == 3 * 8


def test_a_look_at_what_an_optimizer_keeps_leaves_weights_and_gradients():
    model = varied_model(0)
    optimizer = MuonAndAdamW(model)
    train_varied(model, optimizer, range(2))
    model(torch.ones(1, 3, 8, 8)).sum().backward()
    weights = {name: param.clone() for name, param in model.named_parameters()}
    grads = {name: param.grad.clone() for name, param in model.named_parameters()}
    state = off_and_back({"optimizer": optimizer.state_dict(), "epoch": 0})
    load_training_state("c.pth", state, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    assert_same(dict(model.named_parameters()), weights)
    assert_same({name: param.grad for name, param in model.named_parameters()}, grads)


# --- which parameter gets which rate and decay --------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("decay", [0.65, 0.75])
def test_layer_decay_gives_each_parameter_the_recorded_rate_and_decay(recipe, size, decay):
    with torch.device("meta"):
        model = models_vit.MODELS[f"vit_{size}"](num_classes=1000, global_pool=True)
    groups = named_groups(model, param_groups_lrd(model, 0.05, model.no_weight_decay(), decay))
    expected = recipe[f"layer_decay/{size}/{decay}"]
    assert list(groups) == list(expected), "the original's order: checkpoints know parameters by number"
    for name, (scale, weight_decay) in expected.items():
        assert groups[name]["lr_scale"] == pytest.approx(scale, rel=1e-12), name
        assert groups[name]["weight_decay"] == weight_decay, name


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("cls_token", 0), ("pos_embed", 0), ("patch_embed.proj.weight", 0), ("patch_embed_2.proj.weight", 0),
        ("blocks.0.norm1.weight", 1), ("blocks.11.mlp.fc2.bias", 12), ("norm.weight", 13), ("fc_norm.bias", 13),
        ("head.weight", 13), ("cls_token_2", 13), ("decoder_blocks.0.norm1.bias", 13),
    ],
)  # fmt: skip
def test_each_parameter_has_a_layer(name, layer):
    assert get_layer_id_for_vit(name, 13) == layer
    assert get_layer_id_for_vit(name=name, num_layers=13) == layer


def test_layer_decay_leaves_out_frozen_parameters():
    model = small_vit()
    model.blocks.requires_grad_(False)
    names = named_groups(model, param_groups_lrd(model, 0.05, model.no_weight_decay(), 0.75)).keys()
    assert names == {name for name, _ in model.named_parameters() if not name.startswith("blocks.")}


@pytest.mark.parametrize("size", SIZES)
def test_pretraining_decays_the_recorded_parameters(recipe, size):
    with torch.device("meta"):
        model = models_mae.MODELS[f"mae_vit_{size}"]()
    groups = named_groups(model, param_groups_weight_decay(model, 0.05))
    recorded = recipe[f"pretrain_weight_decay/{size}"]
    assert {name: group["weight_decay"] for name, group in groups.items()} == recorded
    assert list(groups) == list(recorded), "the original's order"


class Caught(Exception):
    """Carries what a script hands to its engine."""


def set_up(script, options: str, root, monkeypatch) -> tuple:
    """Run a script up to its first epoch -> (what the engine is called with, the same by name)."""

    def catch(*args, **options):
        raise Caught(args, options)

    monkeypatch.setattr(script, "train_one_epoch", catch)
    monkeypatch.setattr("util.run.start.setup_logging", lambda env, output_dir: None)
    data = write_image_folder(root, n_train=2, n_val=1)
    common = f"--data_path {data} --epochs 7 --warmup_epochs 3 --num_workers 0 --device cpu --amp off".split()
    with pytest.raises(Caught) as caught:
        script.main(
            script.get_args_parser().parse_args([*common, "--output_dir", "", "--log_dir", "", *options.split()])
        )
    return caught.value.args


def test_main_pretrain_hands_over_the_recorded_optimizer(recipe, tmp_path, monkeypatch):
    options = "--model mae_vit_tiny_patch4 --input_size 32 --batch_size 1 --accum_iter 2 --weight_decay 0.07"
    (model, _, step, schedule, _, run), named = set_up(main_pretrain, options, tmp_path, monkeypatch)
    assert type(step.optimizer) is torch.optim.AdamW
    groups = named_groups(model, step.optimizer.param_groups)
    assert groups.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    # all blocks alike: recorded names without the number of the block
    recorded = recipe["pretrain_weight_decay/base_patch16"]
    decayed = {re.sub(r"\.\d+\.", ".", name): decay > 0 for name, decay in recorded.items()}
    for name, group in groups.items():
        assert group["betas"] == (0.9, 0.95)
        assert group["weight_decay"] == (0.07 if decayed[re.sub(r"\.\d+\.", ".", name)] else 0), name
    assert step.model is model and step.accum_iter == 2 and step.clip_grad is None and step.dtype is None
    assert schedule == Schedule(lr=1e-3 * 2 / 256, min_lr=0.0, warmup_epochs=3, epochs=7)
    assert named["mask_ratio"] == 0.75 and run.step is step


def test_main_finetune_hands_over_layer_decay_and_clipping(tmp_path, monkeypatch):
    options = "--model vit_tiny_patch4 --input_size 32 --nb_classes 3 --batch_size 2 --lr 0.5 --clip_grad 2 "
    options += "--weight_decay 0.07 --layer_decay 0.5 --drop_path 0.3"
    (model, _, _, step, schedule, _, run), named = set_up(main_finetune, options, tmp_path, monkeypatch)
    assert type(step.optimizer) is torch.optim.AdamW
    groups = named_groups(model, step.optimizer.param_groups)
    assert groups.keys() == {name for name, _ in model.named_parameters()}
    for name, group in groups.items():
        assert group["betas"] == (0.9, 0.999)
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 5
        layer = 0 if name.startswith(("cls_token", "pos_embed", "patch_embed")) else layer
        assert group["lr_scale"] == 0.5 ** (5 - layer), name
        plain = name in ("cls_token", "pos_embed") or model.get_parameter(name).ndim == 1
        assert group["weight_decay"] == (0 if plain else 0.07), name
    assert step.clip_grad == 2 and named["mixup"] is None
    assert [getattr(block.drop_path1, "drop_prob", 0) for block in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert schedule == Schedule(lr=0.5, min_lr=1e-6, warmup_epochs=3, epochs=7)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", LabelSmoothingCrossEntropy),
        ("--smoothing 0", nn.CrossEntropyLoss),
        ("--mixup 0.8", SoftTargetCrossEntropy),
        ("--cutmix 1.0", SoftTargetCrossEntropy),
        ("--cutmix_minmax 0.2 0.8 --smoothing 0", SoftTargetCrossEntropy),
    ],
)
def test_main_finetune_chooses_the_loss_that_fits_the_targets(tmp_path, monkeypatch, options, expected):
    base = "--model vit_tiny_patch4 --input_size 32 --nb_classes 3 --batch_size 2 "
    (_, criterion, *_), named = set_up(main_finetune, base + options, tmp_path, monkeypatch)
    assert type(criterion) is expected
    mixup = named["mixup"]
    assert (mixup is not None) == (expected is SoftTargetCrossEntropy)
    if expected is LabelSmoothingCrossEntropy:
        assert criterion.smoothing == 0.1
    if mixup is not None:  # it smooths the targets
        assert mixup.label_smoothing == (0 if "smoothing" in options else 0.1) and mixup.num_classes == 3


def test_main_linprobe_hands_over_lars_on_a_fresh_head_alone(tmp_path, monkeypatch):
    options = "--model vit_tiny_patch4 --input_size 32 --nb_classes 3 --batch_size 2"
    (model, criterion, _, step, schedule, _, run), _ = set_up(main_linprobe, options, tmp_path, monkeypatch)
    assert type(step.optimizer) is LARS and type(criterion) is nn.CrossEntropyLoss
    [group] = step.optimizer.param_groups
    assert (group["momentum"], group["trust_coefficient"], group["weight_decay"]) == (0.9, 0.001, 0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert named_groups(model, [group]).keys() == trained == {"head.1.weight", "head.1.bias"}
    norm, linear = model.head
    assert isinstance(norm, nn.BatchNorm1d) and norm.eps == 1e-6 and not norm.affine
    # 192 draws of deviation 0.01, six standard errors of it allowed
    assert linear.weight.std().item() == pytest.approx(0.01, rel=6 / math.sqrt(2 * 192)) and not linear.bias.any()
    assert schedule == Schedule(lr=0.1 * 2 / 256, min_lr=0.0, warmup_epochs=3, epochs=7)


# --- schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("kind", [Schedule, SimpleNamespace])
def test_schedule_passes_the_recorded_points(recipe, number, kind):
    recorded = dict(recipe["lr_schedule"][number])
    points = recorded.pop("points")
    args = kind(**recorded)
    whole, half = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [whole]}, {"params": [half], "lr_scale": 0.5}], lr=9.0)
    for epoch, lr, lr_of_half in points:
        # near the end 1 + cos(...) loses all but six digits
        assert adjust_learning_rate(optimizer, epoch, args) == pytest.approx(lr, rel=1e-6, abs=1e-18)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([lr, lr_of_half], rel=1e-6, abs=1e-18)


def test_schedule_works_without_warm_up():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=9.0)
    rates = [adjust_learning_rate(optimizer, e, Schedule(1.0, 0.0, 0, 2)) for e in (0, 1, 2)]
    assert rates == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize(("warmup_epochs", "said"), [(40, True), (2, True), (1, False), (0, False)])
def test_a_warm_up_as_long_as_the_training_is_named(warmup_epochs, said):
    with project_log() as lines:
        Schedule(1.0, 0.0, warmup_epochs, 2)
    assert [f"--warmup_epochs {warmup_epochs} is not below --epochs 2" in line for line in lines] == [True] * said


def test_scaled_lr_follows_the_batch_unless_an_absolute_rate_is_given():
    assert scaled_lr(None, 1.5e-4, 4096) == pytest.approx(2.4e-3)
    assert scaled_lr(None, 1e-3, 256) == pytest.approx(1e-3)
    assert scaled_lr(0.7, 1e-3, 4096) == 0.7
    assert scaled_lr(0.0, 1e-3, 4096) == 0.0


# --- positions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "width", "side"), [("sincos_48_4", 48, 4), ("sincos_96_14", 96, 14)])
def test_position_table_is_the_recorded_one(golden, name, width, side):
    expected = golden("pos_embed")[name].numpy()
    table = get_2d_sincos_pos_embed(width, side, cls_token=True)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(get_2d_sincos_pos_embed(width, (side, side)), expected[1:], rtol=0, atol=1e-6)


def test_position_table_of_a_rectangle_encodes_column_then_row():
    table = get_2d_sincos_pos_embed(8, (2, 5))
    assert table.shape == (10, 8)
    for row in range(2):
        for column in range(5):
            naive = [
                f(place / 10000 ** (i / 2)) for place in (column, row) for f in (math.sin, math.cos) for i in (0, 1)
            ]
            np.testing.assert_allclose(table[row * 5 + column], naive, rtol=0, atol=1e-6)


@pytest.mark.parametrize("whole", [int, np.int64, np.int32, np.uint8, np.uint64])
def test_position_table_takes_numpy_s_integers(whole):
    expected = get_2d_sincos_pos_embed(8, (3, 3), cls_token=True)
    assert np.array_equal(get_2d_sincos_pos_embed(whole(8), whole(3), cls_token=True), expected)
    assert np.array_equal(get_2d_sincos_pos_embed(8, np.array([3, 3], dtype=whole), cls_token=True), expected)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 2, 2), (1,)])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, np.ndarray.tolist])
def test_positions_of_any_shape_and_number_of_dimensions_are_encoded(shape, kind):
    grid = np.random.default_rng(0).uniform(0, 20, (2, *shape))

    def naive(places, width):
        rates = [1 / 10000 ** (i / (width // 2)) for i in range(width // 2)]
        return [[f(place * rate) for f in (math.sin, math.cos) for rate in rates] for place in places.flatten()]

    one = get_1d_sincos_pos_embed_from_grid(6, kind(grid[0]))
    assert one.dtype == np.float64 and one.shape == (grid[0].size, 6)
    np.testing.assert_allclose(one, naive(grid[0], 6), rtol=0, atol=1e-12)
    two = get_2d_sincos_pos_embed_from_grid(8, kind(grid))
    np.testing.assert_allclose(two, np.hstack([naive(axis, 4) for axis in grid]), rtol=0, atol=1e-12)


def test_the_table_of_a_grid_is_made_of_columns_then_rows():
    grid = np.stack(np.meshgrid(np.arange(5, dtype=np.float32), np.arange(2, dtype=np.float32))).reshape(2, 1, 2, 5)
    np.testing.assert_allclose(
        get_2d_sincos_pos_embed_from_grid(8, grid), get_2d_sincos_pos_embed(8, (2, 5)), atol=1e-7
    )


def test_position_table_needs_a_width_divisible_by_4():
    for table in (lambda: get_2d_sincos_pos_embed(6, 4), lambda: get_2d_sincos_pos_embed_from_grid(6, np.ones((2, 3)))):
        with pytest.raises(ValueError, match="embed_dim 6 must be divisible by 4"):
            table()
    with pytest.raises(ValueError, match="embed_dim 7 must be even"):
        get_1d_sincos_pos_embed_from_grid(7, np.arange(3))


def grid_model(height: int, width: int) -> VisionTransformer:
    """Its positions are [1, 1 + height * width, 16]."""
    return VisionTransformer((4 * height, 4 * width), 4, embed_dim=16, depth=0, num_heads=2, num_classes=2)


def resized(positions: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Bicubic, the class token apart."""
    grid = positions[:, 1:].transpose(1, 2).reshape(1, -1, *old)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.reshape(1, grid.shape[1], -1).transpose(1, 2)], dim=1)


def test_positions_are_interpolated_in_place_to_the_recorded_ones(golden):
    data = golden("pos_embed")
    head = torch.zeros(3)
    state = {"pos_embed": data["interp_in_4_7"].clone(), "head.bias": head}
    assert interpolate_pos_embed(grid_model(7, 7), state) is None
    assert_close(state["pos_embed"], data["interp_out_4_7"], rtol=1e-5, atol=1e-5)
    assert torch.equal(state["pos_embed"][:, 0], data["interp_in_4_7"][:, 0])
    assert state.keys() == {"pos_embed", "head.bias"} and state["head.bias"] is head


@pytest.mark.parametrize(
    ("source", "target", "given"),
    [
        ((4, 4), (4, 4), None),
        ((4, 4), (2, 8), None),  # as many patches, in another shape
        ((4, 4), (3, 5), None),
        ((3, 5), (3, 5), None),  # not a square: the model's own grid
        ((2, 8), (4, 4), (2, 8)),
        ((2, 8), (2, 8), (2, 8)),
        ((3, 5), (6, 4), (3, 5)),
    ],
)
def test_positions_move_between_rectangles(source, target, given):
    torch.manual_seed(0)
    old = torch.randn(1, 1 + source[0] * source[1], 16)
    state = {"pos_embed": old.clone()}
    interpolate_pos_embed(grid_model(*target), state, source_grid=given)
    if source == target:
        assert torch.equal(state["pos_embed"], old)
    else:
        assert_close(state["pos_embed"], resized(old, source, target))
    model = grid_model(*target)
    model.load_state_dict(state | {k: v for k, v in model.state_dict().items() if k != "pos_embed"})


class WithoutGrid(nn.Module):
    """A model of somebody else's: its `patch_embed` has nothing but `num_patches`."""

    def __init__(self, num_patches) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.num_patches = num_patches
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + int(num_patches), 16))


@pytest.mark.parametrize("kind", [int, np.int64])
@pytest.mark.parametrize(("old", "new"), [(16, 49), (49, 16), (16, 16), (15, 15)])
def test_a_model_that_knows_its_number_of_patches_alone_is_square(old, new, kind):
    torch.manual_seed(0)
    positions = torch.randn(1, 1 + old, 16)
    state = {"pos_embed": positions.clone()}
    interpolate_pos_embed(WithoutGrid(kind(new)), state)
    sides = [(math.isqrt(n), math.isqrt(n)) for n in (old, new)]
    assert_close(state["pos_embed"], positions if old == new else resized(positions, *sides))


def test_a_model_without_grid_that_is_no_square_gets_no_other_s_positions():
    with pytest.raises(UserError, match="the model has 15 patches, no square, and no patch_embed.grid_size"):
        interpolate_pos_embed(WithoutGrid(15), {"pos_embed": torch.zeros(1, 17, 16)})


def test_positions_of_an_unknown_grid_are_refused():
    state = {"pos_embed": torch.zeros(1, 1 + 15, 16)}
    with pytest.raises(UserError, match="15 patches.*4 x 4"):
        interpolate_pos_embed(grid_model(4, 4), state)
    with pytest.raises(UserError, match="16 patches"):
        interpolate_pos_embed(grid_model(4, 4), {"pos_embed": torch.zeros(1, 1 + 16, 16)}, source_grid=(3, 5))


def test_a_state_dict_without_positions_is_left_alone():
    state = {"head.bias": torch.zeros(3)}
    interpolate_pos_embed(grid_model(4, 4), state)
    assert state.keys() == {"head.bias"}


# --- whole runs through the engines -------------------------------------------------------------------------------


def assert_final_weights(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name in expected:
        ours, theirs = state[name].clone(), expected[name].clone()
        if name.endswith("attn.qkv.bias"):
            # A bias on the keys adds the same to all scores of a query, which softmax ignores: its true gradient is 0.
            # AdamW divides the rounding error by its own size, so this third only has to stay small (12 steps of a
            # real gradient move a bias by 1e-2).
            d = len(ours) // 3
            assert ours[d : 2 * d].abs().max() < 1e-3
            ours[d : 2 * d] = theirs[d : 2 * d] = 0
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_pretraining_follows_the_recorded_trajectory(golden):
    data = golden("pretrain_steps")
    c = data.config
    model = MaskedAutoencoderViT(
        c["img_size"], c["patch_size"], 3, c["embed_dim"], c["depth"], c["num_heads"], c["decoder_embed_dim"],
        c["decoder_depth"], c["decoder_num_heads"], c["mlp_ratio"], norm_pix_loss=c["norm_pix_loss"],
        norm_layer=lambda width, **where: nn.LayerNorm(width, eps=c["layer_norm_eps"], **where),
    )  # fmt: skip
    model.load_state_dict(data.group("init"))
    groups = param_groups_weight_decay(model, c["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=9.0, betas=tuple(c["betas"]), fused=True)
    wrapped = WithNoise(model, data["noise"])
    step = Step(wrapped, optimizer, CPU.device, None, c["accum_iter"])
    schedule = Schedule(c["lr"], c["min_lr"], c["warmup_epochs"], c["epochs"])
    curves, n = Curves(), c["steps_per_epoch"]
    for epoch in range(c["epochs"]):
        loader = [(imgs, None) for imgs in data["imgs"][n * epoch : n * (epoch + 1)]]
        stats = engine_pretrain.train_one_epoch(
            wrapped, loader, step, schedule, epoch, curves.of(step), mask_ratio=c["mask_ratio"], seed=0
        )
        span = slice(n * epoch, n * (epoch + 1))
        assert stats["loss"] == pytest.approx(data["losses"][span].mean().item(), rel=1e-5)
        assert stats["lr"] == pytest.approx(data["lrs"][span].mean().item(), rel=1e-6)
    assert curves.values("train_loss") == pytest.approx(data["losses"].tolist(), rel=1e-5)
    assert curves.values("lr") == pytest.approx(data["lrs"].tolist(), rel=1e-6)
    assert curves.x("train_loss") == curves.x("lr") == [250 * i for i in range(12)]  # 1000 x fractional epoch
    assert_final_weights(model, data.group("final"))


def test_fine_tuning_follows_the_recorded_trajectory(golden):
    data = golden("finetune_steps")
    c = data.config
    model = VisionTransformer(
        c["img_size"], c["patch_size"], embed_dim=c["embed_dim"], depth=c["depth"], num_heads=c["num_heads"],
        mlp_ratio=c["mlp_ratio"], num_classes=c["num_classes"], global_pool=c["global_pool"],
    )  # fmt: skip
    model.load_state_dict(data.group("init"))
    groups = param_groups_lrd(model, c["weight_decay"], model.no_weight_decay(), c["layer_decay"])
    optimizer = torch.optim.AdamW(groups, lr=9.0, betas=tuple(c["betas"]), fused=True)
    step = Step(model, optimizer, CPU.device, None, c["accum_iter"], c["clip_grad"])
    schedule = Schedule(c["lr"], c["min_lr"], c["warmup_epochs"], c["epochs"])
    criterion = LabelSmoothingCrossEntropy(c["label_smoothing"])
    curves, n = Curves(), c["steps_per_epoch"]
    for epoch in range(c["epochs"]):
        span = slice(n * epoch, n * (epoch + 1))
        loader = list(zip(data["imgs"][span], data["targets"][span], strict=True))
        stats = engine_finetune.train_one_epoch(
            model, criterion, loader, step, schedule, epoch, curves.of(step), seed=0
        )
        assert stats["loss"] == pytest.approx(data["losses"][span].mean().item(), rel=1e-5)
    assert curves.values("loss") == pytest.approx(data["losses"].tolist(), rel=1e-5)
    optimizer_for_rates = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=9.0)
    lrs = [adjust_learning_rate(optimizer_for_rates, i // 2 * 2 / n, schedule) for i in range(12)]
    assert curves.values("lr") == pytest.approx(lrs, rel=1e-6)
    assert curves.x("loss") == curves.x("lr") == [250 * i for i in range(12)]
    assert_final_weights(model, data.group("final"))


@pytest.mark.parametrize("engine", ["pretrain", "finetune"])
def test_accumulating_two_batches_equals_one_of_twice_the_size(engine):
    torch.manual_seed(0)
    imgs, noise, labels = torch.randn(8, 4, 3, 16, 16), torch.rand(8, 4, 16), torch.randint(5, (8, 4))
    start = (small_mae() if engine == "pretrain" else small_vit()).state_dict()
    finals = []
    for accum_iter in (2, 1):
        # one batch of 8 instead of two of 4
        x, z, y = (t if accum_iter == 2 else t.reshape(4, 8, *t.shape[2:]) for t in (imgs, noise, labels))
        model = small_mae() if engine == "pretrain" else small_vit()
        model.load_state_dict(start)
        # plain momentum: AdamW would blow up rounding where a gradient is zero
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=9.0, momentum=0.9)
        schedule = Schedule(lr=0.1, min_lr=0, warmup_epochs=0, epochs=1)
        if engine == "pretrain":
            model = WithNoise(model, z)
            step = Step(model, optimizer, CPU.device, None, accum_iter)
            engine_pretrain.train_one_epoch(
                model, [(batch, None) for batch in x], step, schedule, 0, quiet_run(step), mask_ratio=0.75, seed=0
            )
            model = model.model
        else:
            step = Step(model, optimizer, CPU.device, None, accum_iter)
            loader = list(zip(x, y, strict=True))
            engine_finetune.train_one_epoch(
                model, nn.CrossEntropyLoss(), loader, step, schedule, 0, quiet_run(step), seed=0
            )
        finals.append(model.state_dict())
    assert_close(finals[0], finals[1], rtol=1e-5, atol=1e-6)
    moved = max((finals[0][name] - start[name]).abs().max() for name in start)
    assert moved > 1e-3  # far above the tolerance


def test_classifier_s_loss_is_computed_in_float32():
    model, seen = small_vit(), []
    step = Step(model, torch.optim.SGD(model.parameters(), lr=0.0), CPU.device, torch.bfloat16)
    loader = [(torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.long))]

    def criterion(logits, targets):
        seen.append(logits.dtype)
        return F.cross_entropy(logits, targets)

    engine_finetune.train_one_epoch(model, criterion, loader, step, Schedule(0, 0, 0, 1), 0, quiet_run(step), seed=0)
    assert seen == [torch.float32]


# (seed, epoch, rank): the same, and three others
KEYS = [(0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]


def test_masks_are_decided_by_seed_step_and_rank_and_follow_the_ratio():
    class Spy(nn.Module):
        """Notes the mask of each pass."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.masks = small_mae(), []

        def forward(self, imgs, mask_ratio):
            loss, pred, mask = self.model(imgs, mask_ratio)
            self.masks.append(mask)
            return loss, pred, mask

    loader, runs = [(torch.zeros(2, 3, 16, 16), None)] * 2, []
    for seed, epoch, rank in KEYS:
        spy = Spy()
        env = Dist(CPU.device, rank)
        step = Step(spy, torch.optim.SGD(spy.parameters(), lr=0.0), CPU.device)
        engine_pretrain.train_one_epoch(
            spy, loader, step, Schedule(0, 0, 0, 5), epoch, quiet_run(step, env), mask_ratio=0.5, seed=seed
        )
        assert all((mask.sum(dim=1) == 8).all() for mask in spy.masks)
        runs.append([tuple(mask.flatten().tolist()) for mask in spy.masks])
    assert runs[0] == runs[1]
    assert len({mask for run in runs for mask in run}) == 2 * 4  # two passes each


def test_stochastic_depth_is_decided_by_seed_step_and_rank():
    torch.manual_seed(0)
    model = small_vit(drop_path_rate=0.5)
    loader, runs = [(torch.randn(8, 3, 16, 16), torch.arange(8) % 5)] * 2, []
    for seed, epoch, rank in KEYS:
        env, curves = Dist(CPU.device, rank), Curves()
        step = Step(model, torch.optim.SGD(model.parameters(), lr=0.0), CPU.device)
        engine_finetune.train_one_epoch(
            model, nn.CrossEntropyLoss(), loader, step, Schedule(0, 0, 0, 5), epoch, curves.of(step, env), seed=seed
        )
        runs.append(curves.values("loss"))
    assert runs[0] == runs[1]
    assert len({loss for run in runs for loss in run}) == 2 * 4


def test_erasing_is_decided_by_seed_step_and_rank_and_fills_boxes_of_some_images():
    class Spy(nn.Module):
        """Notes the images of each pass."""

        def __init__(self) -> None:
            super().__init__()
            self.head, self.seen = nn.Linear(1, 5), []

        def forward(self, imgs):
            self.seen.append(imgs.clone())
            return self.head(imgs.mean(dim=(1, 2, 3))[:, None])

    erase, runs = RandomErasing(0.25, mode="pixel", device="cpu"), []
    for seed, epoch, rank in KEYS:
        spy, env = Spy(), Dist(CPU.device, rank)
        loader = [(torch.full((64, 3, 16, 16), 9.0), torch.arange(64) % 5) for _ in range(2)]
        step = Step(spy, torch.optim.SGD(spy.parameters(), lr=0.0), CPU.device)
        engine_finetune.train_one_epoch(
            spy, nn.CrossEntropyLoss(), loader, step, Schedule(0, 0, 0, 5), epoch, quiet_run(step, env),
            erase=erase, seed=seed,
        )  # fmt: skip
        runs.append(torch.stack(spy.seen))
    assert torch.equal(runs[0], runs[1])
    assert len({tuple(imgs.flatten().tolist()) for run in runs for imgs in run}) == 2 * 4
    erased = torch.cat([imgs for run in runs[1:] for imgs in run]) != 9  # 512 images
    assert 0.17 < erased.flatten(1).any(dim=1).float().mean() < 0.33
    areas = erased[:, 0].flatten(1).float().mean(dim=1)
    assert areas[areas > 0].min() > 0.005 and areas.max() < 0.4  # 2 to 33 %, rounded to pixels
    filled = torch.cat([imgs for run in runs[1:] for imgs in run])[erased]
    assert abs(filled.mean()) < 0.02 and abs(filled.std() - 1) < 0.02  # normal, of the scale of normalised pixels


@pytest.mark.parametrize("classes", [3, 10])
def test_evaluation_gives_the_naive_figures(classes):
    torch.manual_seed(0)
    model = small_vit(num_classes=classes, drop_path_rate=0.5)
    with torch.no_grad():
        model.head.weight.mul_(20)
    model.train()
    imgs, labels = torch.randn(23, 3, 16, 16), torch.randint(classes, (23,))
    loader = [(imgs[i : i + 5], labels[i : i + 5]) for i in range(0, 23, 5)]  # the last one is smaller
    stats = engine_finetune.evaluate(model, loader, CPU, None, sharded=False)
    with torch.no_grad():
        logits = model.eval()(imgs)
    order = logits.argsort(dim=1, descending=True)
    ranks = [order[n].tolist().index(labels[n]) for n in range(23)]
    losses = [(logits[n].logsumexp(0) - logits[n, labels[n]]).item() for n in range(23)]
    expected = {
        "loss": sum(losses) / 23,
        "acc1": 100 * sum(r < 1 for r in ranks) / 23,
        "acc5": 100 * sum(r < min(5, classes) for r in ranks) / 23,
    }
    assert stats == pytest.approx(expected, rel=1e-5)
    assert 0 < stats["acc1"] < 100


class Sick(nn.Module):
    """A model whose loss is `value` from its pass number `at` on."""

    def __init__(self, at: int, value: float) -> None:
        super().__init__()
        self.weight, self.at, self.value, self.passes = nn.Parameter(torch.ones(1)), at, value, 0

    def forward(self, imgs, mask_ratio=None):
        loss = (self.weight * imgs).mean() + (self.value if self.passes >= self.at else 0)
        self.passes += 1
        return loss if mask_ratio is None else (loss, None, None)


@pytest.mark.parametrize("engine", ["pretrain", "finetune"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_ends_the_run_naming_the_steps(engine, value):
    model = Sick(at=25, value=value)
    step = Step(model, torch.optim.SGD(model.parameters(), lr=9.0), CPU.device)
    schedule = Schedule(lr=0.001, min_lr=0.001, warmup_epochs=0, epochs=9)
    loader = [(torch.zeros(1), torch.zeros(1))] * 50
    # the first of them, at iteration 25, is forgiven
    names = rf"Epoch: \[3\] loss {value}.* at iteration 26 \(read at iterations 21 to 40; lr 0.001"
    curves = Curves()
    run = curves.of(step)
    with pytest.raises(NonFiniteLossError, match=names):
        if engine == "pretrain":
            engine_pretrain.train_one_epoch(model, loader, step, schedule, 3, run, mask_ratio=0.75, seed=0)
        else:
            engine_finetune.train_one_epoch(model, lambda loss, _: loss, loader, step, schedule, 3, run, seed=0)
    losses = curves.values("train_loss" if engine == "pretrain" else "loss")
    assert losses == [0.0] * 21  # what was read before


# --- the host never waits between log points ----------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts how often a tensor's content decides something on the host: each would wait for a GPU.

    Two kinds are told apart: inside Run._read, at log points, and elsewhere.
    """

    aten = torch.ops.aten
    WAITING = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default)

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.at_log_points, self.elsewhere, self.reading = 0, Counter(), False
        read = Run._read

        def counted_read(run):
            self.reading = True
            read(run)
            self.reading = False

        monkeypatch.setattr(Run, "_read", counted_read)
        # these don't pass through the dispatcher, or do nothing on the CPU
        for name in ("tolist", "numpy", "cpu", "__repr__"):
            method = getattr(torch.Tensor, name)

            def counted(tensor, *args, _method=method, _name=name, **options):
                self.note(_name)
                return _method(tensor, *args, **options)

            monkeypatch.setattr(torch.Tensor, name, counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is self.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in self.WAITING or by_mask:
            self.note(str(func))
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        if self.reading:
            self.at_log_points += 1
        else:
            self.elsewhere[what] += 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_pretraining_reads_no_tensor_between_log_points(monkeypatch, dtype, clip_grad):
    torch.manual_seed(0)
    model = small_mae()
    # fused, as in the scripts: it leaves out a step whose gradients overflowed, and counts steps, on the device
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=9.0, fused=True)
    step = Step(model, optimizer, CPU.device, dtype, accum_iter=2, clip_grad=clip_grad)
    loader, run = [(torch.randn(2, 3, 16, 16), None) for _ in range(6)], quiet_run(step)
    with HostReads(monkeypatch) as reads:
        engine_pretrain.train_one_epoch(model, loader, step, Schedule(0.001, 0, 1, 2), 0, run, mask_ratio=0.75, seed=0)
    assert reads.elsewhere == {}
    # the first step and the last; with fp16 the loss scale too
    assert reads.at_log_points == (4 if dtype is torch.float16 else 2)


@pytest.mark.parametrize("kind", ["finetune", "mixup", "probe", "average"])
def test_classifiers_read_no_tensor_between_log_points(monkeypatch, kind):
    torch.manual_seed(0)
    model = small_vit(drop_path_rate=0.2)
    mixup, criterion = None, LabelSmoothingCrossEntropy(0.1)
    groups = param_groups_lrd(model, 0.05, model.no_weight_decay(), 0.75)
    optimizer = torch.optim.AdamW(groups, lr=9.0, fused=True)
    if kind == "mixup":
        mixup, criterion = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=5), SoftTargetCrossEntropy()
    if kind == "probe":
        model.requires_grad_(False)
        model.head = nn.Sequential(nn.BatchNorm1d(24, affine=False, eps=1e-6), nn.Linear(24, 5))
        optimizer, criterion = LARS(model.head.parameters(), lr=9.0), nn.CrossEntropyLoss()
    step = Step(model, optimizer, CPU.device, torch.bfloat16, accum_iter=2, clip_grad=None if kind == "probe" else 1.0)
    step.average = ModelEmaV3(model, 0.9) if kind == "average" else None
    loader, run = [(torch.randn(2, 3, 16, 16), torch.randint(5, (2,))) for _ in range(6)], quiet_run(step)
    with HostReads(monkeypatch) as reads:
        engine_finetune.train_one_epoch(
            model, criterion, loader, step, Schedule(0.001, 0, 1, 2), 0, run, mixup=mixup, seed=0
        )
    assert reads.elsewhere == {}
    assert reads.at_log_points == 2


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.item(), lambda t: float(t), lambda t: int(t), lambda t: bool(t), lambda t: t.tolist(),
        lambda t: t.numpy(), lambda t: t.cpu(), lambda t: f"{t:.4f}", lambda t: str(t),
        lambda t: t > 0 and 1, lambda t: t[t > 0], lambda t: math.isfinite(t), lambda t: np.asarray(t),
        lambda t: torch.equal(t, t), lambda t: t.nonzero(),
    ],
)  # fmt: skip
def test_the_counter_of_host_reads_sees_every_kind(monkeypatch, read):
    with HostReads(monkeypatch) as reads:
        read(torch.ones(()))
    assert reads.elsewhere.total() >= 1 and reads.at_log_points == 0


# --- the optimizer step -------------------------------------------------------------------------------------------


class Slope(nn.Module):
    """`lean` gives a loss whose gradient is the vector that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def lean(self, *gradient: float):
        return lambda: (self.weight * torch.tensor(gradient)).sum() + 7


def slope_step(**options) -> tuple[Slope, Step]:
    """SGD of rate 1: the weight moves by minus the gradient."""
    model = Slope()
    return model, Step(model, torch.optim.SGD(model.parameters(), lr=1.0), CPU.device, **options)


def test_a_step_updates_on_request_with_the_mean_gradient_and_forgets_it():
    model, step = slope_step(accum_iter=2)
    for _ in range(2):
        start = model.weight.detach().clone()
        step(model.lean(1.0, 2.0), update=False)
        assert torch.equal(model.weight, start)
        step(model.lean(3.0, -4.0), update=True)
        assert_close(model.weight.data, start - torch.tensor([2.0, -1.0]))


def test_a_step_returns_the_loss_of_the_pass_without_its_graph():
    model, step = slope_step(accum_iter=4, dtype=torch.float16)
    loss = step(model.lean(1.0, 2.0), update=False)
    assert loss.item() == 7 and not loss.requires_grad


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("limit", "moved"), [(1.0, (0.6, 0.8)), (10.0, (3.0, 4.0))])
def test_clipping_limits_the_norm_of_the_accumulated_unscaled_gradient(dtype, limit, moved):
    model, step = slope_step(accum_iter=2, clip_grad=limit, dtype=dtype)
    step(model.lean(6.0, 0.0), update=False)
    step(model.lean(0.0, 8.0), update=True)
    assert_close(model.weight.data, -torch.tensor(moved))
    assert step.grad_norm.item() == pytest.approx(5.0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_without_clipping_nothing_is_limited_and_the_norm_is_measured(dtype):
    model, step = slope_step(accum_iter=2, dtype=dtype)
    assert step.grad_norm.isnan()
    step(model.lean(600.0, 0.0), update=False)
    step(model.lean(0.0, 800.0), update=True)
    assert model.weight.tolist() == [-300, -400]
    assert step.grad_norm.item() == pytest.approx(500.0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_step_computes_in_the_chosen_precision_on_float32_weights(dtype):
    layer = nn.Linear(4, 1)
    step = Step(layer, torch.optim.SGD(layer.parameters(), lr=1.0), CPU.device, dtype)
    seen = []

    def forward():
        seen.append(layer(torch.ones(2, 4)))
        return seen[0].float().mean()

    step(forward, update=True)
    assert seen[0].dtype == (dtype or torch.float32)
    assert layer.weight.dtype == torch.float32
    # float16 alone has so few exponent bits that gradients must be scaled
    assert step.scaler.is_enabled() == (dtype == torch.float16)


@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_fp16_overflow_skips_the_step_and_lowers_the_scale(optimizer, clip_grad):
    model = Slope()
    step = Step(model, optimizer(model.parameters(), lr=1.0, fused=True), CPU.device, torch.float16, 1, clip_grad)
    scale = step.scaler.get_scale()
    step(model.lean(1e37, 0.0), update=True)  # times the scale, beyond float32
    assert model.weight.tolist() == [0, 0]
    assert step.scaler.get_scale() < scale
    step(model.lean(0.25, 0.5), update=True)
    # AdamW's first step has the size of the rate, whatever the gradient's
    assert_close(model.weight.data, -torch.tensor([0.25, 0.5] if optimizer is torch.optim.SGD else [1.0, 1.0]))


@pytest.mark.parametrize(
    ("amp", "device", "has_bf16", "expected"),
    [
        ("off", "cuda", True, None),
        ("bf16", "cpu", False, torch.bfloat16),
        ("fp16", "cuda", True, torch.float16),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),
        ("auto", "cpu", True, torch.bfloat16),
        ("auto", "cpu", False, None),
        ("auto", "mps", True, None),
    ],
)
def test_auto_precision_is_what_the_device_computes_in(monkeypatch, amp, device, has_bf16, expected):
    # emulated bf16, as on older GPUs, is slower than fp16
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation
    )
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16}, raising=False)
    assert autocast_dtype(amp, torch.device(device)) is expected


# --- the crop of the linear probe ---------------------------------------------------------------------------------

DRAWS = 4000
PROBE = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}


def boxes(width: int, height: int, **options) -> np.ndarray:
    """[DRAWS, 4]: top, left, height, width."""
    torch.manual_seed(0)
    image = Image.new("RGB", (width, height))
    return np.array([RandomResizedCrop.get_params(image, **(PROBE | options)) for _ in range(DRAWS)])


def assert_uniform(values: np.ndarray, low: float, high: float, slack: float = 0.0) -> None:
    """No decile is further off than a sample of this size explains, or rounding to pixels (`slack`)."""
    share = np.arange(1, 10) / 10
    # a quantile's standard error is sqrt(q (1 - q) / n) of the range; five of them are allowed
    allowed = (high - low) * 5 * np.sqrt(share * (1 - share) / len(values)) + slack
    assert (np.abs(np.quantile(values, share) - (low + (high - low) * share)) < allowed).all()
    assert values.min() >= low - slack and values.max() <= high + slack


@pytest.mark.parametrize(("width", "height"), [(64, 48), (200, 10), (10, 200), (1, 50), (50, 1), (1, 1)])
def test_crop_is_never_empty_and_never_leaves_the_image(width, height):
    top, left, h, w = boxes(width, height).T
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def test_crop_area_is_uniform_in_its_range():
    _, _, h, w = boxes(4000, 4000, ratio=(1.0, 1.0)).T
    assert (h == w).all()
    assert_uniform(h * w / 4000**2, 0.08, 1.0, slack=1e-3)


def test_crop_shape_is_uniform_in_the_logarithm_of_width_over_height():
    _, _, h, w = boxes(4000, 2000, scale=(0.2, 0.2)).T
    assert_uniform(np.log(w / h), math.log(3 / 4), math.log(4 / 3), slack=2e-3)
    assert np.abs(h * w / (4000 * 2000) - 0.2).max() < 1e-3


def test_crop_corner_is_uniform_over_the_places_that_are_left():
    top, left, h, w = boxes(40, 20, scale=(0.125, 0.125), ratio=(1.0, 1.0)).T
    assert (h == 10).all() and (w == 10).all()
    for corner, places in ((top, 11), (left, 31)):
        counts = np.bincount(corner, minlength=places)
        assert len(counts) == places  # the last place, flush with the edge, included
        assert np.abs(counts - DRAWS / places).max() < 5 * math.sqrt(DRAWS / places)
    assert abs(np.corrcoef(top, left)[0, 1]) < 5 / math.sqrt(DRAWS)


def test_crop_too_large_for_the_image_is_clipped_not_drawn_again():
    """torchvision would fall back to the centre."""
    side = round(math.sqrt(0.5 * 1000 * 10))
    _, left, h, w = boxes(1000, 10, scale=(0.5, 0.5), ratio=(1.0, 1.0)).T
    assert (h == 10).all() and (w == side).all()
    assert_uniform(left, 0, 1000 - side, slack=1)
    top, _, h, w = boxes(10, 1000, scale=(0.5, 0.5), ratio=(1.0, 1.0)).T
    assert (h == side).all() and (w == 10).all()
    assert_uniform(top, 0, 1000 - side, slack=1)


def test_crop_gives_the_asked_size():
    assert RandomResizedCrop(24)(Image.new("RGB", (1, 50))).size == (24, 24)
    assert RandomResizedCrop(24)(torch.zeros(3, 30, 40)).shape == (3, 24, 24)
