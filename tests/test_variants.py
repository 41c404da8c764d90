"""The paper's variants: masks, targets, mask tokens in the encoder, decoders, augmentations, starts from weights."""

import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ON_CPU, ROOT, load, torchrun, write_image_folder
from sklearn.decomposition import PCA as Reference
from test_flops import counted_macs
from torch.testing import assert_close
from torchvision import transforms

import main_pretrain
import models_mae
from util import flops, masks, targets
from util.errors import UserError
from util.look.visualize import reconstruct, removed_patches, strategy_noise
from util.look.watch import mean_image_loss
from util.transforms import pretrain_transform
from util.weights.build import open_model

CPU = torch.device("cpu")


def removed_by(name, n, grid, ratio):
    """bool [n, h, w], by the count that the model removes."""
    noise = masks.MASKS[name](n, grid, ratio, CPU)
    assert noise.shape == (n, grid[0] * grid[1]) and ((noise >= 0) & (noise < 1)).all()
    return removed_patches(noise, ratio).view(n, *grid)


# --- masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random", "block"])
@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (4, 4), (4, 6), (16, 12), (3, 9)])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.9])
def test_every_image_removes_the_same_exact_number(name, grid, ratio):
    torch.manual_seed(0)
    length = grid[0] * grid[1]
    expected = length - sum(1 for k in range(1, length + 1) if k <= length * (1 - ratio) + 1e-6)
    assert set(removed_by(name, 50, grid, ratio).sum(dim=(1, 2)).tolist()) == {expected}


def test_random_masks_favour_no_place():
    torch.manual_seed(0)
    counts = removed_by("random", 20_000, (8, 8), 0.75).sum(dim=0)
    deviation = math.sqrt(20_000 * 0.75 * 0.25)
    assert ((counts - 15_000).abs() < 5 * deviation).all()


def rectangles(cells):
    """bool [n, h, w] -> (top, left, height, width), arrays [n], of sets of cells that fill their bounding boxes."""
    places = []
    for lines in (cells.any(dim=2).numpy(), cells.any(dim=1).numpy()):
        first = lines.argmax(axis=1)
        places.append((first, lines.shape[1] - lines[:, ::-1].argmax(axis=1) - first))
    (top, h), (left, w) = places
    assert (h * w == cells.sum(dim=(1, 2)).numpy()).all()
    return top, left, h, w


def test_a_block_s_first_rectangle_has_the_size_shape_and_place_it_should():
    """With so little to remove that the first rectangle does it, what is removed first is that rectangle."""
    torch.manual_seed(0)
    grid, n = (20, 20), 3000
    noise = masks.block(n, grid, 0.25, CPU)  # rectangles of 16 to 100 patches
    first = ((1 - noise) * (masks.N_BLOCKS + 1) - 1e-4).floor().view(n, *grid) == 0
    fits = first.any(dim=(1, 2))
    assert fits.sum() > 0.75 * n
    top, left, h, w = rectangles(first[fits])
    area, aspect = h * w, np.log(h / w)
    # sides are rounded: the drawn area and aspect lie within half a patch of each side
    assert ((h + 0.5) * (w + 0.5) >= 16).all() and ((h - 0.5) * (w - 0.5) <= 100).all()
    assert (aspect <= np.log((h + 0.5) / (h - 0.5)) + np.log((w + 0.5) / (w - 0.5)) + math.log(1 / 0.3)).all()
    small = area < 36  # fits at every aspect: there the logarithm of the aspect is uniform
    parts = np.histogram(aspect[small], np.linspace(math.log(0.3), math.log(1 / 0.3), 4))[0] / small.sum()
    assert parts == pytest.approx([1 / 3] * 3, abs=0.06)
    for place, side, most in ((top, h, 20), (left, w, 20)):
        share = (place + 0.5) / (most - side + 1)  # uniform over the places where it fits
        assert share.mean() == pytest.approx(0.5, abs=0.02) and share.std() == pytest.approx(12**-0.5, abs=0.02)


