"""util/data/pack.py: class folders into shards that hold the same images and labels, whatever happens between."""

import json
import multiprocessing
import os
import re
import runpy
import signal
import sys
import tarfile
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.data.datasets import TrainSampler
from util.data.loader import eval_loader, train_loader
from util.data.pack import pack
from util.data.readers import labelled_images
from util.errors import UserError
from util.transforms import eval_transform, pretrain_transform

pytest.importorskip("webdataset")
from test_readers import env, numbers  # noqa: E402

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def folder(tmp_path):
    """Images of one grey level each, 20 to train on and 7 to validate, with each ending that images may have."""
    for number in range(27):
        ending = IMG_EXTENSIONS[number % len(IMG_EXTENSIONS)]
        ending = ending.upper() if number % 2 else ending
        path = tmp_path / "images" / ("train" if number < 20 else "val") / CLASSES[number % 3] / f"a.b {number}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"lossless": True} if ending.lower() == ".webp" else {}
        Image.new("RGB", (16, 16), (9 * number,) * 3).save(path, **options)
    return tmp_path / "images"


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def packed(out: Path, split: str) -> list[tuple[bytes, int]]:
    """(File, label) of each sample, by the format's rules: members of one name up to the first dot, side by side."""
    found = []
    for name in json.loads((out / "_info.json").read_text())["splits"][split]["filenames"]:
        with tarfile.open(out / name) as tar:
            names, data = tar.getnames(), [tar.extractfile(member).read() for member in tar]
        assert [a.split(".")[0] for a in names[::2]] == [b.removesuffix(".cls") for b in names[1::2]]
        found += zip(data[::2], map(int, data[1::2]), strict=True)
    return found


@pytest.mark.parametrize("shard_images", [1, 6, 20, 1000])
def test_shards_hold_the_files_with_the_labels_of_their_folders(folder, tmp_path, shard_images):
    pack(folder, tmp_path / "out", shard_images)
    about = json.loads((tmp_path / "out" / "_info.json").read_text())["splits"]
    for split, n_images in (("train", 20), ("val", 7)):
        files = {(path.read_bytes(), CLASSES.index(path.parent.name)) for path in folder.glob(f"{split}/*/*")}
        samples = packed(tmp_path / "out", split)
        assert set(samples) == files and len(samples) == len(files) == about[split]["num_samples"] == n_images
        lengths = about[split]["shard_lengths"]
        assert sum(lengths) == n_images and set(lengths[:-1]) <= {shard_images}
        labels = [label for _, label in samples]
        assert labels != sorted(labels), "classes are mixed"


@pytest.mark.parametrize("workers", [0, 2])
def test_the_reader_gives_what_the_folder_gives(folder, tmp_path, workers):
    pack(folder, tmp_path / "out", 2)

    def seen(root, name):
        transforms = (pretrain_transform(8, 1.0, 0.0), eval_transform(8))
        train, val = labelled_images(str(root), name, ("train", "val"), transforms, 3, env(), False, 0, False)
        loaders = (
            train_loader(train, TrainSampler(20, 2, 1, env(), 0), workers, pin_mem=False),
            eval_loader(val, 4, env(), False, workers, pin_mem=False),
        )
        return [sorted(pair for imgs, labels in loader for pair in zip(numbers(imgs), labels.tolist(), strict=True))
                for loader in loaders]  # fmt: skip

    expected = [[(9 * number, number % 3) for number in numbers_] for numbers_ in (range(20), range(20, 27))]
    assert seen(folder, "") == seen(tmp_path / "out", "wds/mine") == expected


def killed_at(nth: int, folder: Path, out: Path) -> None:
    """Pack in a process of its own that SIGKILL ends as the nth file is whole, but has not got its name."""

    def kill(descriptor):
        nonlocal nth
        nth -= 1
        if nth == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        os.fsync = kill
        pack(folder, out, 6)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("nth", [1, 2, 4, 6, 8])
def test_killed_and_started_again_gives_the_same_bytes(folder, tmp_path, nth):
    """8 files: packing.json, four shards to train on, two to validate, _info.json."""
    pack(folder, tmp_path / "whole", 6)
    whole, out = contents(tmp_path / "whole"), tmp_path / "out"
    assert sum(name.endswith(".tar") for name in whole) == 6
    killed_at(nth, folder, out)
    shards = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(shards) == max(0, nth - 2) and not (out / "_info.json").exists() and list(out.glob("*.tmp"))
    assert all(path.read_bytes() == whole[path.name] for path in shards), "a shard is whole or not there"
    pack(folder, out, 6)
    assert {**contents(out), ".lock": b""} == {**whole, ".lock": b""}
    assert {path: path.stat().st_mtime_ns for path in shards} == shards, "what was there was not written again"


