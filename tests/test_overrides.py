"""Changing the method: overrides in the original's signatures, edits in place, masks and targets.

Whatever is changed, training must train exactly that: the loss and the step are compared with `naive_loss`, which loops
over images and patches and calls none of the model's methods.
"""

import copy
import importlib.util
import itertools
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers import ON_CPU, write_image_folder
from torch import nn
from torch.testing import assert_close

import main_pretrain
import models_mae
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util import masks, targets
from util.errors import UserError
from util.step import Step

SMALL = dict(embed_dim=24, depth=2, num_heads=3, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=4)
small_mae = partial(MaskedAutoencoderViT, img_size=(16, 24), patch_size=4, **SMALL)  # 4 x 6 patches
N, L, RATIO, K = 3, 24, 0.75, 6


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    """Every parameter off its initial value, so that no norm or bias is a no-op."""
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def images(n: int = N) -> torch.Tensor:
    return torch.randn(n, 3, 16, 24)


def by_noise(n: int) -> list[list[int]]:
    """What the default masking keeps: drawn as it has always been, torch.rand of [N, L]."""
    return [sorted(range(L), key=row.__getitem__)[:K] for row in torch.rand(n, L).tolist()]


def naive_loss(
    model: MaskedAutoencoderViT, imgs: torch.Tensor, keep=by_noise, position=1.0, latent=1.0, pred=0.0, target=None,
    error=torch.square, scale=1.0,
) -> torch.Tensor:  # fmt: skip
    """The loss, one image at a time. What may be changed: which patches are kept, the factor of the positions that are
    added to them, a factor of the latents, what is added to the prediction, the target of a patch, the error, a factor.
    """
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    errors = []
    for image, kept in zip(imgs, keep(len(imgs)), strict=True):
        cells = [image[:, r : r + 4, c : c + 4] for r in range(0, 16, 4) for c in range(0, 24, 4)]
        tokens = [model.cls_token[0, 0] + model.pos_embed[0, 0]]
        tokens += [(weight * cells[i]).sum(dim=(1, 2, 3)) + bias + position * model.pos_embed[0, 1 + i] for i in kept]
        x = torch.stack(tokens)[None]
        for block in model.blocks:
            x = block(x)
        cls_token, *known = model.decoder_embed(latent * model.norm(x))[0]
        known = dict(zip(kept, known, strict=True))
        tokens = [cls_token, *(known.get(i, model.mask_token[0, 0]) for i in range(L))]
        x = torch.stack(tokens)[None] + model.decoder_pos_embed
        for block in model.decoder_blocks:
            x = block(x)
        predicted = model.decoder_pred(model.decoder_norm(x))[0, 1:] + pred
        for i in set(range(L)) - set(kept):
            pixels = cells[i].permute(1, 2, 0).flatten()
            errors.append(error(predicted[i] - (target(pixels) if target else pixels)).mean())
    return scale * sum(errors) / len(errors)