def test_block_masks_are_unions_of_rectangles_of_which_the_last_is_cut_by_whole_lines():
    torch.manual_seed(1)
    grid, ratio = (14, 14), 0.75
    noise = masks.block(300, grid, ratio, CPU)
    number = ((1 - noise) * (masks.N_BLOCKS + 1) - 1e-4).floor().view(-1, *grid)
    for removed, order in zip(removed_patches(noise, ratio).view(-1, *grid), number, strict=True):
        last = order[removed].max()
        whole = order < last
        assert last < masks.N_BLOCKS and removed[whole].all(), "those before it are removed whole"
        cut = removed & (order == last)
        lines = [(cut.any(dim) & (~removed & (order == last)).any(dim)).sum().item() for dim in (0, 1)]
        assert min(lines) <= 1, "at most one row, or one column, is removed in part"


@pytest.mark.parametrize("grid", [(14, 14), (2, 4), (8, 6)])
def test_grid_masks_keep_the_upper_left_of_every_2_x_2(grid):
    for cells in removed_by("grid", 3, grid, 0.75).tolist():
        assert all(cells[r][c] == (r % 2 == 1 or c % 2 == 1) for r in range(grid[0]) for c in range(grid[1]))


@pytest.mark.parametrize(
    ("name", "grid", "ratio", "word"),
    [
        *(("grid", grid, ratio, "--mask_ratio 0.75") for grid, ratio in (((14, 14), 0.5), ((14, 14), 0.76))),
        *(("grid", grid, 0.75, "even") for grid in ((7, 8), (8, 7), (1, 4))),
        *(("block", grid, 0.75, "too narrow") for grid in ((1, 64), (64, 1))),
    ],
)
def test_what_a_strategy_cannot_do_is_refused(name, grid, ratio, word):
    with pytest.raises(UserError, match=word):
        masks.MASKS[name](1, grid, ratio, CPU)


@pytest.mark.parametrize("name", masks.MASKS)
def test_pictures_draw_the_model_s_own_strategy_and_leave_other_draws_alone(name):
    model = models_mae.mae_vit_tiny_patch4()
    model.mask_noise = masks.MASKS[name]
    torch.manual_seed(7)
    following = torch.rand(3)
    torch.manual_seed(7)
    noise = [strategy_noise(model, 2, 0.75, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), following)
    assert torch.equal(noise[0], noise[1]) and torch.equal(noise[0], noise[2]) == (name == "grid")
    torch.manual_seed(0)
    assert torch.equal(noise[0], masks.MASKS[name](2, (8, 8), 0.75, CPU))


