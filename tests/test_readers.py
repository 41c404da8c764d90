"""--dataset: shards and datasets of every kind, written here, through timm's readers.

TensorFlow is no package of this project's tests; where it is installed (pip install tensorflow-cpu
tensorflow-datasets), its datasets are tested as well.
"""

import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ON_CPU, run, torchrun
from PIL import Image

from util.data.datasets import TrainSampler
from util.data.loader import eval_loader, train_loader
from util.data.readers import labelled_images, pretraining_images
from util.dist import Dist
from util.errors import UserError
from util.transforms import eval_transform, pretrain_transform

pytest.importorskip("webdataset")
pytest.importorskip("datasets")

CPU = torch.device("cpu")
SPLITS = (("train", 8, 10), ("val", 5, 7))  # shards, and images in each


def env(rank=0, world_size=1):
    return Dist(CPU, rank, 0, world_size)


def numbered(number: int) -> bytes:
    """A PNG of one grey level, which is its number."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (number,) * 3).save(file, "png")
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def write_shards(root: Path, split: str, n_shards: int, per_shard: int, info: dict, labels: int = 3) -> None:
    """Shards of numbered images with labels 0 to `labels` - 1, and their part of _info.json."""
    names = [f"{split}-{i:04d}.tar" for i in range(n_shards)]
    for i, name in enumerate(names):
        with tarfile.open(root / name, "w") as tar:
            for number in range(i * per_shard, (i + 1) * per_shard):
                add(tar, f"{number:06d}.png", numbered(number))
                add(tar, f"{number:06d}.cls", str(number % labels).encode())
    info[split] = {"name": split, "filenames": names, "shard_lengths": [per_shard] * n_shards,
                   "num_samples": n_shards * per_shard}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """WebDataset's, with the splits of SPLITS."""
    root, info = tmp_path_factory.mktemp("shards"), {}
    for split in SPLITS:
        write_shards(root, *split, info)
    (root / "_info.json").write_text(json.dumps({"splits": info}))
    return root


# streams


def write_parquet(path: Path, numbers_: range) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])})
    rows = {"image": [{"bytes": numbered(i), "path": None} for i in numbers_], "label": [i % 3 for i in numbers_]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))


def write_hugging_face_stream(root: Path) -> None:
    """Parquet files as on the hub, with a card that tells how many images there are."""
    card = {"dataset_info": {"splits": []}, "configs": [{"config_name": "default", "data_files": []}]}
    for split, n_shards, per_shard in SPLITS:
        for i in range(n_shards):
            write_parquet(
                root / f"{split}-{i:05d}-of-{n_shards:05d}.parquet", range(i * per_shard, (i + 1) * per_shard)
            )
        about = {"name": split, "num_examples": n_shards * per_shard, "num_bytes": 1}
        card["dataset_info"]["splits"].append(about)
        card["configs"][0]["data_files"].append({"split": split, "path": f"{split}-*"})
    (root / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")  # JSON is YAML


def write_tensorflow(root: Path) -> None:
    tfds = pytest.importorskip("tensorflow_datasets")
    features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(num_classes=3)}
    images = {
        split: [(i, {"image": io.BytesIO(numbered(i)), "label": i % 3}) for i in range(n_shards * per_shard)]
        for split, n_shards, per_shard in SPLITS
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name="mine", version="1.0.0", features=tfds.features.FeaturesDict(features), data_dir=root,
        split_datasets=images,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["wds", "hfids", "tfds"])
def stream(request, tmp_path_factory):
    """(--data_path, --dataset) of a stream of each kind, with the splits of SPLITS."""
    if request.param == "wds":
        yield request.getfixturevalue("shards"), "wds/mine"
        return
    root = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)  # else 5 s at the end of each pass
        if request.param == "hfids":
            write_hugging_face_stream(root)
            yield None, f"hfids/{root}"
        else:
            write_tensorflow(root)
            yield root, "tfds/mine"


def numbers(imgs: torch.Tensor) -> list[int]:
    """The numbers of normalised images."""
    return (imgs[:, 0].mean(dim=(1, 2)) * 0.229 * 255 + 0.485 * 255).round().int().tolist()


