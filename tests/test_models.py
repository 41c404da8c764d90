"""The two networks: recorded numbers of the original, other implementations, and properties that must always hold."""

import math
from collections import Counter
from fractions import Fraction
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

import models_mae
import models_vit
from models_mae import MaskedAutoencoderViT, check_mask_ratio, kept_patches
from models_vit import VisionTransformer
from util.errors import UserError
from util.weights.checkpoint import is_decoder

MAE_FILES = ["mae_pixel", "mae_norm_pixel"]
VIT_FILES = ["vit_global_pool", "vit_cls_token"]
SIZES = ["base_patch16", "large_patch16"]
LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)
# the original and we run different kernels (its attention is not fused), which differ in the last bits
close = partial(assert_close, rtol=1e-5, atol=1e-5)
# gradients are mostly far below 1, so an absolute tolerance of 1e-5 would let wrong ones through
close_gradient = partial(assert_close, rtol=1e-5, atol=1e-6)


def mae(img_size=32, patch_size=8, **options) -> MaskedAutoencoderViT:
    """A small one, 4 x 4 patches unless told."""
    small = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    small |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 4, "norm_layer": LAYER_NORM}
    return MaskedAutoencoderViT(img_size=img_size, patch_size=patch_size, **(small | options))


def no_norm(width: int, **device_and_dtype) -> nn.Module:
    return nn.Identity()


def mae_without_blocks(**options) -> MaskedAutoencoderViT:
    """Its latent is what the encoder's blocks would see: the class token, then the kept tokens."""
    return mae(depth=0, norm_layer=no_norm, **options)


