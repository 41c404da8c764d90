"""Images: listing, broken files, order and loaders."""

import gc
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import socket
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ON_CPU, project_log, write_image, write_image_folder
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, ToTensor

from util import dist
from util.data.datasets import Images, PackedFiles, TrainSampler, report_bad
from util.data.listing import classification_files, list_classes, list_images
from util.data.loader import DeviceLoader, eval_loader, normalise, train_loader
from util.data.readers import pretraining_images
from util.data.workers import available_workers, open_loader
from util.dist import Dist
from util.errors import UserError
from util.run.exits import Stopped
from util.transforms import eval_transform, finetune_transform, linprobe_transform, pretrain_transform


def env(rank: int = 0, world_size: int = 1, per_node: int = 1) -> Dist:
    return Dist(torch.device("cpu"), rank, 0, world_size, per_node)


# files that cannot be decoded


def break_file(path, how="truncated"):
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "noise": b"no image at all" * 9, "empty": b""}[how])


def as_it_is(pixels):
    return pixels.permute(1, 2, 0).contiguous(), False


def normalised(path):
    """[3, H, W]: the whole image, decoded by Pillow."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
    return normalise(pixels[None], torch.tensor([False]))[0]


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
    images = Images([(str(path), 0)], as_it_is)
    iterator = iter(eval_loader(images, 1, env(), sharded=False, num_workers=workers, pin_mem=False))
    with pytest.raises(UserError) as error:
        next(iterator)
    message = error.value.message
    error.value.__traceback__ = None
    del error, iterator  # with the last reference the worker ends at once; the garbage collector would wait for it
    assert message.startswith(f"cannot decode {path} (") and "--skip_bad_images" in message
    assert "Traceback" not in message and "\n" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_files_are_replaced_by_the_next_good_one_and_listed(workers, six, tmp_path):
    for i in (1, 2, 5):
        break_file(tmp_path / f"{i}.png")
    dataset = Images(six, as_it_is, skip_bad=True)
    loader = eval_loader(dataset, 2, env(), sharded=False, num_workers=workers, pin_mem=False)
    imgs, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert labels.tolist() == [0, 3, 3, 3, 4, 0]  # the label goes with its image
    for img, label in zip(imgs, labels, strict=True):
        assert torch.equal(img, normalised(six[label][0]))
    with project_log() as lines:
        report_bad(dataset)
        report_bad(dataset)  # nothing new: nothing to say
    assert len(lines) == 1 and "skipped 3 images" in lines[0]
    assert all((six[i][0] in lines[0]) == (i in (1, 2, 5)) for i in range(6))


def test_skipped_files_of_training_workers_are_listed_every_epoch(six, tmp_path):
    break_file(tmp_path / "4.png")
    dataset = Images(six, as_it_is, skip_bad=True)
    sampler = TrainSampler(6, 2, 1, env(), seed=0)
    loader = train_loader(dataset, sampler, num_workers=2, pin_mem=False)
    for epoch in range(2):  # the workers live on
        sampler.set_epoch(epoch)
        assert sum(len(labels) for _, labels in loader) == 6
        assert dataset.take_bad() == [six[4][0]]


def test_picture_of_one_line_is_refused_before_it_takes_gigabytes(tmp_path):
    """Its shorter side would be resized to 256, and the other to 256 times as many pixels."""
    Image.new("L", (1, 1001)).save(tmp_path / "line.png")
    with pytest.raises(UserError, match="line.png.*1 x 1001 pixels"):
        Images([(str(tmp_path / "line.png"), 0)], eval_transform(16))[0]
    Image.new("L", (1000, 1)).save(tmp_path / "line.png")
    assert Images([(str(tmp_path / "line.png"), 0)], eval_transform(16))[0][0].shape == (16, 16, 3)


def test_skipping_gives_up_where_nothing_is_good(six, tmp_path):
    for i in range(6):
        break_file(tmp_path / f"{i}.png", "noise")
    with pytest.raises(UserError, match="none of the 6 images can be decoded"):
        Images(six, as_it_is, skip_bad=True)[3]


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


def test_a_link_to_a_folder_above_does_not_multiply_the_images(tmp_path):
    write_image(tmp_path / "photos" / "a" / "0.png", 0)
    (tmp_path / "photos" / "a" / "up").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "elsewhere").symlink_to(tmp_path / "more")
    write_image(tmp_path / "more" / "1.png", 1)
    assert [os.path.basename(path) for path, _ in list_images(tmp_path / "photos")] == ["0.png", "1.png"]


def test_files_come_in_the_order_of_a_walk_from_the_top(tmp_path):
    """The order decides which image a run sees when, so that a run can go on after an update."""
    draw = random.Random(0)
    for _ in range(60):
        parts = [draw.choice(("a", "b", "a.b", "ä", "B", "10", "9")) for _ in range(draw.randint(0, 4))]
        folder = tmp_path.joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / draw.choice(("x.png", "q", "a.JPG", "z.jpeg", "ä.bmp", "a.txt"))).write_bytes(b"")
    expected = []
    for folder, folders, files in os.walk(tmp_path):
        folders.sort()
        expected += [os.path.join(folder, name) for name in sorted(files) if name not in ("q", "a.txt")]
    assert len(expected) > 20 and [path for path, _ in list_images(tmp_path)] == expected


def link_to_each_other(root):
    (root / "a" / "other").symlink_to("../b")
    (root / "b" / "other").symlink_to("../a")


def link_in_a_ring_of_three(root):
    for name, target in (("a", "b"), ("b", "c"), ("c", "a")):
        (root / name / "next").symlink_to(f"../{target}")


def link_upwards(root):
    for name in "abc":
        (root / name / "up").symlink_to(root)
        (root / name / "far up").symlink_to(root.parent)
        (root / name / "itself").symlink_to(".")


def two_names(root):
    write_image(root.parent / "real" / "deep" / "8.png", 8)
    for name in "abc":
        (root / name / "again").symlink_to(root.parent / "real")
        (root / name / "and again").symlink_to(root.parent / "real" / "deep")


@pytest.mark.parametrize("links", [link_to_each_other, link_in_a_ring_of_three, link_upwards, two_names])
def test_each_real_folder_is_listed_once_a_class(links, tmp_path):
    root = tmp_path / "train"
    for i, name in enumerate("abc"):
        write_image(root / name / f"{i}.png", i)
    links(root)
    found = sorted(os.path.basename(path) for path, _ in list_images(root))
    assert found == ["0.png", "1.png", "2.png"] + (["8.png"] if links is two_names else [])
    files, _ = list_classes(root)
    for label in range(3):
        real = [os.path.realpath(path) for path, of in files if of == label]
        assert len(real) == len(set(real)) and str(root / "abc"[label] / f"{label}.png") in real


@pytest.fixture
def outside():
    """A folder that others than root may enter, which root's tests become: nothing is forbidden to root itself."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    before = os.geteuid()
    yield root, (lambda: os.seteuid(65534)) if before == 0 else lambda: None
    os.seteuid(before)
    for folder, *_ in os.walk(root):
        os.chmod(folder, 0o755)
    shutil.rmtree(root)