def validation(root, name, world_size, workers, sharded=True):
    """[(number, label) ...] of each rank."""
    shares = []
    for rank in range(world_size):
        here = env(rank, world_size)
        _, val = labelled_images(root, name, ("train", "val"), (None, eval_transform(8)), 3, here, sharded, 0, False)
        loader = eval_loader(val, 4, here, sharded, num_workers=workers, pin_mem=False)
        shares.append([pair for imgs, labels in loader for pair in zip(numbers(imgs), labels.tolist(), strict=True)])
    return shares


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 2), (3, 1), (2, 4)])
def test_sharded_evaluation_of_a_stream_sees_every_image_once(stream, world_size, workers):
    shares = validation(*stream, world_size, workers)
    assert sorted(sum(shares, [])) == [(number, number % 3) for number in range(35)]
    assert all(shares)


def test_unsharded_evaluation_gives_every_rank_all_images(stream):
    for share in validation(*stream, 2, 2, sharded=False):
        assert sorted(number for number, _ in share) == list(range(35))


def training(root, name, seed=0, epoch=0, rank=0, world_size=1, workers=0, first=0, batch_size=4):
    """The batches of one epoch: [[(number, pixel sum), ...], ...]."""
    here = env(rank, world_size)
    transform = pretrain_transform(8, 0.2, 0.5)
    stream = pretraining_images(root, name, "train", transform, here, seed, skip_bad=False)
    sampler = TrainSampler(len(stream), batch_size, 1, here, seed)
    sampler.set_epoch(epoch, first)
    loader = train_loader(stream, sampler, workers, pin_mem=False)
    assert len(loader) == 80 // (batch_size * world_size)
    return [numbers(imgs) for imgs, _ in loader]


def test_an_epoch_of_a_stream_takes_every_image_once_where_shards_divide(stream):
    """Two ranks with two workers: 8 shards make two for each worker, 5 batches of 4."""
    if stream[1].startswith("tfds"):
        pytest.skip("timm's reader of TensorFlow datasets mixes the end of a pass with the start of the next")
    seen = Counter(
        n for rank in range(2) for batch in training(*stream, rank=rank, world_size=2, workers=2) for n in batch
    )
    assert sorted(seen) == list(range(80)) and set(seen.values()) == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_decided_by_seed_and_epoch(stream, workers):
    first = training(*stream, workers=workers)
    torch.manual_seed(workers)  # state from outside must not matter
    assert training(*stream, workers=workers) == first
    assert training(*stream, workers=workers, epoch=1) != first != training(*stream, workers=workers, seed=1)
    assert training(*stream, workers=workers, first=3) == first[3:]  # as after an interruption


def test_a_stream_that_ends_early_is_an_error(shards, tmp_path):
    """Without labels timm's reader skips every image."""
    with tarfile.open(tmp_path / "train-0000.tar", "w") as tar:
        for number in range(8):
            add(tar, f"{number:06d}.png", numbered(number))
    transform = pretrain_transform(8, 0.2, 0.5)
    stream = pretraining_images(tmp_path, "wds/mine", "train-0000.tar|8", transform, env(), 0, skip_bad=False)
    loader = train_loader(stream, TrainSampler(8, 4, 1, env(), 0), 0, pin_mem=False)
    with pytest.raises(UserError, match=r"ended after 0 of 2 batches: .* 8 images, each with its label"):
        list(loader)


# by number


def write_tars(root: Path, how: str) -> None:
    """train and val of numbered images in classes ant, bee and cat: one tar file a split, or one a class."""
    for split, first, last in (("train", 0, 24), ("val", 24, 33)):
        if how == "one tar a class":
            (root / split).mkdir()
        for label, name in enumerate(("ant", "bee", "cat")):
            path = root / split / f"{name}.tar" if how == "one tar a class" else root / f"{split}.tar"
            with tarfile.open(path, "a") as tar:
                for number in range(first, last):
                    if number % 3 == label:
                        add(
                            tar,
                            f"{number}.png" if how == "one tar a class" else f"{name}/{number}.png",
                            numbered(number),
                        )


def write_hugging_face(root: Path, _) -> None:
    """A dataset of parquet files, which `datasets` reads without a network."""
    for split, first, last in (("train", 0, 24), ("validation", 24, 33)):
        write_parquet(root / f"{split}-00000-of-00001.parquet", range(first, last))


