"""Images: decoding, listing, order, loaders and transforms."""

import math
import os

import numpy as np
import pytest
import skimage.data
import torch
from helpers import project_log, write_image, write_image_folder
from PIL import Image
from timm.data import auto_augment
from torch.utils.data import DataLoader

from util import rng
from util.crop import RandomResizedCrop
from util.datasets import (
    Images,
    TrainSampler,
    available_workers,
    classification_files,
    eval_loader,
    list_classes,
    list_images,
    load_rgb,
    report_bad,
    train_loader,
)
from util.dist import Dist
from util.errors import UserError
from util.transforms import eval_transform, finetune_transform, linprobe_transform, pretrain_transform

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def env(rank: int = 0, world_size: int = 1, per_node: int = 1) -> Dist:
    return Dist(torch.device("cpu"), rank, 0, world_size, per_node)


# decoding

PHOTO = Image.fromarray(skimage.data.astronaut()).resize((60, 40))
GREY = PHOTO.convert("L")


def transparent_palette() -> Image.Image:
    image = PHOTO.convert("P", palette=Image.Palette.ADAPTIVE)
    image.info["transparency"] = 3
    return image


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


MODES = {
    "RGB.png": lambda: PHOTO,
    "RGB.jpg": lambda: PHOTO,
    "L.png": lambda: GREY,
    "L.jpg": lambda: GREY,
    "P.png": lambda: PHOTO.convert("P"),
    "P-transparent.png": transparent_palette,
    "RGBA.png": lambda: with_alpha(PHOTO),
    "LA.png": lambda: with_alpha(GREY),
    "CMYK.jpg": lambda: PHOTO.convert("CMYK"),
    "1.png": lambda: GREY.convert("1"),
    "RGB.webp": lambda: PHOTO,
    "RGB.ppm": lambda: PHOTO,
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb_as_pillow_converts_it(name, tmp_path):
    path = tmp_path / name
    MODES[name]().save(path)
    with Image.open(path) as stored:
        assert stored.mode == name.split(".")[0].split("-")[0]  # the file is what the test claims
        expected = np.asarray(stored.convert("RGB"))
    image = load_rgb(str(path))
    assert image.mode == "RGB" and image.size == (60, 40)
    assert np.array_equal(np.asarray(image), expected)
    assert expected.std() > 20


# pixel values 0 to 65535; Pillow's convert("RGB") turns all above 255 white
RAMP = np.linspace(0, 65535, 64 * 8).astype(np.uint16).reshape(8, 64)


def write_pgm(path):
    path.write_bytes(b"P5 64 8 65535\n" + RAMP.astype(">u2").tobytes())


WIDE = {
    "grey.png": lambda path: Image.fromarray(RAMP).save(path),
    "grey.tiff": lambda path: Image.fromarray(RAMP).save(path),
    "big-endian.tiff": lambda path: Image.frombytes("I;16B", (64, 8), RAMP.astype(">u2").tobytes()).save(path),
    "grey.pgm": write_pgm,
}


@pytest.mark.parametrize("name", WIDE)
def test_16_bit_grey_is_scaled_not_clipped(name, tmp_path):
    path = tmp_path / name
    WIDE[name](path)
    image = np.asarray(load_rgb(str(path)))
    assert image.shape == (8, 64, 3)
    assert (image == image[:, :, :1]).all()
    assert np.abs(image[:, :, 0] - RAMP / 257).max() <= 0.5 + 1e-6
    assert np.unique(image).size == 256


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it by 90 degrees
    PHOTO.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    PHOTO.save(tmp_path / "plain.jpg", quality=95)
    turned = load_rgb(str(tmp_path / "turned.jpg"))
    assert turned.size == (60, 40)
    assert np.array_equal(np.asarray(turned), np.asarray(load_rgb(str(tmp_path / "plain.jpg"))))


# files that cannot be decoded


def break_file(path, how="truncated"):
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "noise": b"no image at all" * 9, "empty": b""}[how])


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.fixture
def six(tmp_path):
    """Files 0.png to 5.png with labels 0 to 5."""
    for i in range(6):
        write_image(tmp_path / f"{i}.png", i)
    return [(str(tmp_path / f"{i}.png"), i) for i in range(6)]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["truncated", "noise", "empty"])
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_broken_file_is_named_in_a_clean_message(kind, how, workers, tmp_path):
    path = tmp_path / f"broken.{kind}"
    write_image(path, 0, (128, 128))
    break_file(path, how)
    loader = DataLoader(Images([(str(path), 0)], to_tensor), num_workers=workers)
    iterator = iter(loader)
    with pytest.raises(UserError) as error:
        next(iterator)
    message = error.value.message
    error.value.__traceback__ = None
    del error, iterator  # with the last reference the worker ends at once; the garbage collector would wait for it
    assert message.startswith(f"cannot decode {path} (") and "--skip_bad_images" in message
    # a worker's exception arrives with the worker's traceback in its text
    assert "Traceback" not in message and "\n" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_files_are_replaced_by_the_next_good_one_and_listed(workers, six, tmp_path):
    for i in (1, 2, 5):
        break_file(tmp_path / f"{i}.png")
    dataset = Images(six, to_tensor, skip_bad=True)
    loader = eval_loader(dataset, 2, env(), sharded=False, num_workers=workers, pin_mem=False)
    imgs, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert labels.tolist() == [0, 3, 3, 3, 4, 0]  # the label goes with its image
    for img, label in zip(imgs, labels, strict=True):
        assert torch.equal(img, to_tensor(load_rgb(six[label][0])))
    with project_log() as lines:
        report_bad(dataset)
        report_bad(dataset)  # nothing new: nothing to say
    assert len(lines) == 1 and "skipped 3 images" in lines[0]
    assert all((six[i][0] in lines[0]) == (i in (1, 2, 5)) for i in range(6))