def vit(img_size=32, patch_size=8, **options) -> VisionTransformer:
    small = {"embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 7}
    return VisionTransformer(img_size=img_size, patch_size=patch_size, **(small | options))


def from_config(cls: type[nn.Module], config: dict) -> nn.Module:
    """A model as a recorded file describes it."""
    options = {key: value for key, value in config.items() if key not in ("layer_norm_eps", "mask_ratio")}
    return cls(**options, norm_layer=partial(nn.LayerNorm, eps=config["layer_norm_eps"]))


def on_meta(build, **options) -> nn.Module:
    """Full size, shapes alone: no memory, no time."""
    with torch.device("meta"):
        return build(**options)


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Move every parameter off its initial value, so that no norm or bias is a no-op."""
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))


def patch_pixels(height: int, width: int, patch: int, index: int) -> tuple[slice, slice]:
    """Rows and columns of patch `index`, counted row by row."""
    row, column = divmod(index, width // patch)
    assert row < height // patch
    return slice(row * patch, (row + 1) * patch), slice(column * patch, (column + 1) * patch)


def change_patches(imgs: torch.Tensor, patch: int, which: torch.Tensor) -> torch.Tensor:
    """`which` [N, L], nonzero where the patch's pixels are to be replaced."""
    changed = imgs.clone()
    height, width = imgs.shape[2:]
    for n, index in which.nonzero().tolist():
        rows, columns = patch_pixels(height, width, patch, index)
        changed[n, :, rows, columns] = 10 * torch.randn_like(changed[n, :, rows, columns])
    return changed


# --- numbers recorded from the original -------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAE_FILES)
def test_mae_gives_the_recorded_forward_pass(golden, name):
    data = golden(name)
    model = from_config(MaskedAutoencoderViT, data.config)
    model.load_state_dict(data.group("state"), strict=True)
    ratio = data.config["mask_ratio"]
    latent, mask, ids_restore = model.forward_encoder(data["imgs"], ratio, noise=data["noise"])
    close(latent, data["latent"])
    assert torch.equal(mask, data["mask"])
    assert torch.equal(ids_restore, data["ids_restore"])
    close(model.forward_decoder(latent, ids_restore), data["pred"])
    close(model.forward_loss(data["imgs"], data["pred"], data["mask"]), data["loss"])
    assert torch.equal(model.patchify(data["imgs"]), data["patchified"])
    assert torch.equal(model.unpatchify(data["patchified"]), data["imgs"])
    loss, pred, mask = model(data["imgs"], mask_ratio=ratio, noise=data["noise"])
    close(loss, data["loss"])
    close(pred, data["pred"])
    assert torch.equal(mask, data["mask"])


@pytest.mark.parametrize("name", MAE_FILES)
def test_mae_gives_the_recorded_gradients(golden, name):
    data = golden(name)
    model = from_config(MaskedAutoencoderViT, data.config)
    model.load_state_dict(data.group("state"))
    model(data["imgs"], data.config["mask_ratio"], data["noise"])[0].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not {"pos_embed", "decoder_pos_embed"} & gradients.keys()  # fixed tables
    close_gradient(gradients, data.group("grad"))


def test_loss_is_float32_under_autocast():
    torch.manual_seed(0)
    model = mae()
    imgs, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    expected = model(imgs, 0.75, noise)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(imgs, 0.75, noise)[0]
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=1e-2, atol=0)  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("build", [mae, vit])
def test_gradient_checkpointing_changes_memory_not_numbers(build):
    torch.manual_seed(0)
    model = build()
    imgs = torch.randn(2, 3, 32, 32)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        (model(imgs)[0] if build is mae else model(imgs).square().mean()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    calls = Counter()
    for name, block in model.named_modules():
        if name.split(".")[-1].isdecimal() and "blocks" in name:
            block.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    model.set_grad_checkpointing()
    close_gradient(gradients(), plain)
    assert len(calls) == 3 and set(calls.values()) == {2}  # each block ran again in backward


@pytest.mark.parametrize("name", VIT_FILES)
def test_classifier_gives_the_recorded_forward_pass_and_gradients(golden, name):
    data = golden(name)
    model = from_config(VisionTransformer, data.config)
    model.load_state_dict(data.group("state"), strict=True)
    close(model.forward_features(data["imgs"]), data["features"])
    logits = model(data["imgs"])
    close(logits, data["logits"])
    loss = nn.functional.cross_entropy(logits, data["target"])
    close(loss, data["loss"])
    loss.backward()
    close_gradient({name: p.grad for name, p in model.named_parameters()}, data.group("grad"))


@pytest.mark.parametrize("size", SIZES)
def test_state_dicts_have_the_names_shapes_and_counts_of_released_files(recipe, size):
    mae_model = on_meta(models_mae.MODELS[f"mae_vit_{size}"])
    assert shapes(mae_model) == recipe[f"mae_shapes/{size}"]
    counts = recipe[f"n_params/{size}"]
    assert sum(p.numel() for p in mae_model.parameters()) == counts["mae_total"]
    assert sum(p.numel() for p in mae_model.parameters() if p.requires_grad) == counts["mae_trainable"]

    pooled = on_meta(models_vit.MODELS[f"vit_{size}"], num_classes=1000, global_pool=True)
    assert shapes(pooled) == recipe[f"vit_shapes/{size}"]
    # positions are trained in the classifier
    assert sum(p.numel() for p in pooled.parameters() if p.requires_grad) == counts["vit_1000"]
    cls_token = on_meta(models_vit.MODELS[f"vit_{size}"], num_classes=1000, global_pool=False)
    assert shapes(cls_token) == recipe[f"vit_shapes_cls/{size}"]


@pytest.mark.parametrize("size", SIZES)
def test_stochastic_depth_grows_linearly_over_blocks(recipe, size):
    model = on_meta(models_vit.MODELS[f"vit_{size}"], drop_path_rate=0.1, global_pool=True)
    for place in ("drop_path1", "drop_path2"):
        rates = [getattr(getattr(block, place), "drop_prob", 0.0) for block in model.blocks]
        assert rates == pytest.approx(recipe[f"drop_path/{size}/0.1"], rel=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_initial_weights_have_the_recorded_mean_and_deviation(recipe, size):
    torch.manual_seed(0)
    model = models_mae.MODELS[f"mae_vit_{size}"]()
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[0].endswith("blocks"):
            parts[1] = "0"  # all blocks start alike
        mean, std = recipe[f"init_std/{size}"][".".join(parts)]
        # Both are samples of n draws. Standard errors: std / sqrt(n) for the mean; std / sqrt(2 n) for a normal's
        # deviation, less for a uniform's. The difference of two samples has sqrt(2) times that; six times are allowed.
        n = parameter.numel()
        error_of_mean, error_of_std = 6 * std * math.sqrt(2 / n), 6 * std / math.sqrt(n)
        if std == 0 or name.endswith("pos_embed"):
            error_of_mean = error_of_std = 1e-6  # not drawn at all
        assert parameter.mean().item() == pytest.approx(mean, rel=0, abs=error_of_mean), name
        assert parameter.std().item() == pytest.approx(std, rel=0, abs=error_of_std), name


# --- names and configurations ------------------------------------------------------------------------------------


def test_every_name_people_use_builds_the_paper_s_model():
    sizes = {"base_patch16": (768, 12, 12, 16), "large_patch16": (1024, 24, 16, 16), "huge_patch14": (1280, 32, 16, 14)}
    for size, (width, depth, heads, patch) in sizes.items():
        names = [f"mae_vit_{size}", f"mae_vit_{size}_dec512d8b"]
        for builder in [models_mae.MODELS[name] for name in names] + [getattr(models_mae, name) for name in names]:
            model = on_meta(builder)
            decoder = model.decoder_blocks
            assert decoder[0].attn.qkv.in_features == 512
            assert len(decoder) == 8 and decoder[0].attn.num_heads == 16
            assert model.norm_pix_loss is False
            check_encoder(model, width, depth, heads, patch)
        for builder in (models_vit.MODELS[f"vit_{size}"], getattr(models_vit, f"vit_{size}")):
            check_encoder(on_meta(builder), width, depth, heads, patch)


@pytest.mark.parametrize(
    ("size", "width", "depth", "encoder"),
    [("2b_patch14", 2560, 24, 1_890_408_960), ("6b_patch14", 4096, 32, 6_447_632_384)],
)
def test_the_sizes_of_maws(size, width, depth, encoder):
    model = on_meta(models_mae.MODELS[f"mae_vit_{size}"])
    check_encoder(model, width, depth, 32, 14)
    assert model.decoder_embed.out_features == 512 and len(model.decoder_blocks) == 8
    # in closed form: per block 12 matrices of width^2, biases of 9 widths, two norms; patches, positions, token, norm
    by_hand = depth * (12 * width**2 + 13 * width) + (14 * 14 * 3 + 1 + 257 + 1 + 2) * width
    assert by_hand == encoder
    assert sum(p.numel() for name, p in model.named_parameters() if not is_decoder(name)) == encoder
    classifier = on_meta(models_vit.MODELS[f"vit_{size}"], num_classes=1000, global_pool=True)
    check_encoder(classifier, width, depth, 32, 14)
    assert sum(p.numel() for p in classifier.parameters()) == encoder + 1000 * (width + 1)


def check_encoder(model: nn.Module, width: int, depth: int, heads: int, patch: int) -> None:
    assert len(model.blocks) == depth
    assert model.patch_embed.patch_size[0] == patch
    assert model.patch_embed.num_patches == (224 // patch) ** 2
    block = model.blocks[-1]
    assert block.attn.num_heads == heads
    assert tuple(block.attn.qkv.weight.shape) == (3 * width, width) and block.attn.qkv.bias is not None
    assert block.mlp.fc1.out_features == 4 * width
    assert isinstance(block.mlp.act, nn.GELU) and block.mlp.act.approximate == "none"
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize("module", [models_mae, models_vit])
def test_models_lists_builders_of_this_file_under_their_names(module):
    for name, builder in module.MODELS.items():
        assert getattr(module, name) is builder
        assert isinstance(on_meta(builder), nn.Module)


def test_builders_take_the_target_and_the_pooling():
    assert on_meta(models_mae.mae_vit_base_patch16, norm_pix_loss=True).norm_pix_loss is True
    assert isinstance(on_meta(models_vit.vit_base_patch16, global_pool=True).norm, nn.Identity)
    assert isinstance(on_meta(models_vit.vit_base_patch16, global_pool=False).fc_norm, nn.Identity)
    assert on_meta(models_vit.vit_base_patch16, num_classes=5).head.out_features == 5


def test_classifier_names_what_is_never_decayed():
    assert vit().no_weight_decay() == {"pos_embed", "cls_token"}


# --- other implementations given our weights ----------------------------------------------------------------------


def to_hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict under the names of Hugging Face's ViTMAEForPreTraining; qkv becomes three matrices."""
    names = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "mask_token": "decoder.mask_token",
        "decoder_pos_embed": "decoder.decoder_pos_embed",
    }
    parts = {
        "patch_embed.proj.": "vit.embeddings.patch_embeddings.projection.",
        "decoder_blocks.": "decoder.decoder_layers.",
        "decoder_": "decoder.decoder_",
        "blocks.": "vit.layers.",
        "norm.": "vit.layernorm.",
    }
    inner = {".norm1.": ".layernorm_before.", ".norm2.": ".layernorm_after.", ".attn.proj.": ".attention.o_proj."}
    converted = {}
    for name, tensor in state.items():
        start = next((start for start in parts if name.startswith(start)), "")
        new = names.get(name) or parts[start] + name.removeprefix(start)
        for old, replacement in inner.items():
            new = new.replace(old, replacement)
        if ".attn.qkv." in new:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                converted[new.replace(".attn.qkv.", f".attention.{letter}_proj.")] = third
        else:
            converted[new] = tensor
    return converted


@pytest.mark.parametrize("norm_pix", [False, True])
def test_hugging_face_gives_our_loss_and_prediction_from_our_weights_and_noise(norm_pix):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = mae(norm_pix_loss=norm_pix)
    shake(ours)
    config = transformers.ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=4,
        decoder_intermediate_size=64, layer_norm_eps=1e-6, mask_ratio=0.75, norm_pix_loss=norm_pix,
    )  # fmt: skip
    theirs = transformers.ViTMAEForPreTraining(config).eval()
    theirs.load_state_dict(to_hugging_face(ours.state_dict()), strict=True)
    imgs, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    with torch.no_grad():
        loss, pred, mask = ours(imgs, 0.75, noise)
        expected = theirs(imgs, noise=noise)
    close(loss, expected.loss)
    close(pred, expected.logits)
    assert torch.equal(mask, expected.mask)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_timm_s_own_model_gives_our_logits_from_our_weights(pool):
    torch.manual_seed(0)
    ours = models_vit.vit_base_patch16(num_classes=10, global_pool=pool == "avg").eval()
    shake(ours)
    options = {"global_pool": "avg"} if pool == "avg" else {}
    theirs = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=10, **options).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    imgs = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        close(ours(imgs), theirs(imgs))