KINDS = {
    "one tar a split": (write_tars, "tar", "val"),
    "one tar a class": (write_tars, "tar", "val"),
    "hugging face": (write_hugging_face, "hfds/{root}", "validation"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_readers_by_number_give_every_image_with_its_label(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    write, name, val_split = KINDS[kind]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", kind)
    name, root = name.format(root=tmp_path / "data"), str(tmp_path / "data")
    root = None if name.startswith("hfds") else root
    transforms = (pretrain_transform(8, 1.0, 0.0), eval_transform(8))
    train, val = labelled_images(root, name, ("train", val_split), transforms, 3, env(), False, 0, False)
    loader = train_loader(train, TrainSampler(len(train), 4, 1, env(), 0), num_workers=2, pin_mem=False)
    seen = [pair for imgs, labels in loader for pair in zip(numbers(imgs), labels.tolist(), strict=True)]
    assert sorted(seen) == [(i, i % 3) for i in range(24)] and seen != sorted(seen)
    seen = [pair for imgs, labels in eval_loader(val, 4, env(), False, 1, False)
            for pair in zip(numbers(imgs), labels.tolist(), strict=True)]  # fmt: skip
    assert sorted(seen) == [(i, i % 3) for i in range(24, 33)]


def test_a_broken_file_in_a_tar_is_named(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add(tar, "ant/good.png", numbered(5))
        add(tar, "bee/bad.png", numbered(5)[:40])
    images = pretraining_images(tmp_path, "tar", "train", eval_transform(8), env(), 0, skip_bad=False)
    with pytest.raises(UserError, match="cannot decode .*bee/bad.png"):
        [images[i] for i in range(2)]
    images = pretraining_images(tmp_path, "tar", "train", eval_transform(8), env(), 0, skip_bad=True)
    assert [images[i][2] for i in range(2)] == [0, 0] and images.take_bad() == ["bee/bad.png"]


def wide(number: int) -> bytes:
    """A PNG of 16-bit grey, of one level, which is 257 times its number."""
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16), 257 * number, np.uint16)).save(file, "png")
    return file.getvalue()


def write_of(root: Path, kind: str, data: list[bytes]) -> str:
    """A data set `train` and `val` of these files, of label 0; returns its --dataset."""
    if kind.startswith("hf"):
        import datasets

        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant"])})
        rows = {"image": [{"bytes": one, "path": None} for one in data], "label": [0] * len(data)}
        for split in ("train", "val"):
            path = root / f"{split}-00000-of-00001.parquet"
            datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
        card = {"dataset_info": {"splits": [{"name": "val", "num_examples": len(data), "num_bytes": 1}]},
                "configs": [{"config_name": "default", "data_files": [{"split": "val", "path": "val-*"}]}]}  # fmt: skip
        (root / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
        return f"{kind}/{root}"
    with tarfile.open(root / ("val.tar" if kind == "tar" else "val-0000.tar"), "w") as tar:
        for i, one in enumerate(data):
            add(tar, f"ant/{i}.png" if kind == "tar" else f"{i}.png", one)
            if kind == "wds":
                add(tar, f"{i}.cls", b"0")
    info = {"name": "val", "filenames": ["val-0000.tar"], "shard_lengths": [len(data)], "num_samples": len(data)}
    (root / "_info.json").write_text(json.dumps({"splits": {"val": info}}))
    return "tar" if kind == "tar" else "wds/mine"


def seen_of(root: Path, kind: str, data: list[bytes], tmp_path, monkeypatch) -> list[int]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)
    root.mkdir()
    name = write_of(root, kind, data)
    _, val = labelled_images(str(root), name, ("train", "val"), (None, eval_transform(8)), 1, env(), False, 0, False)
    return [n for imgs, _ in eval_loader(val, 4, env(), False, num_workers=0, pin_mem=False) for n in numbers(imgs)]


@pytest.mark.parametrize("kind", ["tar", "hfds", "hfids", "wds"])
def test_values_become_pixels_by_the_same_rule_from_every_reader(kind, tmp_path, monkeypatch):
    assert sorted(seen_of(tmp_path / "data", kind, [wide(7), numbered(99), wide(200)], tmp_path, monkeypatch)) == [
        7, 99, 200]  # fmt: skip


@pytest.mark.parametrize("kind", ["tar", "hfds", "hfids", "wds"])
def test_values_without_a_rule_are_refused_from_every_reader(kind, tmp_path, monkeypatch):
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16), 300, np.int32)).save(file, "tiff")
    with pytest.raises(UserError, match="mode I of signed values: save it with unsigned values"):
        seen_of(tmp_path / "data", kind, [file.getvalue()], tmp_path, monkeypatch)