# --- targets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_pixels", "n_components"), [(48, 6), (48, 48), (12, 96), (27, 1)])
def test_principal_components_are_scikit_learn_s(n_pixels, n_components):
    generator = np.random.default_rng(0)
    patches = generator.normal(size=(500, n_pixels)) @ generator.normal(size=(n_pixels, n_pixels)) + 3
    target = targets.PCA(n_pixels, n_components)
    target.prepare(torch.from_numpy(patches).float().view(50, 10, n_pixels))
    kept = min(n_components, n_pixels)
    reference = Reference(kept, svd_solver="full").fit(patches)
    ours = target(torch.from_numpy(patches).float()).numpy()
    theirs = reference.transform(patches)
    signs = np.sign((ours * theirs).sum(axis=0))
    np.testing.assert_allclose(ours, theirs * signs, rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(
        target.inverse(torch.from_numpy(ours)).numpy(), reference.inverse_transform(theirs), rtol=1e-3, atol=2e-3
    )
    before = target.components.clone()
    target.prepare(torch.randn(50, 10, n_pixels))
    assert torch.equal(target.components, before), "fitted once"


def test_the_loss_of_principal_components_is_that_of_their_coefficients():
    torch.manual_seed(0)
    model, imgs = models_mae.mae_vit_tiny_patch4(), torch.randn(4, 3, 32, 32)
    model.set_target(targets.PCA(48, 6))
    model.decoder_target.prepare(model.patchify(imgs))
    loss, pred, mask = model(imgs, 0.75)
    assert pred.shape == (4, 64, 6)
    reference = Reference(6, svd_solver="full").fit(model.patchify(imgs).flatten(0, 1).numpy())
    wanted = model.decoder_target(model.patchify(imgs))
    theirs = reference.transform(model.patchify(imgs).flatten(0, 1).numpy()).reshape(4, 64, 6)
    np.testing.assert_allclose(np.abs(wanted.numpy()), np.abs(theirs), rtol=1e-3, atol=1e-3)
    errors = [((pred[i, j] - wanted[i, j]) ** 2).mean() for i in range(4) for j in range(64) if mask[i, j]]
    assert_close(loss, sum(errors) / len(errors))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(model.target(model.patchify(imgs)), wanted), "the target is exact whatever the rest computes in"


class Brightness(torch.nn.Module):
    """A tokenizer that a test can check by eye: of each patch of 4 x 4, how bright it is, in 8 steps."""

    def __init__(self, n_ids: int = 8):
        super().__init__()
        self.n_ids, self.vocab_size = n_ids, 8

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        level = torch.nn.functional.avg_pool2d(imgs.mean(dim=1, keepdim=True), 4).flatten(1)
        return ((level + 2) * 2).long().clamp(0, self.n_ids - 1)


def write_tokenizer(path, tokenizer=None, kind="script", side=16, extra=None):
    tokenizer = tokenizer or Brightness()
    if kind == "script":
        torch.jit.script(tokenizer).save(str(path), _extra_files=extra or {})
        return path
    batch = {0: torch.export.Dim("n", min=1, max=4096)}
    program = torch.export.export(tokenizer, (torch.zeros(2, 3, side, side),), dynamic_shapes=(batch,))
    torch.export.save(program, path, extra_files=extra or {})
    return path


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_tokens_are_the_tokenizer_s_of_the_image_and_the_loss_is_cross_entropy(size):
    torch.manual_seed(0)
    model = models_mae.mae_vit_tiny_patch4(img_size=size)
    seen = []

    def tokenizer(imgs):
        seen.append(imgs)
        return Brightness()(imgs)

    model.set_target(targets.Tokens(8, tokenizer, size, 4))
    imgs = torch.randn(3, 3, *size)
    loss, pred, mask = model(imgs, 0.75)
    assert pred.shape == (3, model.patch_embed.num_patches, 8) and torch.equal(seen[0], imgs)
    ids = Brightness()(imgs)
    errors = [-pred[i, j].log_softmax(dim=0)[ids[i, j]] for i in range(3) for j in range(ids.shape[1]) if mask[i, j]]
    assert_close(loss, sum(errors) / len(errors))
    assert not any("token" in name for name in model.state_dict() if name not in ("cls_token", "mask_token"))
    assert math.isnan(mean_image_loss(model, imgs)), "ids have no mean"
    with pytest.raises(UserError, match="nothing to draw"):
        reconstruct(model, imgs)


def test_pictures_of_principal_components_are_their_nearest_patches():
    torch.manual_seed(0)
    model, imgs = models_mae.mae_vit_tiny_patch4(img_size=16), torch.rand(5, 3, 16, 16)
    model.set_target(targets.PCA(48, 6))
    model.decoder_target.prepare(model.patchify(imgs))
    model.forward_decoder = lambda latent, ids: model.target(model.patchify(imgs))  # predicts exactly
    pictures = reconstruct(model, imgs)
    patches = model.patchify(imgs).flatten(0, 1).numpy()
    reference = Reference(6, svd_solver="full").fit(patches)
    nearest = torch.from_numpy(reference.inverse_transform(reference.transform(patches))).view(5, 16, 48)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    assert_close(
        pictures.reconstructed, (model.unpatchify(nearest.float()) * std + mean).clamp(0, 1), rtol=1e-3, atol=1e-3
    )
    assert pictures.titles()[2] == "reconstructed\n(from 6 coefficients)" and pictures.titles()[0] == "original"
    level = mean_image_loss(model, imgs)
    coefficients = model.target(model.patchify(imgs))
    others = [(coefficients.sum(dim=0) - coefficients[i]) / 4 for i in range(5)]
    assert level == pytest.approx(torch.stack([(c - o) ** 2 for c, o in zip(coefficients, others)]).mean().item())  # noqa: B905


# --- mask tokens in the encoder, other decoders -------------------------------------------------------------------


def encoder_tokens_mae(**options):
    torch.manual_seed(0)
    return models_mae.mae_vit_tiny_patch4(img_size=16, encoder_mask_tokens=True, **options)


def test_an_encoder_with_mask_tokens_sees_all_places_and_learns_its_token():
    model, imgs = encoder_tokens_mae(), torch.randn(3, 3, 16, 16)
    assert model.mask_token.shape == (1, 1, 64) and "mask_token" in model.state_dict()
    latent, mask, ids_restore = model.forward_encoder(imgs, 0.75)
    assert latent.shape == (3, 17, 64)
    # by hand: each place its patch's embedding, or the token
    places = model.patch_embed(imgs)
    for i in range(3):
        for j in range(16):
            if mask[i, j]:
                places[i, j] = model.mask_token[0, 0]
    x = torch.cat([model.cls_token.expand(3, -1, -1), places], dim=1) + model.pos_embed
    for block in model.blocks:
        x = block(x)
    assert_close(latent, model.norm(x))
    y = model.decoder_embed(latent) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        y = block(y)
    assert_close(model.forward_decoder(latent, ids_restore), model.decoder_pred(model.decoder_norm(y))[:, 1:])
    model(imgs, 0.75)[0].backward()
    assert model.mask_token.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "options",
    [
        {"encoder_mask_tokens": True},
        {"decoder_depth": 3, "decoder_embed_dim": 96, "decoder_num_heads": 8},
        {"encoder_mask_tokens": True, "decoder_embed_dim": 32, "decoder_num_heads": 2, "decoder_depth": 2},
        {"target": 6},
    ],
)
def test_the_arithmetic_of_variants_is_what_torch_counts(options):
    components = options.pop("target", None)
    model = models_mae.mae_vit_tiny_patch4(**options)
    if components:
        model.set_target(targets.Tokens(components, Brightness(), (32, 32), 4))
    counted = counted_macs(lambda: model(torch.zeros(1, 3, 32, 32), 0.75))
    assert counted + 48 * 48 * 64 == sum(flops.pretrain_macs(model, 16))