# --- properties of masking and of the loss ------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix", [False, True])
def test_visible_patches_never_influence_the_loss(norm_pix):
    torch.manual_seed(0)
    model = mae(norm_pix_loss=norm_pix)
    imgs = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        loss, pred, mask = model(imgs)
        kept = 1 - mask
        other_imgs = change_patches(imgs, 8, kept)
        assert torch.equal(model.forward_loss(other_imgs, pred, mask), loss)
        other_pred = pred + 10 * torch.randn_like(pred) * kept[:, :, None]
        assert torch.equal(model.forward_loss(imgs, other_pred, mask), loss)
        # but a single removed patch does
        one = torch.zeros_like(mask)
        one[0, mask[0].argmax()] = 1
        assert not torch.equal(model.forward_loss(change_patches(imgs, 8, one), pred, mask), loss)
        assert not torch.equal(model.forward_loss(imgs, pred + one[:, :, None], mask), loss)


def test_removed_patches_never_influence_the_encoder():
    torch.manual_seed(0)
    model = mae()
    imgs, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    with torch.no_grad():
        latent, mask, _ = model.forward_encoder(imgs, 0.75, noise)
        assert torch.equal(model.forward_encoder(change_patches(imgs, 8, mask), 0.75, noise)[0], latent)
        # but each kept one does, and only in its own image
        one = torch.zeros_like(mask)
        one[1, mask[1].argmin()] = 1
        other = model.forward_encoder(change_patches(imgs, 8, one), 0.75, noise)[0]
        assert [torch.equal(other[n], latent[n]) for n in range(3)] == [True, False, True]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.9])
