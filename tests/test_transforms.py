"""From pixels to a network's input: the recipes against Pillow's, torchvision's and timm's own pipelines."""

import io
import math
from functools import partial

import numpy as np
import pytest
import skimage.data
import timm.data.auto_augment
import torch
import torchvision
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import InterpolationMode

from util import rng, transforms
from util.crop import RandomResizedCrop
from util.data.decode import decode
from util.data.loader import normalise
from util.errors import UserError
from util.transforms import eval_transform, finetune_transform, linprobe_transform, pretrain_transform

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
BICUBIC = InterpolationMode.BICUBIC
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")
RANDAUGMENT = "rand-m9-mstd0.5-inc1"

RECIPES = {
    "pretrain": lambda size: pretrain_transform(size, crop_min=0.2, hflip=0.5),
    "linprobe": lambda size: linprobe_transform(size, crop_min=0.08, hflip=0.5),
    "finetune": lambda size: finetune_transform(size, None, RANDAUGMENT),
    "colour jitter": lambda size: finetune_transform(size, 0.4, None),
    "plain": lambda size: finetune_transform(size, None, None),
}


def to_pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def apply(transform, image: Image.Image) -> torch.Tensor:
    """[3, h, w], normalised: what a network sees of one image."""
    pixels, mirror = transform(to_pixels(image))
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    return normalise(pixels[None], torch.tensor([mirror]))[0]


def levels(imgs: torch.Tensor) -> torch.Tensor:
    """Normalised [3, h, w] -> grey levels 0 to 255."""
    return (imgs * STD[:, None, None] + MEAN[:, None, None]) * 255


def jpeg(name: str) -> tuple[Image.Image, torch.Tensor]:
    """A photograph 500 pixels wide as Pillow decodes its JPEG, and as the project does."""
    photo = Image.fromarray(getattr(skimage.data, name)())
    file = io.BytesIO()
    photo.resize((500, round(500 * photo.height / photo.width))).save(file, "jpeg", quality=92)
    return Image.open(file).convert("RGB"), decode(torch.from_numpy(np.frombuffer(file.getvalue(), np.uint8).copy()))


# the libraries' own pipelines, with Pillow throughout


def _torchvision_recipe(crop) -> torchvision.transforms.Compose:
    normal = torchvision.transforms.Normalize(MEAN, STD)
    flip, tensor = torchvision.transforms.RandomHorizontalFlip(), torchvision.transforms.ToTensor()
    return torchvision.transforms.Compose([crop, flip, tensor, normal])


def _timm_recipe(size, color_jitter, aa):
    return create_transform(
        size, is_training=True, color_jitter=color_jitter, auto_augment=aa, interpolation="bicubic", re_prob=0
    )


LIBRARY = {
    "pretrain": lambda size: _torchvision_recipe(
        torchvision.transforms.RandomResizedCrop(size, scale=(0.2, 1), interpolation=BICUBIC)
    ),
    "linprobe": lambda size: _torchvision_recipe(RandomResizedCrop(size, interpolation=BICUBIC)),
    "finetune": lambda size: _timm_recipe(size, None, RANDAUGMENT),
    "colour jitter": lambda size: _timm_recipe(size, 0.4, None),
    "plain": lambda size: _timm_recipe(size, None, None),
}


@pytest.mark.parametrize("size", [224, (64, 96)], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_draws_are_the_libraries_own(name, size, monkeypatch):
    """With Pillow's resizing under our transforms, nothing is left that may differ: equal bit for bit."""

    def resize_with_pillow(pixels, size):
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        return to_pixels(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))

    monkeypatch.setattr(transforms, "resize", resize_with_pillow)
    ours, theirs = RECIPES[name](size), LIBRARY[name](size)
    photo = Image.fromarray(skimage.data.coffee())
    for epoch in range(30):
        rng.seed_sample(0, epoch, 7)
        expected = theirs(photo)
        rng.seed_sample(0, epoch, 7)
        assert torch.equal(apply(ours, photo), expected)