def assert_trains(model: nn.Module, **changes) -> None:
    """One step of the engine trains `naive_loss` with these changes: its value, and where it moves each weight."""
    imgs, expected = images(), copy.deepcopy(model)
    torch.manual_seed(5)
    loss = naive_loss(expected, imgs, **changes)
    loss.backward()
    step = Step(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.device("cpu"))
    torch.manual_seed(5)
    assert_close(step(lambda: model(imgs, RATIO)[0], True), loss.detach(), rtol=1e-5, atol=1e-6)
    moved = 0
    for (name, after), before in zip(model.named_parameters(), expected.parameters(), strict=True):
        gradient = torch.zeros_like(before) if before.grad is None else before.grad
        assert_close(after.data, before.data - 0.1 * gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        moved += not torch.equal(after, before)
    assert moved > 40


# --- overrides in the original's signatures -----------------------------------------------------------------------


def every_fourth(n: int) -> list[list[int]]:
    """In image order, another set for each image: no order of noise."""
    return [list(range(i % 4, L, 4)) for i in range(n)]


class Methods:
    """Overrides as subclasses of the original write them, each with an effect of its own."""

    def random_masking(self, x, mask_ratio):
        n, length, width = x.shape
        ids_keep = torch.tensor(every_fourth(n))
        rest = [[i for i in range(length) if i not in row] for row in ids_keep.tolist()]
        ids_restore = torch.argsort(torch.cat([ids_keep, torch.tensor(rest)], dim=1), dim=1)
        x_masked = torch.gather(x, dim=1, index=ids_keep.unsqueeze(-1).repeat(1, 1, width))
        mask = torch.ones([n, length])
        mask[:, : ids_keep.shape[1]] = 0
        return x_masked, torch.gather(mask, dim=1, index=ids_restore), ids_restore

    def forward_encoder(self, imgs, mask_ratio):
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:, :]
        x, mask, ids_restore = self.random_masking(x, mask_ratio)
        cls_token = self.cls_token + self.pos_embed[:, :1, :]
        x = torch.cat((cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x)
        return 1.5 * self.norm(x), mask, ids_restore

    def forward_decoder(self, latent, ids_restore):
        x = self.decoder_embed(latent)
        n, kept, width = x.shape
        filled = torch.cat([x[:, 1:], self.mask_token.repeat(n, ids_restore.shape[1] + 1 - kept, 1)], dim=1)
        filled = torch.gather(filled, dim=1, index=ids_restore.unsqueeze(-1).repeat(1, 1, width))
        x = torch.cat([x[:, :1], filled], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:, :] + 0.25

    def forward_loss(self, imgs, pred, mask):
        loss = (pred - self.patchify(imgs)).abs().mean(dim=-1)
        return (loss * mask).sum() / mask.sum()

    def forward(self, imgs, mask_ratio=0.75):
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio)
        pred = self.forward_decoder(latent, ids_restore)
        return 3 * self.forward_loss(imgs, pred, mask), pred, mask


EFFECTS = {
    "random_masking": {"keep": every_fourth},
    "forward_encoder": {"latent": 1.5},
    "forward_decoder": {"pred": 0.25},
    "forward_loss": {"error": torch.abs},
    "forward": {"scale": 3.0},
}
SUBSETS = [names for n in range(6) for names in itertools.combinations(EFFECTS, n)]


def overriding(*names: str) -> type[MaskedAutoencoderViT]:
    return type("Mine", (MaskedAutoencoderViT,), {name: vars(Methods)[name] for name in names})


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_overrides_in_the_original_s_signatures_train_what_they_say(names):
    torch.manual_seed(0)
    model = shaken(overriding(*names)(img_size=(16, 24), patch_size=4, **SMALL))
    changes = {}
    for name in names:
        changes |= EFFECTS[name]
    assert_trains(model, **changes)


def test_overrides_that_extend_what_they_override_train_too():
    class Mine(MaskedAutoencoderViT):
        def random_masking(self, x, mask_ratio):
            assert mask_ratio == "easy"
            return super().random_masking(x, RATIO)

        def forward_encoder(self, imgs, mask_ratio):
            latent, mask, ids_restore = super().forward_encoder(imgs, "easy")
            return 1.5 * latent, mask, ids_restore

        def forward_decoder(self, latent, ids_restore):
            return super().forward_decoder(latent, ids_restore) + 0.25

        def forward_loss(self, imgs, pred, mask):
            return 3 * super().forward_loss(imgs, pred, mask)

        def forward(self, imgs, mask_ratio=0.5):
            return super().forward(imgs, mask_ratio)

    torch.manual_seed(0)
    model = shaken(Mine(img_size=(16, 24), patch_size=4, **SMALL))
    assert_trains(model, latent=1.5, pred=0.25, scale=3.0)


@pytest.mark.parametrize("names", [("forward",), tuple(EFFECTS)], ids="+".join)
def test_main_pretrain_trains_an_override(names, tmp_path, monkeypatch):
    lines, calls = train(tmp_path, monkeypatch, overriding(*names))
    for (model, imgs, ratio), (loss, _, mask) in calls:
        with torch.no_grad():
            keep = every_fourth if "random_masking" in names else lambda n: kept_of(mask)  # noqa: B023
            changes = {"keep": keep} | {key: value for name in names for key, value in EFFECTS[name].items()}
            assert_close(naive_loss(model, imgs, **changes), loss, rtol=1e-5, atol=1e-6)
        assert ratio == RATIO
    assert lines[-1]["train_loss"] == pytest.approx(sum(loss.item() for _, (loss, *_) in calls) / len(calls), rel=1e-5)


