"""Pictures: un-normalised patches against closed forms, masks chosen by hand against the model's own masks."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models_mae
import models_vit
from util.data.decode import decode
from util.errors import UserError
from util.look.features import class_attention
from util.look.visualize import (
    KINDS,
    from_images,
    heat,
    mask_noise,
    neighbour_statistics,
    reconstruct,
    removed_patches,
    seeded_noise,
    sheet,
    to_pixels,
)

SIZES = [32, (32, 64)]


def mae(size=32, **options):
    torch.manual_seed(0)
    small = dict(patch_size=8, embed_dim=24, depth=1, num_heads=3, decoder_embed_dim=16, decoder_depth=1)
    return models_mae.MaskedAutoencoderViT(img_size=size, decoder_num_heads=4, **small, **options)


def knows_the_target(model, imgs):
    """The model, predicting exactly the normalised patches of `imgs`, as the paper defines them."""
    patches = model.patchify(imgs).double()
    centred = patches - patches.mean(dim=-1, keepdim=True)
    variance = centred.square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
    target = (centred / (variance + 1e-6).sqrt()).float()
    model.forward_decoder = lambda *_: target
    return model


def images(size, n=3):
    """Images in the range of pictures, so that nothing is clipped."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.rand(n, 3, height, width) - 0.5


@pytest.mark.parametrize("size", SIZES)
def test_a_perfect_prediction_with_the_true_statistics_gives_the_image(size):
    imgs = images(size)
    model = knows_the_target(mae(size, norm_pix_loss=True), imgs)
    pictures = reconstruct(model, imgs, statistics="answer")
    assert pictures.loss < 1e-10
    for kind in ("original", "reconstructed", "pasted"):
        torch.testing.assert_close(getattr(pictures, kind), to_pixels(imgs), atol=1e-5, rtol=0)
    assert not torch.allclose(pictures.masked, pictures.original)
    assert pictures.titles()[2:] == ["reconstructed\n(using the answer)", "pasted\n(using the answer)"]


@pytest.mark.parametrize("size", SIZES)
def test_a_perfect_prediction_with_neighbours_gives_the_image_where_all_patches_have_the_same_statistics(size):
    model = mae(size, norm_pix_loss=True)
    patches = model.patchify(images(size))
    patches = (patches - patches.mean(dim=-1, keepdim=True)) / patches.std(dim=-1, keepdim=True) * 0.2 + 0.1
    imgs = model.unpatchify(patches)
    pictures = reconstruct(knows_the_target(model, imgs), imgs)
    torch.testing.assert_close(pictures.reconstructed, to_pixels(imgs), atol=1e-5, rtol=0)
    assert pictures.statistics == "neighbours" and "neighbours" in pictures.titles()[3]


def test_neighbours_statistics_never_see_a_removed_patch():
    imgs, other = images(32), images(32)
    model = mae(norm_pix_loss=True)
    ratio, noise = mask_noise(torch.rand(3, 16).argsort(dim=1) < 9)
    removed = model.unpatchify((noise >= 0.5)[:, :, None].expand(-1, -1, 192).float()) > 0
    first = reconstruct(model, imgs, ratio, noise)
    second = reconstruct(model, torch.where(removed, other, imgs), ratio, noise)
    assert torch.equal(first.reconstructed, second.reconstructed) and torch.equal(first.masked, second.masked)
    answer = [reconstruct(model, x, ratio, noise, "answer") for x in (imgs, torch.where(removed, other, imgs))]
    assert not torch.equal(answer[0].reconstructed, answer[1].reconstructed), "the answer does"