def test_each_image_keeps_exactly_k_patches(ratio):
    torch.manual_seed(0)
    latent, mask, ids_restore = mae().forward_encoder(torch.randn(20, 3, 32, 32), ratio)
    k = math.floor(16 * (1 - ratio))
    assert latent.shape == (20, 1 + k, 24)
    assert mask.shape == (20, 16)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert (mask.sum(dim=1) == 16 - k).all()
    assert torch.equal(ids_restore.sort(dim=1).values, torch.arange(16).expand(20, -1))
    assert torch.equal(mask, (ids_restore >= k).float())


def test_kept_patches_come_in_order_of_noise_after_the_class_token():
    torch.manual_seed(0)
    model = mae_without_blocks()
    shake(model)
    imgs, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    latent, mask, _ = model.forward_encoder(imgs, 0.7, noise)
    tokens = model.patch_embed(imgs) + model.pos_embed[:, 1:]
    for n in range(3):
        order = sorted(range(16), key=lambda i: noise[n, i].item())[:4]
        close(latent[n, 1:], tokens[n, order])
        assert [i for i in range(16) if mask[n, i] == 0] == sorted(order)
    close(latent[:, 0], (model.cls_token + model.pos_embed[:, :1])[:, 0].expand(3, -1))


def test_decoder_puts_mask_tokens_where_patches_were_removed():
    torch.manual_seed(0)
    model = mae(decoder_depth=0, norm_layer=no_norm)
    shake(model)
    noise = torch.rand(2, 16)
    latent, mask, ids_restore = model.forward_encoder(torch.randn(2, 3, 32, 32), 0.75, noise)
    pred = model.forward_decoder(latent, ids_restore)
    embedded = model.decoder_embed(latent)
    for n in range(2):
        order = noise[n].argsort().tolist()
        for i in range(16):
            token = model.mask_token[0, 0] if mask[n, i] else embedded[n, 1 + order.index(i)]
            close(pred[n, i], model.decoder_pred(token + model.decoder_pos_embed[0, 1 + i]))