def kept_of(mask: torch.Tensor) -> list[list[int]]:
    return [(row == 0).nonzero()[:, 0].tolist() for row in mask]


def train(folder, monkeypatch, cls) -> tuple[list[dict], list]:
    """main_pretrain.py with a model of this class, one epoch of 2 batches -> (lines of log.txt, calls of the model: its
    arguments and outputs, with the model as it was).
    """
    calls = []

    def build(**options) -> nn.Module:
        model = cls(patch_size=4, **SMALL, **options)
        before = lambda module, args: calls.append([(copy.deepcopy(module), *args)])  # noqa: E731
        model.register_forward_pre_hook(before)
        model.register_forward_hook(lambda module, args, output: calls[-1].append(output))
        return model

    monkeypatch.setitem(main_pretrain.models_mae.MODELS, "mae_vit_tiny_patch4", build)
    data = write_image_folder(folder / "data", n_train=2, n_val=1)
    options = [
        *("--model", "mae_vit_tiny_patch4", "--input_size", 16, 24, "--batch_size", 3, "--epochs", 1),
        *("--warmup_epochs", 0, "--num_workers", 0, "--picture_every", 0, "--data_path", data, *ON_CPU),
        *("--output_dir", folder / "out", "--log_dir", ""),
    ]
    args = main_pretrain.get_args_parser().parse_args([str(option) for option in options])
    main_pretrain.main(args)
    lines = [json.loads(line) for line in (folder / "out" / "log.txt").read_text().splitlines()]
    return lines, calls[:2]


# --- edits in place -----------------------------------------------------------------------------------------------