def test_skipped_files_of_training_workers_are_listed_every_epoch(six, tmp_path):
    break_file(tmp_path / "4.png")
    dataset = Images(six, to_tensor, skip_bad=True)
    sampler = TrainSampler(6, 2, 1, env(), seed=0)
    loader = train_loader(dataset, sampler, num_workers=2, pin_mem=False)
    for epoch in range(2):  # the workers live on
        sampler.set_epoch(epoch)
        assert sum(len(labels) for _, labels in loader) == 6
        assert dataset.take_bad() == [six[4][0]]


def test_skipping_gives_up_where_nothing_is_good(six, tmp_path):
    for i in range(6):
        break_file(tmp_path / f"{i}.png", "noise")
    with pytest.raises(UserError, match="none of the 6 images can be decoded"):
        Images(six, to_tensor, skip_bad=True)[3]


# listing


def names(files, root):
    return [os.path.relpath(path, root) for path, _ in files]


def test_flat_folder_is_listed_in_order_without_labels(tmp_path):
    for i in (10, 9, 1):
        write_image(tmp_path / f"{i}.png", i)
    files = list_images(tmp_path)
    assert names(files, tmp_path) == ["1.png", "10.png", "9.png"]
    assert {label for _, label in files} == {-1}


def test_nested_tree_is_listed_at_any_depth_and_linked_folders_followed(tmp_path):
    for i, name in enumerate(["a/b/c/x.png", "a/y.JPEG", "z.jpg"]):
        write_image(tmp_path / "tree" / name, i)
    write_image(tmp_path / "elsewhere" / "w.webp", 3)
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree" / "notes.txt").write_text("no image")
    found = names(list_images(tmp_path / "tree"), tmp_path / "tree")
    assert sorted(found) == ["a/b/c/x.png", "a/y.JPEG", "link/w.webp", "z.jpg"]


def test_hidden_files_and_folders_are_skipped_without_labels(tmp_path):
    for i, name in enumerate(["seen.png", ".hidden.png", ".thumbnails/small.png"]):
        write_image(tmp_path / name, i)
    assert names(list_images(tmp_path), tmp_path) == ["seen.png"]


def test_hidden_files_and_folders_are_skipped_with_labels(tmp_path):
    for i, name in enumerate(["ant/seen.png", "ant/._seen.png", ".cache/small.png"]):
        write_image(tmp_path / name, i)
    files, classes = list_classes(tmp_path)
    assert classes == ["ant"] and names(files, tmp_path) == ["ant/seen.png"]