@pytest.mark.parametrize("name", ["pretrain", "linprobe", "plain"])
def test_pixels_are_pillow_s_within_a_tenth_of_a_grey_level(name):
    ours, theirs = RECIPES[name](224), LIBRARY[name](224)
    differences = []
    for photo in PHOTOS:
        image, pixels = jpeg(photo)
        assert np.array_equal(np.asarray(image), pixels.permute(1, 2, 0).numpy())  # decoding is identical
        for epoch in range(25):
            rng.seed_sample(0, epoch, 0)
            expected = theirs(image)
            rng.seed_sample(0, epoch, 0)
            ours_pixels, mirror = ours(pixels)
            result = normalise(ours_pixels[None], torch.tensor([mirror]))[0]
            differences.append((levels(result) - levels(expected)).abs())
    differences = torch.stack(differences)
    assert differences.mean() < 0.1
    assert differences.max() < 13  # at hard edges, where the order of the two directions differs


# what the draws look like


def position_image(side=256):
    """Red grows from left to right by 1 a pixel, green from top to bottom."""
    ramp = np.broadcast_to(np.arange(side, dtype=np.uint8), (side, side))
    return Image.fromarray(np.stack([ramp, ramp.T, np.zeros_like(ramp)], axis=2))


def boxes(transform, n=300):
    """[n, 4]: left, width, top, height of the crops that `transform` takes from a 256 x 256 image."""
    torch.manual_seed(0)
    image = position_image()
    found = []
    for _ in range(n):
        red, green, _ = levels(apply(transform, image))
        side = red.shape[-1]
        box = []
        for coordinate in (red.mean(dim=0), green.mean(dim=1)):
            extent = (coordinate[-2] - coordinate[1]).abs() * side / (side - 3)
            box += [coordinate.mean() - extent / 2 + 0.5, extent]
        found.append(torch.stack(box))
    return torch.stack(found).numpy()


def is_mirrored(transform, image):
    red = apply(transform, image)[0]
    return bool(red[:, 0].mean() > red[:, -1].mean())


def test_pretraining_crops_20_to_100_percent_of_the_area():
    left, width, top, height = boxes(RECIPES["pretrain"](64)).T
    share, ratio = width * height / 256**2, width / height
    assert 0.2 * 0.97 < share.min() < 0.25 and 0.9 < share.max() < 1.02
    assert 0.5 < share.mean() < 0.6  # draws of a large area that do not fit are drawn again
    assert 0.75 * 0.97 < ratio.min() < 0.82 and 1.22 < ratio.max() < 4 / 3 * 1.03
    assert min(left.min(), top.min()) > -1.5 and max((left + width).max(), (top + height).max()) < 257.5


@pytest.mark.parametrize("name", ["pretrain", "linprobe", "plain", "colour jitter"])
def test_training_flips_half_of_the_images(name):
    transform = RECIPES[name](32)
    torch.manual_seed(0)
    assert 70 < sum(is_mirrored(transform, position_image()) for _ in range(200)) < 130


def test_probe_crop_of_a_narrow_image_is_clipped_with_a_uniform_corner():
    torch.manual_seed(0)
    image = Image.new("RGB", (400, 20))
    found = torch.tensor([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(500)])
    top, left, height, width = found.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 20).all() and (left + width <= 400).all()
    clipped = height == 20
    # the drawn width stays (torchvision would fall back to the centre, 27 wide): at most sqrt(400 * 20 * 4 / 3)
    assert clipped.sum() > 400 and width[clipped].max() > 80 and width.max() <= math.ceil((400 * 20 * 4 / 3) ** 0.5)
    corner = left[clipped] / (400 - width[clipped])
    assert abs(corner.mean() - 0.5) < 0.05 and corner.min() < 0.05 and corner.max() > 0.95