def test_random_masks_are_uniform_over_patches_and_pairs():
    torch.manual_seed(0)
    n = 4000
    model = mae_without_blocks(in_chans=1, patch_size=8, embed_dim=4)
    mask = model.forward_encoder(torch.zeros(n, 1, 32, 32), 0.75)[1]
    kept = 1 - mask
    # of 16 patches 4 are kept: a patch with chance 1/4, a pair with 4 * 3 / (16 * 15); six standard errors allowed
    for frequencies, chance in ((kept.mean(dim=0), 1 / 4), (kept.T @ kept / n, 4 * 3 / (16 * 15))):
        if frequencies.ndim == 2:
            frequencies = frequencies[~torch.eye(16, dtype=torch.bool)]
        allowed = 6 * math.sqrt(chance * (1 - chance) / n)
        assert (frequencies - chance).abs().max() < allowed


def test_k_is_exact_for_every_share_of_every_number_of_patches():
    for length in range(1, 1025):
        wrong = [m for m in range(length) if kept_patches(length, m / length) != length - m]
        assert not wrong, (length, wrong)


def test_k_is_the_floor_of_exact_arithmetic_for_decimal_ratios():
    for length in range(1, 1025):
        for percent in range(1, 100):
            exact = math.floor(length * (1 - Fraction(percent, 100)))
            if exact:
                assert kept_patches(length, percent / 100) == exact, (length, percent)
            else:
                with pytest.raises(UserError):
                    kept_patches(length, percent / 100)