def test_neighbours_statistics_are_the_inverse_distance_average_of_kept_patches():
    grid = (2, 5)
    random = np.random.default_rng(0)
    mean, std = random.normal(size=(2, 1, 10))
    mask = np.array([[0, 1, 1, 0, 1, 1, 0, 1, 1, 1]])
    expected = mean.copy()
    for i in range(10):
        if mask[0, i]:
            weights = [0 if mask[0, j] else ((i // 5 - j // 5) ** 2 + (i % 5 - j % 5) ** 2) ** -1.5 for j in range(10)]
            expected[0, i] = sum(w * m for w, m in zip(weights, mean[0], strict=True)) / sum(weights)
    got, _ = neighbour_statistics(*(torch.from_numpy(x).float() for x in (mean, std, mask)), grid)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)


def test_pixel_models_need_no_statistics_and_say_nothing_of_them():
    imgs, model = images(32), mae()
    torch.manual_seed(1)
    pictures = reconstruct(model, imgs, noise=torch.rand(3, 16))
    torch.manual_seed(1)
    loss, pred, mask = model(imgs, 0.75, torch.rand(3, 16))
    assert pictures.titles() == list(KINDS) and pictures.statistics == ""
    assert pictures.loss == loss.item()
    torch.testing.assert_close(pictures.reconstructed, to_pixels(model.unpatchify(pred)))
    shown = model.unpatchify(mask[:, :, None].expand_as(pred)) > 0
    assert (pictures.masked[shown] == 0.5).all()
    assert torch.equal(pictures.pasted[~shown], pictures.original[~shown])
    assert torch.equal(pictures.pasted[shown], pictures.reconstructed[shown])


def test_drawing_leaves_the_model_in_its_mode():
    model = mae().train()
    reconstruct(model, images(32))
    assert model.training


def test_unknown_statistics_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match="'guess'.*neighbours, answer"):
        reconstruct(mae(norm_pix_loss=True), images(32), statistics="guess")


@pytest.mark.parametrize("count", range(1, 16))
def test_every_mask_chosen_by_hand_is_the_mask_that_the_model_uses(count):
    removed = torch.stack([torch.randperm(16) < count for _ in range(3)])
    ratio, noise = mask_noise(removed)
    assert 0 <= noise.min() and noise.max() < 1
    _, _, mask = mae()(images(32), ratio, noise)
    assert torch.equal(mask.bool(), removed)


def test_every_number_of_patches_survives_the_detour_over_a_ratio():
    for length in (1, 3, 49, 100, 196, 256, 1024):
        for count in range(1, length):
            ratio, _ = mask_noise((torch.arange(length) < count)[None])
            assert models_mae.kept_patches(length, ratio) == length - count


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (torch.zeros(1, 16), "0 of 16 patches"),
        (torch.ones(1, 16), "16 of 16 patches"),
        (torch.tensor([[1, 0, 0], [1, 1, 0]]), r"\[1, 2\]: give the images one by one"),
    ],
)
def test_impossible_masks_are_refused(removed, message):
    with pytest.raises(UserError, match=message):
        mask_noise(removed.bool())


def test_removed_patches_are_those_of_the_model():
    noise = seeded_noise(3, 16, seed=5)
    assert torch.equal(noise, seeded_noise(3, 16, seed=5)) and not torch.equal(noise, seeded_noise(3, 16, seed=6))
    for ratio in (0.1, 0.5, 0.75):
        _, _, mask = mae()(images(32), ratio, noise)
        assert torch.equal(mask.bool(), removed_patches(noise, ratio))


@pytest.mark.parametrize(("across", "n_rows", "n_columns"), [(1, 3, 4), (2, 2, 8), (4, 1, 12)])
def test_a_sheet_has_a_cell_for_each_picture_where_its_title_says(across, n_rows, n_columns):
    pictures = reconstruct(mae((32, 64)), images((32, 64)))
    image = sheet(pictures, side=32, gap=6, across=across)
    assert image.size == (n_columns * (64 + 6) + 6, 22 + n_rows * (32 + 6))
    row, column = divmod(2, across)  # the third image, "pasted"
    x, y = 6 + (4 * column + 3) * 70, 22 + row * 38
    cell = torch.from_numpy(np.array(image.crop((x, y, x + 64, y + 32)))).permute(2, 0, 1) / 255
    torch.testing.assert_close(cell, pictures.pasted[2], atol=1 / 255, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (32, 128), (128, 32)])
def test_the_shorter_side_of_a_cell_is_as_asked(size):
    image = sheet(reconstruct(mae(size), images(size, n=1)), side=64)
    assert image.width == 4 * (2 * size[1] + 6) + 6 and image.height - 2 * size[0] in range(22, 60), "titles above"


def test_images_come_in_the_middle_in_the_shape_of_the_model_and_turned_by_exif():
    wide = Image.new("L", (60, 20))
    wide.paste(255, (20, 0, 40, 20))  # the middle third is white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    turned = Image.new("RGB", (20, 60), "red")
    turned.paste((0, 0, 255), (0, 30, 20, 60))
    turned.info["exif"] = exif.tobytes()
    imgs = from_images([wide], (16, 16))
    assert torch.allclose(to_pixels(imgs)[0, :, 4:12, 4:12], torch.ones(3, 8, 8))
    turned.getexif()[0x0112] = 6
    shown = to_pixels(from_images([turned], (20, 60)))[0]
    assert shown.shape == (3, 20, 60)
    assert shown[2, :, :25].mean() > 0.99 and shown[0, :, 35:].mean() > 0.99, "red lay on top, now it is on the right"