def test_labels_count_the_sorted_class_names(tmp_path):
    write_image_folder(tmp_path, n_train=2, n_val=1, classes=("cat", "ant", "bee"))
    train, val = classification_files(str(tmp_path), 3, with_train=True)
    expected = {"ant": 0, "bee": 1, "cat": 2}
    assert [(name.split("/")[1], label) for name, (_, label) in zip(names(train, tmp_path), train, strict=True)] == [
        (name, label) for name, label in expected.items() for _ in range(2)
    ]
    assert [label for _, label in val] == [0, 1, 2]


# order


# one optimizer step of 24 images, made up in different ways: (batch_size, accum_iter, world_size)
FACTORS = [(24, 1, 1), (12, 2, 1), (6, 2, 2), (4, 1, 6), (3, 4, 2), (1, 3, 8)]


def steps_of(n_images, batch_size, accum_iter, world_size, epoch=0, seed=0):
    """[optimizer step][rank] -> keys."""
    samplers = [
        TrainSampler(n_images, batch_size, accum_iter, env(rank, world_size), seed) for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in samplers]
    assert all(len(of_rank) == len(sampler) for of_rank, sampler in zip(batches, samplers, strict=True))
    assert all(len(of_rank) % accum_iter == 0 for of_rank in batches)  # an epoch ends on a full optimizer step
    assert all(len(batch) == batch_size for of_rank in batches for batch in of_rank)
    return [
        [sum(of_rank[first : first + accum_iter], []) for of_rank in batches]
        for first in range(0, len(batches[0]), accum_iter)
    ]


@pytest.mark.parametrize("factors", FACTORS)
def test_ranks_are_disjoint_and_steps_the_same_for_equal_products(factors):
    whole = steps_of(100, 24, 1, 1, epoch=3)
    steps = steps_of(100, *factors, epoch=3)
    assert len(steps) == len(whole) == 4  # 100 // 24: the incomplete step is dropped
    for step, (reference,) in zip(steps, whole, strict=True):
        keys = [key for of_rank in step for key in of_rank]
        assert len(set(keys)) == len(keys) == 24
        assert sorted(keys) == sorted(reference)
    # no image twice in an epoch
    assert len({key for (reference,) in whole for key in reference}) == 96


@pytest.mark.parametrize(
    ("n_images", "batch_size", "accum_iter", "world_size", "expected"),
    [(24, 8, 1, 1, 3), (31, 8, 1, 1, 3), (32, 8, 1, 1, 4), (31, 8, 2, 1, 2), (31, 4, 3, 2, 3), (48, 4, 3, 2, 6)],
)
def test_number_of_batches_drops_the_incomplete_step(n_images, batch_size, accum_iter, world_size, expected):
    assert len(TrainSampler(n_images, batch_size, accum_iter, env(0, world_size), 0)) == expected


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        return [index for step in steps_of(50, 10, 1, 1, epoch, seed) for _, index in step[0]]

    assert order(0, 0) == order(0, 0)
    assert sorted(order(0, 0)) == list(range(50)) != order(0, 0)
    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)
    assert {epoch for step in steps_of(50, 10, 1, 1, epoch=7) for epoch, _ in step[0]} == {7}


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 7

    def __getitem__(self, index):
        return index


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 9])
def test_sharded_evaluation_covers_every_image_once(world_size):
    shares = []
    for rank in range(world_size):
        loader = eval_loader(Numbers(), 2, env(rank, world_size), sharded=True, num_workers=0, pin_mem=False)
        shares.append([i for batch in loader for i in batch.tolist()])
    assert sorted(sum(shares, [])) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_rank_without_images_evaluates_nothing_with_workers_too():
    loader = eval_loader(Numbers(), 2, env(8, 9), sharded=True, num_workers=1, pin_mem=False)
    assert list(loader) == []


def test_unsharded_evaluation_gives_every_rank_all_images_in_order():
    loader = eval_loader(Numbers(), 2, env(1, 2), sharded=False, num_workers=0, pin_mem=False)
    assert [i for batch in loader for i in batch.tolist()] == list(range(7))