def edited(folder, before: str, after: str) -> type[MaskedAutoencoderViT]:
    """The class of a copy of models_mae.py in which one piece of text is another."""
    text = open(models_mae.__file__).read()
    assert text.count(before) == 1, f"{text.count(before)} times in models_mae.py: {before}"
    (folder / "edited_mae.py").write_text(text.replace(before, after))
    spec = importlib.util.spec_from_file_location("edited_mae", folder / "edited_mae.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MaskedAutoencoderViT


def by_most_noise(n: int) -> list[list[int]]:
    return [sorted(range(L), key=row.__getitem__)[-K:] for row in torch.rand(n, L).tolist()]


EDITS = {
    "random_masking": ("ids_shuffle = noise.argsort(dim=1)", "ids_shuffle = (-noise).argsort(dim=1)"),
    "forward_encoder": ("_encode_tokens(tokens + _take", "_encode_tokens(tokens - _take"),
    "_encode_tokens": ("return self.norm(self._run(", "return 2 * self.norm(self._run("),
    "forward_decoder": ("return self.decoder_pred(", "return 0.5 + self.decoder_pred("),
    "forward_loss": (".square().mean(dim=-1)", ".abs().mean(dim=-1)"),
    "patchify": ("return self._cut(imgs)", "return self._cut(imgs).flip(-1)"),
    "target": ("else self.decoder_target(patches)", "else patches.sin()"),
    "forward": ("loss = self.forward_loss(imgs, pred, mask)", "loss = 0.1 * self.forward_loss(imgs, pred, mask)"),
}
EDIT_EFFECTS = {
    "random_masking": {"keep": by_most_noise},
    "forward_encoder": {"position": -1.0},
    "_encode_tokens": {"latent": 2.0},
    "forward_decoder": {"pred": 0.5},
    "forward_loss": {"error": torch.abs},
    "patchify": {"target": lambda pixels: pixels.flip(0)},
    "target": {"target": torch.sin},
    "forward": {"scale": 0.1},
}


@pytest.mark.parametrize("name", EDITS)
def test_what_is_edited_in_place_is_what_trains(name, tmp_path):
    torch.manual_seed(0)
    model = shaken(edited(tmp_path, *EDITS[name])(img_size=(16, 24), patch_size=4, **SMALL))
    assert_trains(model, **EDIT_EFFECTS[name])


@pytest.mark.parametrize("name", ["forward_loss", "target", "forward_decoder"])
def test_main_pretrain_trains_what_is_edited_in_place(name, tmp_path, monkeypatch):
    lines, calls = train(tmp_path, monkeypatch, edited(tmp_path, *EDITS[name]))
    losses = []
    for (model, imgs, _), (loss, _, mask) in calls:
        losses.append(naive_loss(model, imgs, keep=lambda n: kept_of(mask), **EDIT_EFFECTS[name]).item())  # noqa: B023
        assert loss.item() == pytest.approx(losses[-1], rel=1e-5)
    assert lines[-1]["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


# --- what else descendants override, replace and call -------------------------------------------------------------


@pytest.mark.parametrize("ratio", [RATIO, None, (0.5, 0.9), 0, 1, 1.5, -1, math.nan, "block"])
@pytest.mark.parametrize("keeps_all", [False, True])
def test_an_override_may_read_the_ratio_in_its_own_way(ratio, keeps_all):
    class Mine(overriding("random_masking")):
        if keeps_all:  # as an encoder with mask tokens does

            def forward_encoder(self, imgs, mask_ratio):
                _, mask, ids_restore = self.random_masking(self.patchify(imgs), mask_ratio)
                return self._encode_tokens(self.patch_embed(imgs)), mask, ids_restore

            def forward_decoder(self, latent, ids_restore):
                return super().forward_decoder(latent, torch.arange(L).expand(len(latent), -1))

    loss, _, mask = Mine(img_size=(16, 24), patch_size=4, **SMALL)(images(), ratio)
    assert loss.isfinite() and (mask.sum(dim=1) == L - K).all()


def test_a_loss_over_all_patches_may_remove_none():
    class Mine(MaskedAutoencoderViT):
        def forward_loss(self, imgs, pred, mask):
            return (pred - self.patchify(imgs)).square().mean()

    loss, _, mask = Mine(img_size=(16, 24), patch_size=4, **SMALL)(images(), 0)
    assert loss.isfinite() and not mask.any()


def test_an_override_of_patchify_changes_the_target_and_not_the_encoder():
    class ChannelsFirst(MaskedAutoencoderViT):
        def patchify(self, imgs):
            cells = imgs.unfold(2, 4, 4).unfold(3, 4, 4)  # [N, 3, h, w, 4, 4]
            return cells.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    torch.manual_seed(0)
    model = shaken(ChannelsFirst(img_size=(16, 24), patch_size=4, **SMALL))
    assert_trains(model, target=lambda pixels: pixels.view(4, 4, 3).permute(2, 0, 1).flatten())


def test_initial_weights_may_be_overridden_as_in_the_original():
    seen = []

    class Mine(MaskedAutoencoderViT):
        def _init_weights(self, m):
            seen.append(m)
            if isinstance(m, nn.Linear):
                nn.init.constant_(m.weight, 0.5)

    model = small_mae()
    mine = Mine(img_size=(16, 24), patch_size=4, **SMALL)
    assert {type(m) for m in seen} == {type(m) for m in mine.modules()}
    assert all((m.weight == 0.5).all() for m in mine.modules() if isinstance(m, nn.Linear))
    assert torch.equal(mine.pos_embed, model.pos_embed)

    class Untouched(MaskedAutoencoderViT):
        def initialize_weights(self):
            self.apply(self._init_weights)

    assert not Untouched(img_size=(16, 24), patch_size=4, **SMALL).pos_embed.any()


@pytest.mark.parametrize(("length", "width"), [(L, 48), (L, 1), (10, 7), (196, 3)])
def test_random_masking_takes_tokens_of_any_number_and_width(length, width):
    torch.manual_seed(0)
    model, x = small_mae(), torch.randn(4, length, width)
    torch.manual_seed(1)
    kept, mask, ids_restore = model.random_masking(x, 0.6)
    torch.manual_seed(1)
    noise, k = torch.rand(4, length), math.floor(length * 0.4)
    for n in range(4):
        order = sorted(range(length), key=noise[n].tolist().__getitem__)
        assert torch.equal(kept[n], x[n, order[:k]])
        assert mask[n].tolist() == [float(order.index(i) >= k) for i in range(length)]
        assert ids_restore[n].tolist() == [order.index(i) for i in range(length)]


class OwnEmbedding(nn.Module):
    """As of other modalities: it knows how many tokens it makes, and nothing of a grid."""

    num_patches = 10

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 24)

    def forward(self, x):
        return self.layer(x)


def test_a_subclass_with_an_embedding_of_its_own_masks_its_tokens():
    class Mine(overriding("forward_encoder")):
        def __init__(self):
            super().__init__(img_size=(16, 24), patch_size=4, **SMALL)
            self.patch_embed = OwnEmbedding()
            self.pos_embed = nn.Parameter(torch.zeros(1, 11, 24), requires_grad=False)
            self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 11, 16), requires_grad=False)
            self.decoder_pred = nn.Linear(16, 5)

        def patchify(self, x):
            return x

    loss, pred, mask = Mine()(torch.randn(2, 10, 5), 0.5)
    loss.backward()
    assert pred.shape == (2, 10, 5) and mask.sum(dim=1).tolist() == [5, 5]