MODES = ("1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "F", "I;16", "I;16B",
         "I;16L", "I;16N")  # fmt: skip


def in_mode(mode: str) -> Image.Image:
    """A ramp of that mode."""
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    if mode == "F":
        return Image.fromarray(ramp)
    if mode.startswith("I;16"):
        big = mode[-1] == "B" or (mode[-1] == "N" and sys.byteorder == "big")
        return Image.frombytes(mode, (16, 16), (65535 * ramp).astype(">u2" if big else "<u2").tobytes())
    grey = Image.fromarray((255 * ramp).astype(np.uint8))
    rgb = Image.merge("RGB", (grey, grey.rotate(90), grey.rotate(180)))
    if mode in ("La", "LA", "PA"):
        return (grey if mode != "PA" else rgb.quantize(16)).convert("LA" if mode != "PA" else "PA").convert(mode)
    return rgb.convert("RGBA").convert(mode) if mode == "RGBa" else rgb.convert(mode)


@pytest.mark.parametrize("mode", MODES)
def test_images_from_memory_have_the_pixels_of_training(mode):
    image = in_mode(mode)
    assert image.mode == mode
    got = 255 * to_pixels(from_images([image], (16, 16)))[0].permute(1, 2, 0)
    if mode == "F" or mode.startswith("I;16"):
        expected = np.repeat(np.linspace(0, 255, 256).round().reshape(16, 16, 1), 3, 2)
    else:
        expected = np.asarray((image.convert("LA") if mode == "La" else image).convert("RGB"))
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-3 if mode != "I;16" else 1)
    file = io.BytesIO()
    try:
        image.save(file, "tiff")
        Image.open(file).load()
    except (OSError, KeyError, ValueError):
        return  # Pillow makes no file of this mode that it can read
    decoded = decode(torch.from_numpy(np.frombuffer(file.getvalue(), np.uint8).copy()))
    again = 255 * to_pixels(from_images([Image.open(file)], (16, 16)))[0]
    np.testing.assert_allclose(decoded.numpy(), again.numpy(), atol=1e-3)


@pytest.mark.parametrize("mode", ["I", "LAB", "F"])
def test_images_without_a_rule_are_refused_by_name(mode, tmp_path):
    values = np.full((8, 8), 300, np.int32 if mode == "I" else np.float32)
    image = Image.new("LAB", (8, 8)) if mode == "LAB" else Image.fromarray(values)
    image.save(tmp_path / "x\n.tif")
    for i, (one, name) in enumerate(((image, "unnamed"), (Image.open(tmp_path / "x\n.tif"), r".*/x\\n\.tif"))):
        images = [Image.new("RGB", (4, 4))] * i + [one]
        with pytest.raises(UserError, match=rf"^image {i} \({name}\): mode {mode}.*save it with unsigned values"):
            from_images(images, (8, 8))


def test_a_turned_tiff_of_16_bits_is_turned():
    file = io.BytesIO()
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(values).save(file, "tiff", tiffinfo={0x0112: 6})
    got = 255 * to_pixels(from_images([Image.open(file)], (8, 8)))[0, 0]
    np.testing.assert_allclose(got.numpy(), np.rot90(np.rint(values / 257), -1), atol=1e-3)


def of_channels(channels: int, **options):
    torch.manual_seed(0)
    return mae(32, in_chans=channels, **options)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