def test_ninety_percent_of_a_hundred_patches_leave_ten():
    latent, mask, _ = mae(img_size=80).forward_encoder(torch.randn(1, 3, 80, 80), 0.9)
    assert latent.shape[1] == 1 + 10 and mask.sum() == 90


def test_encoder_keeps_all_patches_at_ratio_0():
    torch.manual_seed(0)
    model = mae()
    imgs = torch.randn(2, 3, 32, 32)
    latent, mask, ids_restore = model.forward_encoder(imgs, 0)
    assert latent.shape == (2, 17, 24) and not mask.any()
    # `encode` sees the same tokens, in image order
    cls_token, patch_map = model.encode(imgs)
    close(cls_token, latent[:, 0])
    in_order = latent[:, 1:].gather(1, ids_restore[:, :, None].expand(-1, -1, 24))
    close(patch_map, in_order.transpose(1, 2).reshape(2, 24, 4, 4))


@pytest.mark.parametrize(
    ("ratio", "reason"),
    [
        (0, "removes none of 16 patches"),
        (1e-9, "removes none of 16 patches"),
        (1, "0 < mask_ratio < 1"),
        (0.95, "keeps none of 16 patches"),
        (-0.1, "0 < mask_ratio < 1"),
        (1.5, "0 < mask_ratio < 1"),
        (math.nan, "0 < mask_ratio < 1"),
    ],
)
def test_ratios_that_leave_nothing_to_do_are_refused_with_the_reason(ratio, reason):
    with pytest.raises(UserError, match=reason):
        mae()(torch.randn(1, 3, 32, 32), ratio)


@pytest.mark.parametrize("word", ["at most", "at least"])
def test_the_ratio_that_an_error_suggests_works(word):
    """For every number of patches."""
    refused = []
    for length in range(2, 1025):
        with pytest.raises(UserError) as error:
            check_mask_ratio(length, 1 - 1e-9 if word == "at most" else 0)
        suggested = float(str(error.value).split(f"choose {word} ")[1])
        try:
            check_mask_ratio(length, suggested)
        except UserError:
            refused.append((length, suggested))
    assert not refused, f"{len(refused)} suggestions are refused in turn: (patches, ratio) {refused[:5]}"