FORBIDDEN = [["train/ant"], ["train/bee/deep"], ["train/ant", "train/cat", "val/bee"], ["val"], ["train"]]


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o311], ids=oct)
@pytest.mark.parametrize("folders", FORBIDDEN, ids=str)
def test_folders_that_may_not_be_read_are_all_named(folders, mode, outside):
    root, become_somebody = outside
    write_image_folder(root, n_train=1, n_val=1)
    write_image(root / "train/bee/deep/0.png", 0)
    for folder in folders:
        # others' rights, where the tests are root's
        (root / folder).chmod(mode)
    become_somebody()
    with pytest.raises(UserError, match=f"{len(folders)} folders cannot be read: ") as error:
        classification_files(str(root), 3, with_train=True)
    assert all(f"{root / folder} (Permission denied)" in error.value.message for folder in folders)
    in_train = [folder for folder in folders if folder.startswith("train")]
    if in_train:
        with pytest.raises(UserError, match=f"{len(in_train)} folders cannot be read: "):
            pretraining_images(str(root), "", "train", as_it_is, env(), 0, False)


def test_a_folder_that_cannot_be_reached_is_not_said_to_be_missing(outside):
    root, become_somebody = outside
    write_image_folder(root / "data", n_train=1, n_val=1)
    (root / "link").mkdir()
    write_image(root / "link" / "a" / "0.png", 0)
    (root / "link" / "a" / "b").symlink_to(root / "data" / "train")
    (root / "data").chmod(0)
    become_somebody()
    with pytest.raises(UserError, match=r"no folder .*data/val \(Permission denied\)"):
        classification_files(str(root / "data"), 3, with_train=True)
    with pytest.raises(UserError, match="1 folders cannot be read: .*data .Permission denied"):
        pretraining_images(str(root / "data"), "", "train", as_it_is, env(), 0, False)
    with pytest.raises(UserError, match="1 folders cannot be read: .*link/a/b .Permission denied"):
        list_images(root / "link")