def test_probe_uses_its_own_crop():
    torch.manual_seed(0)
    narrow = position_image().resize((400, 20))
    transform = linprobe_transform(32, crop_min=0.08, hflip=0.0)
    centres = torch.stack([levels(apply(transform, narrow))[0].mean() for _ in range(100)])
    assert centres.std() > 25  # torchvision's would take the centre each time


MAKES = [pretrain_transform, linprobe_transform, partial(finetune_transform, color_jitter=None, aa=None)]
each_recipe = pytest.mark.parametrize("make", MAKES, ids=["pretrain", "linprobe", "finetune"])


@each_recipe
def test_least_area_and_flip_can_be_chosen(make):
    left, width, top, height = boxes(make(64, crop_min=0.5, hflip=0.0), n=100).T
    assert 0.5 * 0.93 < (width * height).min() / 256**2 < 0.6
    image = position_image()
    assert not any(is_mirrored(make(32, crop_min=0.5, hflip=0.0), image) for _ in range(50))
    assert all(is_mirrored(make(32, crop_min=0.5, hflip=1.0), image) for _ in range(50))


@each_recipe
def test_crops_of_long_images_can_be_long(make):
    torch.manual_seed(0)
    transform = make((256, 32), crop_min=0.3, hflip=0.0, ratio=(0.1, 0.15))
    heights, widths = np.array([transform.draw(1024, 128)[0][2:] for _ in range(200)]).T
    clipped = heights == 1024  # the probe's crop is cut to the image
    ratios = (widths / heights)[~clipped]
    assert 0.098 < ratios.min() < 0.105 and 0.145 < ratios.max() < 0.153
    shares = (heights * widths / (1024 * 128))[~clipped]
    assert 0.295 < shares.min() < 0.35 and shares.max() > 0.75
    assert transform(torch.zeros(3, 1024, 128, dtype=torch.uint8))[0].shape == (256, 32, 3)
    with pytest.raises(UserError, match="--crop_ratio 2 0.5: give the smaller first"):
        make(32, crop_min=0.3, hflip=0.0, ratio=(2, 0.5))


def test_strongest_auto_augment_takes_every_image():
    # at magnitude 10 posterize keeps 0 bits, which new releases of Pillow refuse
    rng.seed_sample(0, 0, 0)
    transform = finetune_transform(32, None, "rand-m10-n4-inc1")
    photo = Image.fromarray(skimage.data.astronaut()).resize((60, 40))
    images = torch.stack([apply(transform, photo) for _ in range(60)])
    assert images.isfinite().all() and images.std(dim=0).min() > 0


def test_colour_jitter_is_left_out_with_auto_augment():
    with_aa, without = finetune_transform(32, 0.4, RANDAUGMENT), finetune_transform(32, 0.4, None)
    assert "ColorJitter" not in str(with_aa) and "RandAugment" in str(with_aa)
    assert "ColorJitter" in str(without) and "RandAugment" not in str(without)


@pytest.mark.parametrize("name", RECIPES)
def test_training_transforms_take_rectangles(name):
    assert apply(RECIPES[name]((32, 48)), position_image()).shape == (3, 32, 48)


# transform for evaluation


def by_hand(image, resized, crop):
    """Pillow's bicubic to `resized` (height, width), the centre of `crop` (height, width), normalised."""
    image = image.resize((resized[1], resized[0]), Image.Resampling.BICUBIC)
    top, left = round((resized[0] - crop[0]) / 2), round((resized[1] - crop[1]) / 2)
    image = image.crop((left, top, left + crop[1], top + crop[0]))
    return (to_pixels(image) / 255 - MEAN[:, None, None]) / STD[:, None, None]


def assert_close_to_pillow(result, expected):
    difference = (levels(result) - levels(expected)).abs()
    assert result.shape == expected.shape
    assert difference.mean() < 0.25 and difference.max() < 13