def test_a_norm_behind_the_embedding_is_part_of_it_with_a_mask_as_without():
    model = small_mae()
    model.patch_embed.norm = nn.LayerNorm(24, elementwise_affine=False)
    imgs = images()
    latent, _, ids_restore = model.forward_encoder(imgs, 0.0)
    in_order = latent[:, 1:].gather(1, ids_restore[:, :, None].expand(-1, -1, 24))
    torch.testing.assert_close(in_order, model.encode(imgs)[1].flatten(2).transpose(1, 2))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_of_other_channels_are_refused(channels):
    with pytest.raises(UserError, match=f"images of {channels} channels, but the model has in_chans 3"):
        small_mae()(torch.randn(2, channels, 16, 24))


# --- masks and targets --------------------------------------------------------------------------------------------


def test_mask_noise_decides_what_is_kept():
    calls = []

    def left_first(n, grid, mask_ratio, device):
        calls.append((n, grid, mask_ratio, device))
        return (torch.arange(grid[0] * grid[1]) % grid[1]).float().expand(n, -1)

    model = small_mae()
    model.mask_noise = left_first
    mask = model(images(), 2 / 3)[2]
    assert calls == [(N, (4, 6), 2 / 3, torch.device("cpu"))]
    assert mask.view(N, 4, 6).tolist() == [[[0, 0, 1, 1, 1, 1]] * 4] * N
    noise = torch.rand(N, L)
    assert torch.equal(model(images(), 0.5, noise)[2].argmin(dim=1), noise.argsort(dim=1)[:, :12].amin(dim=1))
    assert len(calls) == 1  # not asked where the caller says


@pytest.mark.parametrize("name", masks.MASKS)
@pytest.mark.parametrize("grid", [(4, 6), (2, 8), (14, 14)])
def test_every_mask_strategy_gives_noise_for_the_grid(name, grid):
    noise = masks.MASKS[name](3, grid, 0.75, torch.device("cpu"))
    assert noise.shape == (3, grid[0] * grid[1]) and ((noise >= 0) & (noise < 1)).all()


def test_the_default_draws_as_ever():
    torch.manual_seed(3)
    expected = torch.rand(5, L)
    torch.manual_seed(3)
    assert torch.equal(masks.random(5, (4, 6), 0.75, torch.device("cpu")), expected)
    assert small_mae().mask_noise is masks.random and masks.MASKS["random"] is masks.random