def test_a_link_to_nowhere_is_not_left_out(tmp_path):
    write_image(tmp_path / "val" / "0.png", 0)
    (tmp_path / "val" / "1.png").symlink_to("nowhere")
    (tmp_path / "val" / "2.png").symlink_to("2.png")
    files = list_images(tmp_path / "val")
    assert names(files, tmp_path / "val") == ["0.png", "1.png", "2.png"]
    for i in (1, 2):
        with pytest.raises(UserError, match=f"cannot decode .*val/{i}.png .*--skip_bad_images"):
            Images(files, as_it_is)[i]
    (tmp_path / "train").symlink_to("nowhere")
    with pytest.raises(UserError, match="no folder .*train .No such file"):  # and not: trained on val/
        pretraining_images(str(tmp_path), "", "train", as_it_is, env(), 0, False)


def test_what_is_no_regular_file_is_left_out_and_counted(tmp_path):
    write_image(tmp_path / "a" / "0.png", 0)
    (tmp_path / "a" / "1.png").symlink_to("0.png")
    os.mkfifo(tmp_path / "a" / "2.jpg")
    (tmp_path / "a" / "3.jpg").symlink_to("2.jpg")
    (tmp_path / "a" / "4.jpg").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "a")  # its name may be 108 bytes long
        server.bind("5.png")
        with project_log() as lines:
            assert names(list_images(tmp_path), tmp_path) == ["a/0.png", "a/1.png"]
    assert len(lines) == 1 and "4 pipes, sockets or devices" in lines[0]


def test_what_is_left_out_is_counted_in_one_line(tmp_path):
    write_image_folder(tmp_path, n_train=1, n_val=1, classes=("ant",))
    for name in (
        ["x.jfif"] * 1 + [f"{i}.JFIF" for i in range(9)] + ["Thumbs.db", "README", "\udcff\x1b.j\x1b[2Jpg", ".DS_Store"]
    ):
        (tmp_path / "train" / "ant" / name).write_bytes(b"")
    write_image(tmp_path / "train" / "loose.png", 0)
    with project_log() as lines:
        files, _ = classification_files(str(tmp_path), 1, with_train=True)
    assert len(files) == 1 and len(lines) == 1
    for words in ("10 ending in .jfif", "1 ending in .db", "1 without an ending", "1 ending in .j\\x1b[2jpg",
                  "1 hidden", "1 images in no class folder", "Images are files ending in .jpg .jpeg .png"):  # fmt: skip
        assert words in lines[0]
    with project_log() as lines:
        list_images(tmp_path / "val")
    assert not lines  # nothing to say
    (tmp_path / "train" / "ant" / "0.png").unlink()
    with pytest.raises(UserError, match=r"hold no image, such as 'ant'.*files ending in \.jpg \.jpeg \.png"):
        list_classes(tmp_path / "train")
    with pytest.raises(UserError, match=r"no images below .*files ending in \.jpg \.jpeg \.png"):
        list_images(tmp_path / "train" / "ant")