# workers

TRAINING = {
    "pretrain": lambda size: pretrain_transform(size, crop_min=0.2, hflip=0.5),
    "linprobe": lambda size: linprobe_transform(size, crop_min=0.08, hflip=0.5),
    "finetune": lambda size: finetune_transform(size, None, "rand-m9-mstd0.5-inc1", 0.25, "pixel", 1),
    "colour jitter": lambda size: finetune_transform(size, 0.4, None, 0.25, "rand", 2),
}


@pytest.mark.parametrize("name", TRAINING)
def test_batches_are_the_same_for_any_number_of_workers(name, tmp_path):
    files = list_images(write_image_folder(tmp_path, n_train=6, n_val=1) / "train")
    runs = []
    for workers in (0, 1, 2):
        dataset = Images(files, TRAINING[name](32), seed=5)
        sampler = TrainSampler(len(files), 3, 2, env(), seed=5)
        loader = train_loader(dataset, sampler, workers, pin_mem=False)
        torch.manual_seed(workers)  # state from outside must not matter
        np.random.seed(workers)
        epochs = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            epochs.append([imgs for imgs, _ in loader])
        runs.append(torch.stack([torch.stack(batches) for batches in epochs]))
    assert runs[0].shape == (2, 6, 3, 3, 32, 32)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0][0], runs[0][1])


def test_augmentation_depends_on_seed_epoch_and_image(six):
    def item(seed, epoch, index):
        return Images([six[0]] * 2, TRAINING["pretrain"](32), seed)[epoch, index][0]

    first = item(0, 0, 0)
    assert torch.equal(first, item(0, 0, 0))
    assert not any(torch.equal(first, other) for other in (item(1, 0, 0), item(0, 1, 0), item(0, 0, 1)))