@pytest.mark.parametrize(
    ("size", "resized", "crop"),
    [
        (224, (256, 384), (224, 224)),  # 224 / (224 / 256)
        (32, (36, 54), (32, 32)),  # int(36.57)
        (384, (384, 576), (384, 384)),  # above 224 the crop is the whole shorter side
        (256, (256, 384), (256, 256)),
        ((64, 96), (73, 110), (64, 96)),
        ((64, 48), (73, 110), (64, 48)),
        ((48, 96), (73, 109), (48, 96)),
        ((320, 480), (320, 480), (320, 480)),
    ],
)
def test_evaluation_resizes_and_crops_a_photograph_as_by_hand(size, resized, crop):
    photo = Image.fromarray(skimage.data.coffee())  # 400 high, 600 wide
    assert photo.size == (600, 400)
    assert_close_to_pillow(apply(eval_transform(size), photo), by_hand(photo, resized, crop))


def test_evaluation_of_an_upright_photograph_resizes_its_width():
    photo = Image.fromarray(skimage.data.coffee()).transpose(Image.Transpose.ROTATE_90)
    assert_close_to_pillow(apply(eval_transform(224), photo), by_hand(photo, (384, 256), (224, 224)))


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-w0", "rand-w0-n2-m9", "rand-m9-inc1-w0"])
def test_randaugment_takes_the_weights_that_timm_had(policy):
    """w0: geometry in nine of ten draws, posterize and invert in none."""
    (augment,) = finetune_transform(32, None, policy).policy.transforms
    (plain,) = finetune_transform(32, None, policy.replace("-w0", "")).policy.transforms
    assert [str(op) for op in augment.ops] == [str(op) for op in plain.ops] and plain.choice_weights is None
    shares = {op.name: weight for op, weight in zip(augment.ops, augment.choice_weights, strict=True)}
    assert sum(shares.values()) == pytest.approx(1) and sum(share == 0 for share in shares.values()) == 2
    assert shares["Rotate"] == pytest.approx(0.3) and shares["ShearX"] == pytest.approx(0.2)
    geometry = [shares[name] for name in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")]
    assert sum(geometry) == pytest.approx(0.9)
    augment(Image.new("RGB", (32, 32)))


@pytest.mark.parametrize("policy", ["rand-m9-w1", "rand-m9-n14-w0", "rand-m9-tweights-n14-w0", "rand-w0-x1"])
def test_weights_that_timm_never_had_are_refused(policy):
    with pytest.raises(UserError, match=policy):
        finetune_transform(32, None, policy)


def posterizers(transform) -> list:
    """The posterizing operations of a policy of timm's."""
    parts = [transform.policy] if hasattr(transform, "draw") else [transform]
    found = []
    while parts:
        part = parts.pop()
        if isinstance(part, list | tuple):
            parts += part
        elif hasattr(part, "aug_fn"):
            found += [part] if part.name.startswith("Posterize") else []
        else:
            parts += [getattr(part, name) for name in ("transforms", "ops", "policy") if hasattr(part, name)]
    return found


POLICIES = [RANDAUGMENT, "rand-m9", "original", "originalr", "v0", "v0r", "3a", "augmix-m3-w2"]


@pytest.mark.parametrize("aa", POLICIES)
def test_posterize_takes_the_bits_that_policies_draw(aa):
    """Pillow 13 refuses 0 bits, which timm's increasing policy draws; older ones gave black."""
    ops = posterizers(finetune_transform(32, None, aa))
    assert ops or aa == "3a"  # the other policies have it
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for op in ops:
        for bits in (0, 1, 4, 8):
            expected = np.asarray(grey) & (0xFF << (8 - bits) & 0xFF)
            assert (np.asarray(op.aug_fn(grey, bits)) == expected).all()


@pytest.mark.parametrize("aa", POLICIES)
def test_timm_is_left_as_it_is_for_everybody_else(aa):
    finetune_transform(32, None, aa)
    ops = posterizers(create_transform(32, is_training=True, auto_augment=aa))
    assert all(op.aug_fn.__module__ == "timm.data.auto_augment" for op in ops)
    assert {op.__module__ for op in timm.data.auto_augment.NAME_TO_OP.values()} == {"timm.data.auto_augment"}