# names

NAMES = {  # what is on the disk: what is shown
    b"bad\xe9.png": "bad\\xe9.png",
    b"\x1b[2Jgone.png": "\\x1b[2Jgone.png",
    b"two\nlines\r.png": "two\\nlines\\r.png",
    "schön 日本.png".encode(): "schön 日本.png",
    "\u202egnp.exe.png".encode(): "\\u202egnp.exe.png",
    "\x9b31m.png".encode(): "\\x9b31m.png",
}


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_odd_names_are_shown_escaped_and_never_lost(name, tmp_path):
    folder = os.fsencode(tmp_path)
    with open(os.path.join(folder, name), "wb") as file:
        file.write(b"\x89PNGxxxx")
    write_image(tmp_path / "good.png", 0)
    shown = f"{tmp_path}/{NAMES[name]}"
    shown.encode()  # any file of UTF-8 takes it
    files = list_images(tmp_path)
    index = next(i for i in (0, 1) if not files[i][0].endswith("good.png"))
    with pytest.raises(UserError) as error:
        Images(files, as_it_is)[index]
    assert error.value.message.startswith(f"cannot decode {shown} (") and error.value.message.isprintable()
    images = Images(files, as_it_is, skip_bad=True)
    images[index]
    with project_log() as lines:
        report_bad(images)
    assert lines[0].endswith(f":\n  {shown}")
    os.makedirs(os.path.join(folder, b"d", name))
    for look in (list_images, list_classes):
        with pytest.raises(UserError) as error:
            look(os.fsdecode(os.path.join(folder, b"d", name)))
        assert error.value.message.isprintable() and NAMES[name] in error.value.message


def test_words_of_a_decoder_are_bounded_and_escaped(tmp_path, monkeypatch):
    write_image(tmp_path / "0.png", 0)

    def fail(_):
        raise OSError("\x1b]0;title\x07" * 1000)

    monkeypatch.setattr("util.data.datasets.decode", fail)
    with pytest.raises(UserError) as error:
        Images(list_images(tmp_path), as_it_is)[0]
    assert error.value.message.isprintable() and len(error.value.message) < 1000


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
        return torch.zeros(1, 1, 3, dtype=torch.uint8), False, index


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 9])
def test_sharded_evaluation_covers_every_image_once(world_size):
    shares = []
    for rank in range(world_size):
        loader = eval_loader(Numbers(), 2, env(rank, world_size), sharded=True, num_workers=0, pin_mem=False)
        shares.append([i for _, labels in loader for i in labels.tolist()])
    assert sorted(sum(shares, [])) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_rank_without_images_evaluates_nothing_with_workers_too():
    loader = eval_loader(Numbers(), 2, env(8, 9), sharded=True, num_workers=1, pin_mem=False)
    assert list(loader) == []


def test_unsharded_evaluation_gives_every_rank_all_images_in_order():
    loader = eval_loader(Numbers(), 2, env(1, 2), sharded=False, num_workers=0, pin_mem=False)
    assert [i for _, labels in loader for i in labels.tolist()] == list(range(7))


# workers