def test_the_target_may_be_toggled_after_construction():
    torch.manual_seed(0)
    model, patches = small_mae(), torch.randn(2, 5, 48, dtype=torch.float64) * 3 + 1
    patches[0, 0] = 7.0  # of one colour
    assert model.target(patches) is patches
    model.norm_pix_loss = True
    array = patches.numpy()
    mean, var = array.mean(-1, keepdims=True), array.var(-1, ddof=1, keepdims=True)
    np.testing.assert_allclose(model.target(patches).numpy(), (array - mean) / np.sqrt(var + 1e-6), rtol=1e-12)
    assert_trains(shaken(model), target=lambda pixels: (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt())
    assert {"pixel": targets.pixel, "norm": targets.norm}.items() <= targets.TARGETS.items()


# --- the classifier -----------------------------------------------------------------------------------------------


def small_vit(cls=VisionTransformer, **options) -> VisionTransformer:
    small = dict(img_size=(16, 24), patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    return shaken(cls(**(small | options)))


class AsTheOriginal(VisionTransformer):
    """`forward_features` as subclasses of the original write it."""

    def forward_features(self, x):
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), self.patch_embed(x)), dim=1)
        x = self.pos_drop(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        if self.global_pool:
            return self.fc_norm(x[:, 1:, :].mean(dim=1))
        return self.norm(x)[:, 0]


@pytest.mark.parametrize("global_pool", [True, False, 1, 0, np.True_])
def test_pooling_is_a_bool_that_subclasses_and_timm_s_methods_understand(global_pool):
    torch.manual_seed(0)
    ours, mine = small_vit(global_pool=global_pool), small_vit(AsTheOriginal, global_pool=global_pool)
    assert ours.global_pool is bool(global_pool)
    mine.load_state_dict(ours.state_dict())
    imgs = images()
    features, logits = ours.forward_features(imgs), ours(imgs)
    assert_close(mine(imgs), logits)
    tokens, _ = ours.forward_intermediates(imgs)
    assert tokens.shape == (N, 1 + L, 24)
    pooled = tokens[:, 1:].mean(dim=1) if global_pool else tokens[:, 0]
    assert_close(ours.pool(tokens), pooled)
    assert_close(ours.pool(tokens, "max"), tokens[:, 1:].amax(dim=1))
    assert_close(ours.forward_head(tokens, pre_logits=True), features)
    assert_close(ours.forward_head(tokens), logits)


@pytest.mark.parametrize("global_pool", [True, False])
def test_a_head_is_replaced_and_pooling_is_not(global_pool):
    torch.manual_seed(0)
    model, imgs = small_vit(global_pool=global_pool), images()
    features = model.forward_features(imgs)
    for same in (None, global_pool, "avg" if global_pool else "token"):
        model.reset_classifier(7, same)
        assert model(imgs).shape == (N, 7) and model.num_classes == 7 and model.global_pool is global_pool
        assert torch.equal(model.forward_features(imgs), features)
    for other in (not global_pool, "token" if global_pool else "avg", "map", "max"):
        with pytest.raises(UserError, match=f"global_pool {other!r} is not how this model was built"):
            model.reset_classifier(7, other)
    assert model.prune_intermediate_layers([0]) == [0] and len(model.blocks) == 1
    assert isinstance(model.head, nn.Identity) and model.global_pool is global_pool


@pytest.mark.parametrize("word", ["avg", "token", "max", "", None, 2])
def test_timm_s_words_for_pooling_are_refused(word):
    with pytest.raises(UserError, match="use True .patch tokens. or False"):
        small_vit(global_pool=word)


@pytest.mark.parametrize("global_pool", [True, False])
def test_a_classifier_s_features_have_passed_its_final_norm(global_pool):
    torch.manual_seed(0)
    model, imgs = small_vit(global_pool=global_pool), images()
    class_token, patch_map = model.encode(imgs)
    assert class_token.shape == (N, 24) and patch_map.shape == (N, 24, 4, 6)
    x = torch.cat([model.cls_token.expand(N, -1, -1), model.patch_embed(imgs)], dim=1) + model.pos_embed
    for block in model.blocks:
        x = block(x)
    norm = model.fc_norm if global_pool else model.norm
    assert isinstance(norm, nn.LayerNorm)
    assert_close(class_token, norm(x[:, 0]))
    for row, column in itertools.product(range(4), range(6)):
        assert_close(patch_map[:, :, row, column], norm(x[:, 1 + 6 * row + column]))
    if not global_pool:
        assert_close(class_token, model.forward_features(imgs))


@pytest.mark.parametrize("global_pool", [True, False])
def test_a_classifier_from_scratch_starts_with_tokens_and_positions_of_std_0_02(global_pool):
    torch.manual_seed(0)
    model = VisionTransformer(32, 4, embed_dim=4096, depth=0, num_heads=4, num_classes=2, global_pool=global_pool)
    for parameter in (model.cls_token, model.pos_embed):
        error = 6 * 0.02 / math.sqrt(parameter.numel())  # six standard errors of a mean; a deviation has fewer
        assert abs(parameter.mean().item()) < error and abs(parameter.std().item() - 0.02) < error
    model.cls_token.data.zero_()
    model.init_weights()  # as after building without memory, on the meta device
    assert abs(model.cls_token.std().item() - 0.02) < 0.002