# errors


@pytest.mark.parametrize(
    ("name", "split", "words"),
    [
        ("webdataset/mine", "train", "--dataset webdataset/mine is not known: use one of tar, hfds/NAME, wds/NAME"),
        ("tar/mine", "train", "--dataset tar/mine is not known"),
        ("wds/mine", "trian", "split trian not found"),
        ("tar", "trian", "neither trian.tar nor a folder trian"),
        ("hfds//no/such/folder", "train", "cannot be opened"),
        ("wds/mine", "train-0000.tar", "num_samples not specified"),
    ],
)
def test_a_dataset_that_cannot_be_opened_is_an_error_that_says_why(name, split, words, shards, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=words):
        pretraining_images(shards, name, split, eval_transform(8), env(), 0, skip_bad=False)


def test_more_processes_than_shards_are_refused_before_training(shards):
    labelled_images(shards, "wds/mine", ("train", "val"), (None, eval_transform(8)), 3, env(0, 5), True, 0, False)
    with pytest.raises(UserError, match="^--dist_eval needs a shard for each of 6 processes, but there are 5"):
        labelled_images(shards, "wds/mine", ("train", "val"), (None, eval_transform(8)), 3, env(0, 6), True, 0, False)


def test_a_label_without_a_class_is_an_error(shards):
    _, val = labelled_images(shards, "wds/mine", ("train", "val"), (None, eval_transform(8)), 2, env(), False, 0, False)
    with pytest.raises(UserError, match="an image has label 2, but --nb_classes is 2"):
        list(eval_loader(val, 4, env(), False, num_workers=0, pin_mem=False))


def test_a_stream_cannot_be_decoded_on_the_gpu(shards):
    stream = pretraining_images(shards, "wds/mine", "train", pretrain_transform(8, 0.2, 0.5), env(), 0, skip_bad=False)
    with pytest.raises(UserError, match="--decode cuda"):
        train_loader(stream, TrainSampler(80, 4, 1, env(), 0), 0, pin_mem=False, decode="cuda")


# scripts

TINY = (*ON_CPU, "--dataset", "wds/mine", "--input_size", 16, "--batch_size", 4, "--num_workers", 2)


@pytest.mark.slow
def test_all_scripts_train_and_evaluate_on_shards_in_two_processes(shards, tmp_path):
    data = ("--data_path", shards)
    torchrun("main_pretrain.py", *TINY, *data, "--model", "mae_vit_tiny_patch4", "--epochs", 1, "--warmup_epochs", 0,
             "--output_dir", tmp_path / "pretrain", "--log_dir", "")  # fmt: skip
    weights = tmp_path / "pretrain" / "checkpoint-0.pth"
    classifier = (*TINY, *data, "--model", "vit_tiny_patch4", "--nb_classes", 3, "--dist_eval", "--log_dir", "")
    for script in ("main_finetune.py", "main_linprobe.py"):
        out = tmp_path / script
        done = torchrun(script, *classifier, "--finetune", weights, "--epochs", 1, "--warmup_epochs", 0,
                        "--output_dir", out)  # fmt: skip
        assert "Accuracy of the network on the 35 test images" in done.stdout
        alone = run(script, *classifier, "--eval", "--resume", out / "checkpoint-0.pth", "--output_dir", "")
        figures = [line for line in done.stdout.splitlines() if line.startswith("* Acc@1")]
        assert figures and figures[-1] in alone.stdout
    assert not os.path.exists(tmp_path / "pretrain" / "checkpoint-1.pth")


def test_splits_without_a_dataset_are_told(tmp_path):
    transform = eval_transform(32)
    with pytest.raises(UserError, match="--val_split test is for --dataset: folders are train/ and val/"):
        labelled_images(tmp_path, "", ("train", "test"), (None, transform), 2, env(), False, 0, False)
    with pytest.raises(UserError, match="--train_split all is for --dataset"):
        pretraining_images(tmp_path, "", "all", transform, env(), 0, False)