TRAINING = {
    "pretrain": lambda size: pretrain_transform(size, crop_min=0.2, hflip=0.5),
    "linprobe": lambda size: linprobe_transform(size, crop_min=0.08, hflip=0.5),
    "finetune": lambda size: finetune_transform(size, None, "rand-m9-mstd0.5-inc1"),
    "colour jitter": lambda size: finetune_transform(size, 0.4, None),
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


def test_a_loader_works_where_the_accelerator_is_no_cuda_one(six, monkeypatch):
    """On a Mac torch.cuda.stream(None) fails: it asks torch.mps for its current device, and there is none."""
    monkeypatch.setattr(torch._utils, "_get_available_device_type", lambda: "mps")
    loader = eval_loader(Images(six, as_it_is), 6, env(), sharded=False, num_workers=0, pin_mem=True)
    assert [labels.tolist() for _, labels in loader] == [[0, 1, 2, 3, 4, 5]]


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


@pytest.mark.parametrize(
    ("told", "cores"), [("max 100000", 4), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1), ("", 4)]
)
def test_a_container_s_quota_counts_as_cores(told, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(dist, "CPU_QUOTA", tmp_path / "cpu.max")
    assert dist.available_cores() == 4  # no such file
    (tmp_path / "cpu.max").write_text(told)
    assert dist.available_cores() == cores


def test_packed_files_are_the_list_they_were_made_of():
    files = [
        (os.fsdecode(name), label) for label, name in enumerate([b"/a/x.png", b"b", "/ü/日本.jpg".encode(), b"/\xff"])
    ]
    packed = PackedFiles(files)
    assert list(packed) == files and packed[-1] == files[-1] and packed[1:3] == files[1:3] and len(packed) == 4
    assert list(PackedFiles([])) == []
    with pytest.raises(IndexError):
        packed[4]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")
def test_a_forked_worker_shares_the_list_of_files():
    """Looking at 300,000 of them takes little memory of its own; as a list of tuples 60 MB."""
    images = Images([(f"/data/imagenet/train/n01440764/n01440764_{i}.JPEG", i) for i in range(300_000)], as_it_is)

    def own_megabytes() -> float:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) / 1000

    def look(answer) -> None:
        gc.freeze()
        before = own_megabytes()
        for i in range(len(images)):
            images.source.name(i)
        answer.put(own_megabytes() - before)

    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    worker = context.Process(target=look, args=(answer,))
    worker.start()
    assert answer.get(timeout=120) < 15
    worker.join()


def test_evaluation_draws_nothing(six):
    dataset = Images(six, eval_transform(32))
    assert torch.equal(dataset[2][0], dataset[2][0])


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_workers_may_be_spawned(context, six):
    """Python 3.14 and other systems than Linux do not fork: everything that workers need must travel by pickle."""
    dataset = Images(six, TRAINING["finetune"](32), skip_bad=True)
    keys = [[(0, 1), (0, 2)], [(0, 3), (0, 4)]]
    loader = open_loader(dataset, {"num_workers": 1, "multiprocessing_context": context}, batch_sampler=keys)
    here = DataLoader(dataset, batch_sampler=keys)
    for there, expected in zip(loader, here, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(there, expected, strict=True))


def test_normalising_is_the_libraries_own_arithmetic():
    pixels = torch.randint(0, 256, (4, 6, 5, 3), dtype=torch.uint8)
    mirror = torch.tensor([True, False, True, False])
    recipe = Compose([ToTensor(), Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    images = [Image.fromarray(image.numpy()) for image in pixels]
    expected = [recipe(ImageOps.mirror(image) if flip else image) for image, flip in zip(images, mirror, strict=True)]
    assert torch.equal(normalise(pixels, mirror), torch.stack(expected))


@pytest.mark.parametrize("name", ["pretrain", "finetune", "linprobe"])
def test_files_skipped_before_a_signal_are_listed(name, tmp_path, monkeypatch, capsys):
    images = write_image_folder(tmp_path / "images", n_train=4, n_val=1)
    break_file(bad := next((images / "train").rglob("*.png")))
    script = importlib.import_module(f"main_{name}")

    def stopped(*args, **_):
        loader = next(one for one in args if isinstance(one, DeviceLoader))
        assert len(list(loader)) > 0
        raise Stopped({signal.SIGTERM}, saved=True)

    monkeypatch.setattr(script, "train_one_epoch", stopped)
    model = "mae_vit_tiny_patch4" if name == "pretrain" else "vit_tiny_patch4"
    more = [] if name == "pretrain" else ["--nb_classes", 3]
    args = ("--data_path", images, "--model", model, "--input_size", 32, "--batch_size", 2, "--num_workers", 1, *more,
            "--skip_bad_images", "--output_dir", "", "--log_dir", "", *ON_CPU)  # fmt: skip
    with pytest.raises(Stopped):
        script.main(script.get_args_parser().parse_args([str(word) for word in args]))
    assert f"skipped 1 images that cannot be decoded:\n  {bad}\n" in capsys.readouterr().out