@pytest.mark.parametrize(("asked", "per_node", "given"), [(10, 1, 4), (10, 2, 2), (10, 8, 1), (3, 1, 3), (0, 8, 0)])
def test_workers_are_capped_at_the_process_s_share_of_the_cores(asked, per_node, given, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    with project_log() as lines:
        assert available_workers(asked, env(world_size=16, per_node=per_node)) == given
    assert len(lines) == (asked != given)
    assert all(f"--num_workers {asked}" in line and f" {given}:" in line for line in lines)


# transforms for training


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
        red, green = (transform(image)[:2] * STD[:2, None, None] + MEAN[:2, None, None]) * 255
        side = red.shape[-1]
        box = []
        for coordinate in (red.mean(dim=0), green.mean(dim=1)):
            extent = (coordinate[-2] - coordinate[1]).abs() * side / (side - 3)
            box += [coordinate.mean() - extent / 2 + 0.5, extent]
        found.append(torch.stack(box))
    return torch.stack(found).numpy()


def test_pretraining_crops_20_to_100_percent_of_the_area():
    left, width, top, height = boxes(TRAINING["pretrain"](64)).T
    share, ratio = width * height / 256**2, width / height
    assert 0.2 * 0.97 < share.min() < 0.25 and 0.9 < share.max() < 1.02
    assert 0.5 < share.mean() < 0.6  # draws of a large area that do not fit are drawn again
    assert 0.75 * 0.97 < ratio.min() < 0.82 and 1.22 < ratio.max() < 4 / 3 * 1.03
    assert min(left.min(), top.min()) > -1.5 and max((left + width).max(), (top + height).max()) < 257.5


PLAIN = {**TRAINING, "finetune": lambda size: finetune_transform(size, None, None, 0, "pixel", 1)}


@pytest.mark.parametrize("name", ["pretrain", "linprobe", "finetune"])
def test_training_flips_half_of_the_images(name):
    transform = PLAIN[name](32)
    torch.manual_seed(0)
    image = position_image()
    flipped = sum((red := transform(image)[0])[:, 0].mean() > red[:, -1].mean() for _ in range(200))
    assert 70 < flipped < 130


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
    centres = torch.stack([transform(narrow)[0].mean() * STD[0] + MEAN[0] for _ in range(100)])
    assert centres.std() > 0.1  # torchvision's would take the centre each time


@pytest.mark.parametrize("make", [pretrain_transform, linprobe_transform])
def test_least_area_and_flip_can_be_chosen(make):
    left, width, top, height = boxes(make(64, crop_min=0.5, hflip=0.0), n=100).T
    assert 0.5 * 0.93 < (width * height).min() / 256**2 < 0.6
    transform, image = make(32, crop_min=0.5, hflip=0.0), position_image()
    assert all((red := transform(image)[0])[:, 0].mean() < red[:, -1].mean() for _ in range(50))
    transform = make(32, crop_min=0.5, hflip=1.0)
    assert all((red := transform(image)[0])[:, 0].mean() > red[:, -1].mean() for _ in range(50))


def test_strongest_auto_augment_takes_every_image():
    # at magnitude 10 posterize keeps 0 bits, which new releases of Pillow refuse
    rng.seed_sample(0, 0, 0)
    transform = finetune_transform(32, None, "rand-m10-n4-inc1", 0, "pixel", 1)
    images = torch.stack([transform(PHOTO) for _ in range(60)])
    assert images.isfinite().all() and images.std(dim=0).min() > 0


def test_random_erasing_fills_boxes_of_some_images():
    torch.manual_seed(0)
    white = Image.new("RGB", (32, 32), "white")
    transform = finetune_transform(32, None, None, 0.25, "const", 1)
    erased = sum((transform(white) == 0).any().item() for _ in range(200))
    assert 30 < erased < 70


def test_colour_jitter_is_left_out_with_auto_augment():
    with_aa = finetune_transform(32, 0.4, "rand-m9-mstd0.5-inc1", 0, "pixel", 1)
    without = finetune_transform(32, 0.4, None, 0, "pixel", 1)
    assert "ColorJitter" not in str(with_aa) and "RandAugment" in str(with_aa)
    assert "ColorJitter" in str(without) and "RandAugment" not in str(without)


@pytest.mark.parametrize("name", TRAINING)
def test_training_transforms_take_rectangles(name):
    assert TRAINING[name]((32, 48))(PHOTO).shape == (3, 32, 48)


# transform for evaluation


def by_hand(image, resized, crop):
    """Pillow's bicubic to `resized` (height, width), the centre of `crop` (height, width), normalised."""
    image = image.resize((resized[1], resized[0]), Image.Resampling.BICUBIC)
    top, left = round((resized[0] - crop[0]) / 2), round((resized[1] - crop[1]) / 2)
    image = image.crop((left, top, left + crop[1], top + crop[0]))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return (pixels - MEAN[:, None, None]) / STD[:, None, None]


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
    result = eval_transform(size)(photo)
    expected = by_hand(photo, resized, crop)
    assert result.shape == (3, *crop)
    assert torch.allclose(result, expected, atol=1e-6)


def test_evaluation_of_an_upright_photograph_resizes_its_width():
    photo = Image.fromarray(skimage.data.coffee()).transpose(Image.Transpose.ROTATE_90)
    assert torch.allclose(eval_transform(224)(photo), by_hand(photo, (384, 256), (224, 224)), atol=1e-6)


def test_evaluation_draws_nothing(six):
    dataset = Images(six, eval_transform(32))
    assert torch.equal(dataset[2][0], dataset[2][0])


@pytest.mark.parametrize("bits", [0, 1, 4, 8])
def test_posterize_takes_the_bits_that_randaugment_draws(bits):
    """Pillow 13 refuses 0 bits, which timm's increasing policy draws; older ones gave black."""
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    levels = np.asarray(auto_augment.NAME_TO_OP["PosterizeIncreasing"](grey, bits))
    expected = np.asarray(grey) & (0xFF << (8 - bits) & 0xFF)
    assert (levels == expected).all()


def test_a_link_to_a_folder_above_does_not_multiply_the_images(tmp_path):
    write_image(tmp_path / "photos" / "a" / "0.png", 0)
    (tmp_path / "photos" / "a" / "up").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "elsewhere").symlink_to(tmp_path / "more")
    write_image(tmp_path / "more" / "1.png", 1)
    assert [os.path.basename(path) for path, _ in list_images(tmp_path / "photos")] == ["0.png", "1.png"]