def test_a_shard_that_was_lost_is_written_again_and_only_one_split_will_do(folder, tmp_path):
    (folder / "val").rename(tmp_path / "elsewhere")
    pack(folder, tmp_path / "out", 6)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "train-0001.tar").unlink()
    pack(folder, tmp_path / "out", 6)
    assert contents(tmp_path / "out") == before and "train-0001.tar" in before
    assert [*json.loads(before["_info.json"])["splits"]] == ["train"]


def remove_all(folder, out):
    (folder / "train").rename(folder / "training")
    (folder / "val").rename(folder / "validation")


def empty(folder, out):
    (folder / "train" / "ant" / "a.b 0.jpg").write_bytes(b"")


def lost(folder, out):
    (folder / "val" / "ant" / "lost.png").symlink_to(folder / "nowhere.png")


def other_images(folder, out):
    pack(folder, out, 6)
    Image.new("RGB", (40, 40)).save(folder / "train" / "ant" / "a.b 0.jpg")


def fewer_images(folder, out):
    pack(folder, out, 6)
    (folder / "train" / "ant" / "a.b 0.jpg").unlink()


def other_split(folder, out):
    pack(folder, out, 6)
    (folder / "val").rename(folder / "validation")


def other_tar(folder, out):
    out.mkdir()
    tarfile.open(out / "train-0000.tar", "w").close()


BAD = {
    "no splits": (remove_all, "neither train/<class>/<image> nor val"),
    "other classes": (lambda folder, out: (folder / "val" / "ant").rename(folder / "val" / "wasp"), "'ant' is a class"),
    "a class more": (lambda folder, out: (folder / "val" / "bee").rename(folder / "val" / "cat" / "bee"), "'bee' is a"),
    "empty file": (empty, r"1 images are empty .*a\.b 0\.jpg"),
    "link to nowhere": (lost, r"1 images are .*lost\.png"),
    "other images": (other_images, "shards of other images"),
    "fewer images": (fewer_images, "shards of other images"),
    "other split": (other_split, "shards of other images"),
    "other size": (lambda folder, out: pack(folder, out, 7), "another --shard_images"),
    "other tar files": (other_tar, "shards of other images"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_told_and_leaves_what_is_there(kind, folder, tmp_path):
    spoil, message = BAD[kind]
    spoil(folder, tmp_path / "out")
    before = contents(tmp_path / "out") if (tmp_path / "out").exists() else None
    with pytest.raises(UserError, match=message):
        pack(folder, tmp_path / "out", 6)
    after = contents(tmp_path / "out") if (tmp_path / "out").exists() else None
    assert after == before or (after | {".lock": b""}) == (before | {".lock": b""})


def command(monkeypatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["pack.py", *map(str, args)])
    runpy.run_path(str(ROOT / "util/data/pack.py"), run_name="__main__")


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    command(monkeypatch, folder, tmp_path / "out", "--shard_images", 6)
    assert "train-0003.tar of 4" in capsys.readouterr().out
    pack(folder, tmp_path / "again", 6)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("a_file", (), "a_file: .*File exists"),
        ("a_file/out", (), "a_file/out: .*Not a directory"),
        ("out", ("--shard_images", 0), "0 is below 1"),
        ("out", ("--shard_images", "many"), "'many' is not a whole number"),
    ],
)
def test_the_command_tells_what_is_wrong_and_exits_with_2(folder, tmp_path, monkeypatch, capfd, out, options, message):
    (tmp_path / "a_file").write_text("")
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, folder, tmp_path / out, *options)
    said = capfd.readouterr().err
    assert left.value.code == 2 and "Traceback" not in said
    assert re.search(message, said)


def test_a_full_disk_leaves_no_half_file_and_packing_goes_on(folder, tmp_path, monkeypatch):
    def full(descriptor):
        if (tmp_path / "out" / "train-0001.tar").exists():
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            pack(folder, tmp_path / "out", 6)
    assert not list((tmp_path / "out").glob("*.tmp")) and len(list((tmp_path / "out").glob("*.tar"))) == 2
    pack(folder, tmp_path / "out", 6)
    pack(folder, tmp_path / "whole", 6)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
