"""--decode cuda: the same code with the CPU in the GPU's place, where its pixels must be those of the ordinary path."""

import io
import os
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.data
import torch
import torchvision.io
from helpers import project_log, run, write_image_folder
from PIL import Image

from util.data import gpu_decode, loader
from util.data.datasets import Images, TrainSampler
from util.data.gpu_decode import EncodedImages
from util.data.loader import train_loader
from util.dist import Dist
from util.errors import UserError
from util.transforms import finetune_transform, linprobe_transform, pretrain_transform

CPU = Dist(torch.device("cpu"))
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
RECIPES = {
    "pretrain": pretrain_transform(32, crop_min=0.2, hflip=0.5),
    "linprobe": linprobe_transform((32, 48), crop_min=0.08, hflip=0.5),
    "finetune": finetune_transform(32, None, None),
}


@pytest.fixture
def files(tmp_path):
    """JPEGs in RGB, grey and CMYK, a PNG, and a PNG that calls itself JPEG; labels 0 to 4."""
    photo = Image.fromarray(skimage.data.coffee()).resize((150, 100))
    contents = [
        ("a.jpg", photo, "jpeg"),
        ("b.jpg", photo.convert("L"), "jpeg"),
        ("c.jpg", photo.convert("CMYK"), "jpeg"),
    ]
    contents += [("d.png", photo, "png"), ("e.jpg", photo, "png")]
    for name, image, kind in contents:
        image.save(tmp_path / name, kind)
    return [(str(tmp_path / name), label) for label, (name, *_) in enumerate(contents)]