# --- patches and targets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "patch", "channels"), [(8, 8, 4, 3), (8, 12, 4, 3), (15, 6, 3, 1)])
def test_pixels_of_a_patch_come_by_row_then_column_then_channel(height, width, patch, channels):
    torch.manual_seed(0)
    model = mae(img_size=(height, width), patch_size=patch, in_chans=channels)
    imgs = torch.randn(2, channels, height, width)
    patches = model.patchify(imgs)
    assert patches.shape == (2, height // patch * (width // patch), patch * patch * channels)
    for n in range(2):
        for index in range(patches.shape[1]):
            rows, columns = patch_pixels(height, width, patch, index)
            naive = [
                imgs[n, channel, row, column]
                for row in range(rows.start, rows.stop)
                for column in range(columns.start, columns.stop)
                for channel in range(channels)
            ]
            assert torch.equal(patches[n, index], torch.stack(naive))
    assert torch.equal(model.unpatchify(patches), imgs)


def test_unpatchify_is_the_inverse_from_the_other_side():
    patches = torch.randn(2, 6, 4 * 4 * 3)
    model = mae(img_size=(8, 12), patch_size=4)
    assert torch.equal(model.patchify(model.unpatchify(patches)), patches)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_is_the_mean_over_removed_patches_of_the_naive_error(norm_pix):
    torch.manual_seed(0)
    model = mae(norm_pix_loss=norm_pix)
    imgs, pred = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.randn(2, 16, 192, dtype=torch.float64)
    # two patches whose deviation is zero, or so small that the 1e-6 beside the variance counts
    imgs[0, :, :8, :8] = 0.5
    imgs[0, :, :8, 24:] *= 1e-3
    mask = torch.zeros(2, 16)
    mask[0, [0, 3, 7]] = mask[1, [1, 2, 15]] = 1
    errors = []
    for n, index in mask.nonzero().tolist():
        target = model.patchify(imgs)[n, index].tolist()
        if norm_pix:
            mean = sum(target) / len(target)
            variance = sum((x - mean) ** 2 for x in target) / (len(target) - 1)
            target = [(x - mean) / math.sqrt(variance + 1e-6) for x in target]
        errors.append(sum((x - y) ** 2 for x, y in zip(pred[n, index].tolist(), target, strict=True)) / len(target))
    assert model.forward_loss(imgs, pred, mask).item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_of_half_precision_inputs_is_computed_in_float32(norm_pix):
    torch.manual_seed(0)
    model = mae(norm_pix_loss=norm_pix)
    imgs, pred = torch.randn(2, 3, 32, 32).bfloat16(), torch.randn(2, 16, 192).bfloat16()
    mask = torch.zeros(2, 16)
    mask[:, :12] = 1
    loss = model.forward_loss(imgs, pred, mask)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, model.forward_loss(imgs.float(), pred.float(), mask))


# --- image sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [mae, vit])
@pytest.mark.parametrize(
    ("img_size", "patch_size", "works"),
    [(225, 16, (224, 240)), (225, 14, (224, 238)), ((32, 47), 16, (32, 48)), ((47, 32), 16, (32, 48)), (8, 16, (16,))],
)
def test_a_size_that_patches_cannot_fill_is_refused_naming_sizes_that_work(build, img_size, patch_size, works):
    with pytest.raises(UserError) as error:
        build(img_size=img_size, patch_size=patch_size)
    for side in works:
        assert str(side) in str(error.value).split("such as")[1]
        build(img_size=side, patch_size=patch_size)


def test_mae_takes_rectangles():
    torch.manual_seed(0)
    model = mae(img_size=(16, 48))
    imgs = torch.randn(2, 3, 16, 48)
    loss, pred, mask = model(imgs, 0.75)
    assert pred.shape == (2, 12, 192) and (mask.sum(dim=1) == 9).all() and loss.isfinite()
    loss.backward()
    # the position of patch 6 + j, in the second row, is the one of row 1 and column j
    square = mae(img_size=48)
    for index in range(12):
        row, column = divmod(index, 6)
        assert torch.equal(model.pos_embed[0, 1 + index], square.pos_embed[0, 1 + 6 * row + column])
        assert torch.equal(model.decoder_pos_embed[0, 1 + index], square.decoder_pos_embed[0, 1 + 6 * row + column])


@pytest.mark.parametrize("global_pool", [False, True])
def test_classifier_takes_rectangles(global_pool):
    model = vit(img_size=(16, 48), global_pool=global_pool)
    imgs = torch.randn(2, 3, 16, 48)
    assert model.pos_embed.shape == (1, 1 + 12, 24)
    assert model.forward_features(imgs).shape == (2, 24)
    assert model(imgs).shape == (2, 7)


@pytest.mark.parametrize("build", [mae, vit])
@pytest.mark.parametrize("shape", [(48, 16), (16, 56), (24, 32)])
def test_images_of_another_shape_are_refused(build, shape):
    """The first and the last have as many pixels as the model expects: they must not be cut up in the wrong places."""
    with pytest.raises((UserError, AssertionError, ValueError, RuntimeError)):
        build(img_size=(16, 48))(torch.randn(2, 3, *shape))