def test_images_of_any_channels_are_drawn_in_grey_or_three_bands(channels, norm_pix_loss):
    imgs = torch.rand(2, channels, 32, 32) - 0.5
    pictures = reconstruct(of_channels(channels, norm_pix_loss=norm_pix_loss), imgs)
    mean, std = ((0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3)
    for kind in KINDS:
        picture = getattr(pictures, kind)
        assert picture.shape == (2, 3, 32, 32)
        assert (channels == 1) == torch.equal(picture[:, 0], picture[:, 1])
    for band in range(3 if channels != 3 else 0):
        expected = imgs[:, min(band, channels - 1)] * std + mean
        torch.testing.assert_close(pictures.original[:, band], expected)
    sheet(pictures)


def test_bands_mean_and_deviation_can_be_chosen():
    imgs = torch.randn(1, 5, 32, 32)
    mean, std, bands = [0.1, 0.2, 0.3, 0.4, 0.5], [1, 2, 3, 4, 5], (4, 0, 2)
    pictures = reconstruct(of_channels(5), imgs, mean=mean, std=std, bands=bands)
    for i, band in enumerate(bands):
        torch.testing.assert_close(pictures.original[:, i], (imgs[:, band] * std[band] + mean[band]).clamp(0, 1))
    for wrong in ((0, 1), (0, 1, 5), (-1, 0, 1)):
        with pytest.raises(UserError, match=r"bands \[.*\] of images of 5 channels: choose three of 0 to 4"):
            to_pixels(imgs, bands=wrong)


@pytest.mark.parametrize(("images_", "model"), [(1, 3), (3, 1), (4, 3)])
def test_images_of_other_channels_than_the_model_s_are_refused(images_, model):
    with pytest.raises(UserError, match=f"images of {images_} channels, but the model takes {model}"):
        reconstruct(of_channels(model), torch.zeros(1, images_, 32, 32))


@pytest.mark.parametrize("kind", ["autoencoder", "class token", "global pool"])
def test_attention_is_what_timm_s_unfused_attention_computes(kind):
    torch.manual_seed(0)
    small = dict(img_size=(16, 32), patch_size=8, embed_dim=24, depth=2, num_heads=3)
    if kind == "autoencoder":
        model = models_mae.MaskedAutoencoderViT(**small, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=4)
    else:
        model = models_vit.VisionTransformer(**small, num_classes=2, global_pool=kind == "global pool")
    model.eval()
    imgs = torch.randn(2, 3, 16, 32)
    found = class_attention(model, imgs)
    expected = []
    attention = model.blocks[-1].attn
    attention.fused_attn = False  # now the weights pass through a dropout, where a hook can see them
    attention.attn_drop.register_forward_pre_hook(lambda _, args: expected.append(args[0]))
    model.encode(imgs) if kind == "autoencoder" else model(imgs)
    assert found.shape == (2, 3, 2, 4)
    torch.testing.assert_close(found.flatten(2), expected[0][:, :, 0, 1:])


def test_heat_is_brightest_where_values_are_greatest():
    values = torch.tensor([[0.0, 0.1], [0.2, 0.4]])
    shown = heat(torch.zeros(3, 16, 16), values)
    assert shown[:, 15, 15].tolist() == pytest.approx([0.65] * 3) and shown[:, 0, 0].tolist() == [0, 0, 0]
    assert shown.shape == (3, 16, 16) and 0 <= shown.min() and shown.max() <= 1


def test_the_readme_s_lines_extract_the_features_of_a_folder(tmp_path):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    block = next(part for part in readme.split("```")[1::2] if "features = torch.cat" in part).removeprefix("python")
    model = models_mae.mae_vit_tiny_patch4().eval()
    weights = {key: value for key, value in model.state_dict().items() if not key.startswith(("decoder", "mask_"))}
    torch.save({"model": weights, "args": {"model": "mae_vit_tiny_patch4"}}, tmp_path / "encoder.pth")
    for i in range(3):
        Image.new("RGB", (36, 36), (80 * i, 0, 0)).save(tmp_path / f"{i}.jpg")
    block = block.replace("output_dir/pretrain/checkpoint-399.pth", str(tmp_path / "encoder.pth"))
    scope = {}
    exec(block.replace("/path/to/images", str(tmp_path)), scope)
    images = from_images([Image.open(tmp_path / f"{i}.jpg") for i in range(3)], (32, 32))
    with torch.no_grad():
        torch.testing.assert_close(scope["features"], model.encode(images)[0])


@pytest.mark.parametrize("side", [96, 128, 224])
def test_titles_keep_to_their_columns(side):
    pictures = reconstruct(mae(norm_pix_loss=True), images(32, n=1))
    top = np.array(sheet(pictures, side=side).crop((0, 0, 4 * (side + 6) + 6, 36)).convert("L"))
    for column in range(1, 5):
        gap = top[:, column * (side + 6) + 1 : column * (side + 6) + 5]
        assert (gap == 255).all(), "white between two titles"