def batches(images, sampler, decode):
    """[(imgs, labels), ...] of one epoch; decode "cuda" leaves JPEGs encoded, and decodes them on the CPU."""
    if decode == "cpu":
        return list(train_loader(images, sampler, num_workers=0, pin_mem=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "check_gpu_decode", lambda *_: None)  # which would refuse the CPU
        return list(train_loader(images, sampler, num_workers=1, pin_mem=False, decode="cuda"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_draws_and_pixels_are_those_of_the_ordinary_path(recipe, files):
    images, sampler = Images(files * 3, RECIPES[recipe], seed=3), TrainSampler(15, 5, 1, CPU, seed=3)
    ours, expected = batches(images, sampler, "cuda"), batches(images, sampler, "cpu")
    assert len(ours) == len(expected) == 3
    for (imgs, labels), (expected_imgs, expected_labels) in zip(ours, expected, strict=True):
        assert torch.equal(labels, expected_labels)
        assert torch.equal(imgs, expected_imgs)


def test_a_batch_on_its_way_holds_few_file_descriptors(files):
    """A tensor for each JPEG would take one each: 256 for two batches of each of two workers."""
    resource = pytest.importorskip("resource")
    encoded = EncodedImages(Images(files[:2] * 160, RECIPES["pretrain"]))
    sampler = TrainSampler(320, 64, 1, CPU, seed=0)
    small_batches = torch.utils.data.DataLoader(
        encoded, batch_sampler=sampler, num_workers=2, collate_fn=encoded.collate, timeout=20
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 80, hard))
    try:
        assert sum(len(batch.keys) for batch in small_batches) == 320
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_only_jpegs_that_the_gpu_knows_stay_encoded(files):
    encoded = EncodedImages(Images(files, RECIPES["pretrain"]))
    boxes = [encoded[0, i][1] for i in range(5)]
    assert [box is not None for box in boxes] == [True, True, False, False, False]
    with open(files[0][0], "ab") as file:
        file.write(bytes(500))  # as some cameras do
    assert encoded[0, 0][1] == boxes[0]


def break_scan(path):
    """Cut the file behind its header: it tells a size, but does not decode."""
    data = open(path, "rb").read()
    open(path, "wb").write(data[: data.index(b"\xff\xda") + 40])
    assert Image.open(io.BytesIO(data)).size == (150, 100)


def test_a_broken_jpeg_is_named(files):
    break_scan(files[1][0])
    images = Images(files, RECIPES["pretrain"])
    with pytest.raises(UserError, match="cannot decode .*b.jpg"):
        EncodedImages(images)[0, 1]  # it is not left to the GPU
    with pytest.raises(UserError, match="cannot decode .*b.jpg"):
        batches(images, TrainSampler(5, 5, 1, CPU, seed=0), "cuda")


def test_a_broken_or_missing_file_is_replaced_and_listed(files, tmp_path):
    break_scan(files[1][0])
    (tmp_path / "d.png").unlink()
    images, sampler = Images(files, RECIPES["pretrain"], skip_bad=True), TrainSampler(5, 5, 1, CPU, seed=0)
    (imgs, labels), = batches(images, sampler, "cuda")  # fmt: skip
    assert sorted(labels.tolist()) == [0, 2, 2, 4, 4]
    assert images.take_bad() == [files[1][0], files[3][0]]
    assert torch.equal(imgs, batches(images, sampler, "cpu")[0][0])


def test_a_jpeg_that_fails_in_the_decoder_is_replaced_with_its_label(files):
    data = bytearray(open(files[1][0], "rb").read())
    codes = data.index(b"\xff\xc4") + 4  # of a Huffman table
    data[codes : codes + 20] = b"\xff" * 20
    open(files[1][0], "wb").write(data)
    images, sampler = Images(files, RECIPES["pretrain"], skip_bad=True), TrainSampler(5, 5, 1, CPU, seed=0)
    assert EncodedImages(images)[0, 1][1] is not None  # it is left to the GPU
    with project_log() as lines:
        (imgs, labels), = batches(images, sampler, "cuda")  # fmt: skip
    assert "decoded on the CPU, since the GPU cannot" in lines[-1]
    assert sorted(labels.tolist()) == [0, 2, 2, 3, 4]
    expected, expected_labels = batches(images, sampler, "cpu")[0]
    assert torch.equal(imgs, expected) and torch.equal(labels, expected_labels)


def patched(data: bytes, marker: bytes, at: int, new: bytes) -> bytes:
    place = data.index(marker) + at
    return data[:place] + new + data[place + len(new) :]


UNSURE = {
    "bytes to be skipped": lambda data: data.replace(b"\xff\xdb", b"\0\1\2\xff\xdb", 1),
    "too large": lambda data: patched(data, b"\xff\xc0", 5, b"\xff\xff\xff\xff"),
    "12 bits": lambda data: patched(data, b"\xff\xc0", 4, b"\x0c"),
    "arithmetic code": lambda data: patched(data, b"\xff\xc0", 1, b"\xc9"),
    "2 channels": lambda data: patched(data, b"\xff\xc0", 9, b"\x02"),
    "too many scans": lambda data: data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 200 + data[-2:],
}


@pytest.mark.parametrize("how", UNSURE)
def test_jpegs_that_may_be_another_size_or_kind_are_left_to_the_cpu(how, files):
    data = open(files[0][0], "rb").read()
    assert EncodedImages(Images(files, RECIPES["pretrain"]))[0, 0][1] is not None
    open(files[0][0], "wb").write(UNSURE[how](data))
    encoded = EncodedImages(Images(files, RECIPES["pretrain"], skip_bad=True))
    pixels, box, _, label, _ = encoded[0, 0]
    assert box is None and pixels.shape == (32, 32, 3)
    if how != "arithmetic code":  # in which any bits are an image
        assert label == (0 if how == "bytes to be skipped" else 1)
        assert len(encoded.images.take_bad()) == label


def test_a_crop_that_the_gpu_cannot_resize_is_left_to_the_cpu(files, monkeypatch):
    """CUDA's antialiasing kernel refuses what is made more than about 47 times smaller."""
    images, sampler = Images(files, RECIPES["pretrain"]), TrainSampler(5, 5, 1, CPU, seed=0)
    expected = batches(images, sampler, "cpu")

    def refuse(*_):
        raise RuntimeError("Too much shared memory required")

    monkeypatch.setattr(gpu_decode, "crop_and_resize", refuse)
    with project_log() as lines:
        (imgs, labels), = batches(images, sampler, "cuda")  # fmt: skip
    assert "decoded on the CPU, since the GPU cannot: Too much shared memory required" in lines[-1]
    assert torch.equal(imgs, expected[0][0]) and torch.equal(labels, expected[0][1])


def test_nvjpeg_waits_for_the_crops_before_it(monkeypatch):
    calls = []
    stream = SimpleNamespace(synchronize=lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torchvision.io, "decode_jpeg", lambda jpegs, **_: calls.append("decode"))
    gpu_decode._decode_jpegs([torch.zeros(1, dtype=torch.uint8)], torch.device("cuda"))
    assert calls == ["wait", "decode"]


@CUDA
def test_memory_that_is_still_to_be_read_is_not_decoded_into(files):
    jpeg, device = torch.from_numpy(np.fromfile(files[0][0], np.uint8)), torch.device("cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        blocks = [torch.full((3, 100, 150), 7, dtype=torch.uint8, device=device) for _ in range(64)]
        torch.cuda.synchronize()
        torch.cuda._sleep(10**8)  # device clocks: the sums below are not made before the host is in nvJPEG
        sums = torch.stack([block.sum() for block in blocks])
        del blocks
        gpu_decode._decode_jpegs([jpeg] * 64, device)
    torch.cuda.synchronize()
    assert sums.unique().tolist() == [7 * 3 * 100 * 150]


def test_a_torchvision_without_decoders_is_refused_before_the_first_step(files, monkeypatch):
    monkeypatch.delattr(torchvision.io, "decode_jpeg")
    on_gpu = TrainSampler(5, 5, 1, Dist(torch.device("cuda")), seed=0)
    with pytest.raises(UserError, match="which this version has no more: pass --decode cpu"):
        train_loader(Images(files, RECIPES["pretrain"]), on_gpu, 0, False, decode="cuda")


def test_what_cannot_work_is_refused_before_the_first_step(files, tmp_path):
    data = write_image_folder(tmp_path / "data", n_train=4)
    tiny = ("--data_path", data, "--device", "cpu", "--input_size", 32, "--output_dir", "", "--log_dir", "")
    done = run(
        "main_pretrain.py", *tiny, "--decode", "cuda", "--batch_size", 2, "--model", "mae_vit_tiny_patch4", code=2
    )
    assert "--decode cuda needs a CUDA GPU, but the device is cpu: pass --decode cpu" in done.stderr
    on_gpu = TrainSampler(5, 5, 1, Dist(torch.device("cuda")), seed=0)
    with pytest.raises(UserError, match="--aa"):
        train_loader(Images(files, finetune_transform(32, None, "rand-m9")), on_gpu, 0, False, decode="cuda")


@CUDA
def test_the_gpu_s_pixels_are_close_to_the_cpu_s(files):
    """nvJPEG rounds otherwise than libjpeg-turbo, and the GPU resizes in floating point."""
    images = Images(files * 3, RECIPES["pretrain"], seed=3)
    expected = batches(images, TrainSampler(15, 5, 1, CPU, seed=3), "cpu")
    sampler = TrainSampler(15, 5, 1, Dist(torch.device("cuda")), seed=3)
    for (imgs, labels), (expected_imgs, expected_labels) in zip(
        train_loader(images, sampler, 1, True, decode="cuda"), expected, strict=True
    ):
        assert torch.equal(labels.cpu(), expected_labels)
        levels = 255 * 0.225 * (imgs.cpu() - expected_imgs).abs()
        assert levels.mean() < 2 and levels.max() < 40