def test_mask_tokens_cost_the_paper_s_arithmetic():
    model = models_mae.MODELS["mae_vit_large_patch16"]
    with torch.device("meta"):
        plain, tokens = model(), model(encoder_mask_tokens=True)
    ratio = sum(flops.pretrain_macs(tokens, 49)) / sum(flops.pretrain_macs(plain, 49))
    assert ratio == pytest.approx(3.3, abs=0.1)  # paper, table 1c


@pytest.mark.parametrize(("width", "heads"), [(64, 5), (100, 16), (62, 2)])
def test_heads_have_to_divide_the_decoder_s_width(width, heads):
    with pytest.raises(UserError, match="--decoder_heads"):
        models_mae.mae_vit_tiny_patch4(decoder_embed_dim=width, decoder_num_heads=heads)


# --- augmentations ------------------------------------------------------------------------------------------------


def boxes(augment, height, width, size=32, n=400):
    transform = pretrain_transform(size, 0.2, 0.5, augment)
    torch.manual_seed(0)
    drawn = [transform.draw(height, width) for _ in range(n)]
    return [box for box, _ in drawn], sum(mirror for _, mirror in drawn) / n


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 100), (256, 300), (33, 32)])
def test_the_fixed_crops_keep_their_size_and_only_one_moves(height, width):
    side = round(min(height, width) * 7 / 8)
    centre, mirrored = boxes("none", height, width)
    assert set(centre) == {((height - side) // 2, (width - side) // 2, side, side)} and mirrored == 0
    crops, mirrored = boxes("crop", height, width)
    assert {box[2:] for box in crops} == {(side, side)} and mirrored == pytest.approx(0.5, abs=0.1)
    tops, lefts = Counter(box[0] for box in crops), Counter(box[1] for box in crops)
    assert (min(tops), max(tops)) == (0, height - side) and min(lefts) == 0 and max(lefts) <= width - side
    assert max(tops.values()) < 400 / (height - side + 1) * 2.5


def test_a_rectangle_s_crop_has_its_shape():
    assert boxes("none", 100, 100, size=(16, 32))[0][0] == (28, 6, 44, 88)


def test_random_resized_crops_draw_as_ever_and_jitter_draws_the_same_crop():
    torch.manual_seed(0)
    shape = torch.empty(3, 50, 70, device="meta")
    expected = [(transforms.RandomResizedCrop.get_params(shape, (0.2, 1.0), (3 / 4, 4 / 3)), torch.rand(1).item() < 0.5)
                for _ in range(20)]  # fmt: skip
    for augment in ("rrc", "jitter"):
        torch.manual_seed(0)
        transform = pretrain_transform(32, 0.2, 0.5, augment)
        assert [transform.draw(50, 70) for _ in range(20)] == expected


def test_jitter_changes_colours_within_its_strength():
    pixels = torch.full((3, 40, 40), 100, dtype=torch.uint8)
    torch.manual_seed(0)
    jittered = [pretrain_transform(32, 0.2, 0.5, "jitter")(pixels)[0].float() for _ in range(200)]
    values = torch.stack([image.mean() for image in jittered])
    assert 59 <= values.min() < 70 and 130 < values.max() <= 141, "grey feels the brightness alone"
    assert torch.equal(pretrain_transform(32, 0.2, 0.5)(pixels)[0], torch.full((32, 32, 3), 100, dtype=torch.uint8))


# --- main_pretrain ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("images"))


def pretrain(images, out, *options, epochs=2):
    words = [
        *("--data_path", images, "--model", "mae_vit_tiny_patch4", "--input_size", 16, "--batch_size", 8),
        *("--epochs", epochs, "--warmup_epochs", 1, "--blr", 0.1, "--num_workers", 0, *ON_CPU),
        *("--output_dir", out, "--log_dir", "", *options),
    ]
    args = main_pretrain.get_args_parser().parse_args([str(word) for word in words])
    main_pretrain.main(args)
    return load(out / f"checkpoint-{epochs - 1}.pth"), (out / "train.log").read_text().splitlines()


@pytest.mark.parametrize(
    ("name", "options"), [("pixel", ()), ("norm", ("--norm_pix_loss",)), ("norm", ("--target", "norm"))]
)
def test_the_defaults_train_what_they_always_have(images, tmp_path, name, options):
    recorded = json.loads((ROOT / "tests" / "golden" / "pretrain_defaults.json").read_text())
    weights = pretrain(images, tmp_path, *options)[0]["model"]
    sums = {key: [weights[key].double().sum().item(), weights[key].double().abs().sum().item()] for key in weights}
    assert sums.keys() == recorded[name]["sums"].keys()
    for key, (total, magnitude) in recorded[name]["sums"].items():
        if key not in recorded[name]["thirds"]:
            assert sums[key] == pytest.approx([total, magnitude], rel=1e-5, abs=1e-5 * magnitude), key
    # the keys' biases, the middle third, have no gradient but rounding, which Adam makes steps of lr from
    for key, parts in recorded[name]["thirds"].items():
        for part, (total, magnitude) in zip(weights[key].double().chunk(3)[::2], parts, strict=True):
            found = [part.sum().item(), part.abs().sum().item()]
            assert found == pytest.approx([total, magnitude], rel=1e-5, abs=1e-5 * magnitude), key
    of_processor = [digest for known, digest in recorded[name]["sha256"].items() if _processor().startswith(known)]
    if torch.__version__ == recorded["torch"] and of_processor:
        everything = b"".join(key.encode() + weights[key].numpy().tobytes() for key in sorted(weights))
        assert [hashlib.sha256(everything).hexdigest()] == of_processor, "bit for bit"


def _processor() -> str:
    """Capability, name and model, which kernels are chosen by; the first alone where /proc does not tell the others."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = re.findall(r"^model(?: name)?\s*: (.*)$", info.split("\n\n")[0], re.MULTILINE)
    return " ".join([torch.backends.cpu.get_cpu_capability(), *reversed(named)])


VARIANTS = {
    "block": ("--mask", "block"),
    "grid": ("--mask", "grid"),
    "pca": ("--target", "pca", "--pca_components", 6),
    "decoder": ("--decoder_depth", 2, "--decoder_width", 96, "--decoder_heads", 8),
    "mask_tokens": ("--encoder_mask_tokens",),
    "augment": ("--augment", "crop"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_resumes_exactly_and_opens_as_what_it_is(name, images, tmp_path):
    whole, said = pretrain(images, tmp_path / "whole", *VARIANTS[name])
    assert all(torch.isfinite(value).all() for value in whole["model"].values())
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "checkpoint-0.pth").write_bytes((tmp_path / "whole" / "checkpoint-0.pth").read_bytes())
    again, said_again = pretrain(images, cut, *VARIANTS[name], "--resume", "auto")
    assert all(torch.equal(whole["model"][key], again["model"][key]) for key in whole["model"])
    model = open_model(tmp_path / "whole" / "checkpoint-1.pth")
    assert model.mask_noise is masks.MASKS.get(name, masks.random)
    assert model.encoder_mask_tokens == (name == "mask_tokens") and len(model.decoder_blocks) == 1 + (name == "decoder")
    if name == "decoder":
        assert model.decoder_blocks[0].attn.num_heads == 8 and model.mask_token.shape[2] == 96
    fitted = [any("components hold" in message for message in messages) for messages in (said, said_again)]
    assert fitted == [name == "pca", False], "fitted once, then kept in the checkpoint"
    imgs = torch.randn(2, 3, 16, 16)
    pictures = reconstruct(model, imgs, noise=strategy_noise(model, 2, 0.75, 0))
    assert torch.isfinite(pictures.reconstructed).all()


@pytest.mark.parametrize("kind", ["script", "export"])
@pytest.mark.parametrize("told", ["option", "file"])
def test_a_run_on_tokens_learns_them(kind, told, images, tmp_path):
    extra = {"vocab_size": "8"} if told == "file" and kind == "export" else None  # a script has it as an attribute
    path = write_tokenizer(tmp_path / "tokenizer", kind=kind, extra=extra)
    options = ("--target", "tokens", "--tokenizer", path, *(("--vocab_size", 8) if told == "option" else ()))
    state, messages = pretrain(images, tmp_path / "out", *options, epochs=8)
    assert state["model"]["decoder_pred.weight"].shape == (8, 64)
    lines = [json.loads(line)["train_loss"] for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
    assert lines[-1] < 0.9 * lines[0] < 0.9 * 3 and "compare the loss" not in " ".join(messages)
    model = open_model(tmp_path / "out" / "checkpoint-7.pth")
    with pytest.raises(UserError, match="tokenizer"):
        reconstruct(model, torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--norm_pix_loss", "--target", "pca"), "contradicts --target pca"),
        (("--norm_pix_loss", "--target", "pixel"), "contradicts --target pixel"),
        (("--norm_pix_loss", "--target", "tokens"), "contradicts --target tokens"),
        (("--target", "tokens"), "--tokenizer"),
        (("--tokenizer", "x"), "--tokenizer x is for --target tokens"),
        (("--target", "norm", "--vocab_size", 8), "--vocab_size 8 is for --target tokens"),
        (("--target", "norm", "--pca_components", 8), "--pca_components 8 is for --target pca"),
    ],
)
def test_options_that_contradict_one_another_are_refused_before_any_work(options, word, tmp_path):
    with pytest.raises(UserError, match=word):
        pretrain(tmp_path / "there is no such folder", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--mask", "grid", "--mask_ratio", 0.5), "--mask_ratio 0.75"),
        (("--mask", "grid", "--input_size", 12, 16), "even number of patches"),
        (("--decoder_width", 60), "--decoder_width"),  # the tiny model's 4 heads divide it, 16 of others don't
        (("--decoder_heads", 7), "--decoder_heads"),
        (("--target", "tokens", "--tokenizer", "missing.pt"), "no such file"),
        (("--init", "missing.pth"), "missing.pth"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_the_first_step(options, word, images, tmp_path):
    if options == ("--decoder_width", 60):
        options, word = ("--decoder_width", 60, "--decoder_heads", 16), "--decoder_width"
    with pytest.raises(UserError, match=word):
        pretrain(images, tmp_path / "out", *options)
    assert not list((tmp_path / "out").glob("*.pth"))


class Faulty(Brightness):
    """Brightness, with one fault."""

    def __init__(self, fault: str):
        super().__init__()
        self.fault = fault

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        ids = super().forward(imgs)
        if self.fault == "shape":
            return ids[:, :3]
        if self.fault == "kind":
            return ids.float()
        if self.fault == "range":
            return ids + 8
        return ids.view(8, -1)


@pytest.mark.parametrize(
    ("fault", "word"), [("shape", "16 patches"), ("kind", "float32"), ("range", "--vocab_size"), ("batch", "24 images")]
)
def test_a_tokenizer_that_does_not_fit_is_refused_before_the_first_step(fault, word, images, tmp_path):
    class Fault(torch.nn.Module):  # a trace: no script of a subclass that calls super
        def forward(self, imgs):
            return Faulty(fault)(imgs)

    torch.jit.trace(Fault(), torch.zeros(8, 3, 16, 16), check_trace=False).save(str(tmp_path / "t.pt"))
    options = ("--target", "tokens", "--tokenizer", tmp_path / "t.pt", "--vocab_size", 8)
    with pytest.raises(UserError, match=word):
        pretrain(images, tmp_path / "out", *options)


def test_a_file_that_is_no_program_or_tells_no_vocabulary_is_named(tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="no TorchScript"):
        targets.load_tokenizer(str(tmp_path / "text"), CPU)
    torch.jit.trace(torch.nn.Identity(), torch.zeros(1)).save(str(tmp_path / "silent.pt"))
    with pytest.raises(UserError, match="give --vocab_size"):
        targets.load_tokenizer(str(tmp_path / "silent.pt"), CPU)


# --- starts from weights ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    return pretrain(images, tmp_path_factory.mktemp("trained"), epochs=1)[0]["model"]


@pytest.mark.parametrize("with_decoder", [True, False])
@pytest.mark.parametrize("size", [16, (16, 24)])
def test_init_starts_from_the_file_s_weights(with_decoder, size, trained, images, tmp_path):
    given = {key: value for key, value in trained.items() if with_decoder or not key.startswith(("decoder_", "mask_"))}
    torch.save({"model": given}, tmp_path / "init.pth")
    sides = size if isinstance(size, tuple) else (size,)
    options = ("--init", tmp_path / "init.pth", "--lr", 0, "--weight_decay", 0, "--input_size", *sides)
    state, messages = pretrain(images, tmp_path / "out", *options, epochs=1)
    fresh, _ = pretrain(images, tmp_path / "fresh", "--lr", 0, "--weight_decay", 0, "--input_size", *sides, epochs=1)
    for key, value in state["model"].items():
        expected = given.get(key, fresh["model"][key])
        assert torch.equal(value, fresh["model"][key] if "pos_embed" in key else expected), key
    assert any("the decoder is new" in message for message in messages) == (not with_decoder)


def test_init_is_not_read_by_a_run_that_goes_on_and_names_what_does_not_fit(trained, images, tmp_path):
    torch.save({"model": trained}, tmp_path / "init.pth")
    whole, _ = pretrain(images, tmp_path / "out", "--init", tmp_path / "init.pth", epochs=1)
    (tmp_path / "init.pth").unlink()
    again, messages = pretrain(images, tmp_path / "out", "--init", tmp_path / "init.pth", "--resume", "auto", epochs=2)
    assert again["epoch"] == 1 and any("goes on at epoch 1" in message for message in messages)
    torch.save({"model": trained}, tmp_path / "init.pth")
    with pytest.raises(UserError, match=r"here \(32"):
        pretrain(images, tmp_path / "other", "--init", tmp_path / "init.pth", "--decoder_width", 32)


def test_init_of_an_encoder_starts_other_variants_too(trained, images, tmp_path):
    encoder = {key: value for key, value in trained.items() if not key.startswith(("decoder_", "mask_"))}
    torch.save({"model": encoder}, tmp_path / "init.pth")
    options = ("--encoder_mask_tokens", "--decoder_width", 32, "--target", "pca")
    state, messages = pretrain(images, tmp_path / "out", "--init", tmp_path / "init.pth", *options, epochs=1)
    assert state["model"]["decoder_target.components"].any() and state["model"]["decoder_embed.weight"].shape[0] == 32


@pytest.mark.slow
def test_two_processes_have_the_same_components(images, tmp_path):
    torchrun(
        "main_pretrain.py", "--data_path", images, "--model", "mae_vit_tiny_patch4", "--input_size", 16,
        "--batch_size", 4, "--epochs", 1, "--num_workers", 0, *ON_CPU, "--target", "pca", "--pca_components", 6,
        "--encoder_mask_tokens", "--mask", "block", "--output_dir", tmp_path, "--log_dir", "",
    )  # fmt: skip
    components = load(tmp_path / "checkpoint-0.pth")["model"]["decoder_target.components"]
    assert_close(components @ components.T, torch.eye(6), rtol=1e-4, atol=1e-5)
