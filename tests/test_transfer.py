"""--dataset inat…, places…: small copies of the official archives as they unpack, right ones and wrong ones."""

import json
import re
import time
import tracemalloc
from pathlib import Path

import pytest
from helpers import load, project_log, write_image
from test_data import as_it_is, env
from test_scripts import CLASSIFY, PRETRAIN, train

from util.data import transfer
from util.data.readers import labelled_images, pretraining_images
from util.errors import UserError

IMAGES = {"inat2017": "train_val_images", "inat2018": "train_val2018", "inat2019": "train_val2019"}
PLACES205 = "data/vision/torralba/deeplearning/images256"
# category 2 has no image; sorted as text, 10 would come before 2
KINDS = ["Aves", "Fungi", "Plantae"]
N = 11


def inat_json(folder: str, split: str) -> dict:
    """A JSON file as published, with ids that say nothing of order; 12 images to train on, 5 to validate."""
    keys = range(12) if split == "train" else range(20, 25)
    labels = {key: (10, 0, 1, 9)[key % 4] for key in keys}
    return {
        "info": {"year": 2018}, "licenses": [],
        "images": [{"id": 900 - key, "file_name": f"{folder}/{KINDS[labels[key] % 3]}/{labels[key]}/{key}.jpg",
                    "license": 3, "width": 40, "height": 32, "rights_holder": "somebody"} for key in keys],
        "annotations": [{"id": key, "image_id": 900 - key, "category_id": labels[key]} for key in reversed(keys)],
        "categories": [{"id": k, "name": f"species {k}", "supercategory": KINDS[k % 3]} for k in reversed(range(N))],
    }  # fmt: skip


def write_inat(root: Path, name: str) -> None:
    root.mkdir(exist_ok=True)
    for split in ("train", "val"):
        content = inat_json(IMAGES[name], split)
        (root / f"{split}{name[4:]}.json").write_text(json.dumps(content))
        for image in content["images"]:
            write_image(root / image["file_name"], image["id"])


def places_lists(name: str) -> dict[str, list[tuple[str, int]]]:
    """Split -> [(path from the folder of images on, label)]; label 2 has no image."""
    of = ["a/abbey", "a/airport", "b/bakery/shop", "z/zoo"]
    found = {"train": [], "val": []}
    for i in range(17):
        split = "train" if i < 12 else "val"
        flat = split == "val" and name == "places365"
        path = f"Places365_val_{i:08d}.jpg" if flat else f"{of[i % 4]}/{i:08d}.jpg"
        found[split].append((path, (0, 1, 3, 10)[i % 4]))
    return found


def write_places205(root: Path) -> None:
    for split, files in places_lists("places205").items():
        (root / "trainvalsplit_places205").mkdir(exist_ok=True)
        lines = "".join(f"{path} {label}\n" for path, label in files)
        (root / "trainvalsplit_places205" / f"{split}_places205.csv").write_text(lines)
        for path, label in files:
            write_image(root / PLACES205 / path, label)


def write_places365(root: Path, size: str = "256", standard: str = "", lists: str = "") -> None:
    (root / lists).mkdir(exist_ok=True, parents=True)
    names = [f"/c/category_{k}" for k in range(N)]
    lines = "".join(f"{name} {k}\n" for k, name in sorted(enumerate(names), key=lambda pair: pair[1]))
    (root / lists / "categories_places365.txt").write_text(lines)
    for split, files in places_lists("places365").items():
        slash, folder = ("/", f"data_{size}{standard}") if split == "train" else ("", f"val_{size}")
        lines = "".join(f"{slash}{path} {label}\n" for path, label in files)
        name = "places365_train_standard.txt" if split == "train" else "places365_val.txt"
        (root / lists / name).write_text(lines)
        for path, label in files:
            write_image(root / folder / path, label)


WRITERS = {
    **{name: lambda root, name=name: write_inat(root, name) for name in IMAGES},
    "places205": write_places205,
    "places365": write_places365,
}


def expected(name: str, split: str) -> list[tuple[str, int]]:
    """[(path below the root, label)], from the official files by hand."""
    if name.startswith("inat"):
        content = inat_json(IMAGES[name], split)
        label = {one["image_id"]: one["category_id"] for one in content["annotations"]}
        return [(image["file_name"], label[image["id"]]) for image in content["images"]]
    folder = PLACES205 if name == "places205" else {"train": "data_256", "val": "val_256"}[split]
    return [(f"{folder}/{path}", label) for path, label in places_lists(name)[split]]


def opened(name, root, nb_classes=N, with_train=True, skip_bad=False, splits=("train", "val")):
    transforms = (as_it_is if with_train else None, as_it_is)
    return labelled_images(str(root), name, splits, transforms, nb_classes, env(), False, 0, skip_bad)


@pytest.mark.parametrize("name", transfer.SETS)
def test_files_labels_and_names_are_those_of_the_official_files(name, tmp_path):
    WRITERS[name](tmp_path)
    with project_log() as said:
        train_set, val_set = opened(name, f"{tmp_path}/./")
    assert not [line for line in said if "left out" in line]
    for what in ("train", "validate"):
        assert any(f"7 of 11 classes have no image to {what} on, as " in line for line in said)
    for images, split in ((train_set, "train"), (val_set, "val")):
        found = [(str(Path(path).relative_to(tmp_path)), label) for path, label in images.source]
        assert found == expected(name, split)
        assert [images[i][2] for i in range(len(images))] == [label for _, label in found]
    only = pretraining_images(str(tmp_path), name, "train", as_it_is, env(), 0, False)
    assert list(only.source) == list(train_set.source)
    names = {
        "inat": [f"species {k}" for k in range(N)],
        "places205": ["a/abbey", "a/airport", "2", "b/bakery/shop", *"456789", "z/zoo"],
        "places365": [f"c/category_{k}" for k in range(N)],
    }
    assert val_set.classes == names[name if name.startswith("places") else "inat"]
    none, val_alone = opened(name, tmp_path, with_train=False)
    assert none is None and list(val_alone.source) == list(val_set.source)
    assert val_alone.classes[0] == val_set.classes[0]
    with pytest.raises(UserError, match=f"--nb_classes 1000, but {name} has 11 categories here: pass that number"):
        opened(name, tmp_path, nb_classes=1000)


@pytest.mark.parametrize("size", ["large", "256"])
@pytest.mark.parametrize("standard", ["", "_standard"])
def test_places365_in_each_of_its_layouts(standard, size, tmp_path):
    write_places365(tmp_path, size, standard, "filelist_places365-standard")
    train_set, val_set = opened("places365", tmp_path)
    assert f"/data_{size}{standard}/a/abbey/" in train_set.source.name(0)
    assert f"/val_{size}/Places365_val_" in val_set.source.name(0)
    if size == "256":  # large ones to train on, and none to validate
        (tmp_path / f"data_large{standard}").mkdir()
        train_set, _ = opened("places365", tmp_path)
        assert f"/data_{size}{standard}/a/abbey/" in train_set.source.name(0)


def test_names_that_two_kingdoms_share_are_told_apart(tmp_path):
    write_inat(tmp_path, "inat2017")
    for split in ("train", "val"):
        edit(tmp_path / f"{split}2017.json", lambda content: [one.update(name="same") for one in content["categories"]
                                                              if one["id"] in (0, 1)])  # fmt: skip
    classes = opened("inat2017", tmp_path)[1].classes
    assert classes[:3] == ["Aves/same", "Fungi/same", "Plantae/species 2"]


# what is wrong


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def in_train(change):
    return lambda root: edit(root / "train2018.json", change)


def other_categories(root):
    edit(root / "val2018.json", lambda content: content["categories"][0].update(name="another"))


def two_of_them(root):
    (root / "annotations").mkdir()
    (root / "annotations" / "val2018.json").write_bytes((root / "val2018.json").read_bytes())


def cut(root):
    (root / "train2018.json").write_bytes((root / "train2018.json").read_bytes()[:-300])


BAD_INAT = {
    "no train JSON": (lambda root: (root / "train2018.json").unlink(), "no file .*/train2018.json: unpack it there"),
    "no val JSON": (lambda root: (root / "val2018.json").unlink(), "no file .*/val2018.json"),
    "two JSON": (two_of_them, r"/val2018.json and .*/annotations/val2018.json: one of them is too many"),
    "cut": (cut, "train2018.json is no JSON"),
    "empty file": (lambda root: (root / "train2018.json").write_bytes(b""), "train2018.json is no JSON"),
    "no UTF-8": (lambda root: (root / "train2018.json").write_bytes(b'{"images": "\xe9"}'), "is no JSON"),
    "nested": (lambda root: (root / "train2018.json").write_text("[" * 100000), "is no JSON"),
    "a list": (lambda root: (root / "train2018.json").write_text("[]"), "train2018.json is not as published"),
    "no annotations": (in_train(lambda c: c.pop("annotations")), "not as published.*KeyError: 'annotations'"),
    "no images": (in_train(lambda c: c.update(images=[], annotations=[])), "it holds no image"),
    "no file name": (in_train(lambda c: c["images"][0].pop("file_name")), "not as published.*'file_name'"),
    "odd file name": (in_train(lambda c: c["images"][0].update(file_name=3)), "3 is no name"),
    "half a letter": (in_train(lambda c: c["images"][0].update(file_name="a\ud83d.jpg")), r"'a\\ud83d.jpg' is no name"),
    "in a category": (in_train(lambda c: c["categories"][0].update(name="\ud83d")), r"'\\ud83d' is no name"),
    "no label": (in_train(lambda c: c["annotations"].pop(0)), "image 889 has no annotation"),
    "no image": (in_train(lambda c: c["images"].pop(0)), "image 900 has an annotation, but no file name"),
    "image twice": (in_train(lambda c: c["images"].append(c["images"][0])), "image comes twice, 13 have 12"),
    "two labels": (in_train(lambda c: c["annotations"].append(c["annotations"][0])), "annotation comes twice"),
    "category lacks": (in_train(lambda c: c["categories"].pop(4)), "10 categories do not count from 0 to 9"),
    "odd category": (in_train(lambda c: c["annotations"][0].update(category_id=11)), "category 11 of an image is none"),
    "category as text": (in_train(lambda c: c["annotations"][0].update(category_id="1")), "category '1' of an image"),
    "other categories": (other_categories, r"not of one set: category 10 is 'species 10' in one and 'another'"),
    "no images at all": (lambda root: (root / "train_val2018").rename(root / "elsewhere"),
                         r"12 of 12 files .*train_val2018/Fungi/10/0.jpg.*unpack the whole archive"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_INAT)
def test_wrong_files_of_inaturalist_are_named(kind, tmp_path):
    write_inat(tmp_path, "inat2018")
    spoil, message = BAD_INAT[kind]
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        opened("inat2018", tmp_path)
    assert error.value.message.isprintable() and len(error.value.message) < 2000


def line_of(path: str, change):
    def spoil(root):
        lines = (root / path).read_text().splitlines()
        lines[3] = change(lines[3])
        (root / path).write_text("\n".join(lines))

    return spoil


BAD_PLACES = {
    "no list": ("places365", lambda root: (root / "places365_val.txt").unlink(), "no file .*/places365_val.txt"),
    "no categories": ("places365", lambda root: (root / "categories_places365.txt").unlink(), "no file .*/categories_"),
    "no folder": ("places365", lambda root: (root / "val_256").rename(root / "val"), "none of val_large, val_256"),
    "no label": ("places365", line_of("places365_train_standard.txt", lambda line: line.split()[0]),
                 "train_standard.txt, line 4: no label after 'z/zoo/00000003.jpg'. A line is path label"),
    "text": ("places365", line_of("places365_train_standard.txt", lambda line: f"{line}x"),
             "train_standard.txt, line 4: label '10x' is no number"),
    "too large": ("places365", line_of("places365_train_standard.txt", lambda line: f"{line}0"),
                  "train_standard.txt has label 100, but .*categories_places365.txt has 11 categories"),
    "category twice": ("places365", line_of("categories_places365.txt", lambda line: "/c/x 0"), "do not count from 0"),
    "no list of 205": ("places205", lambda root: (root / "trainvalsplit_places205").rename(root / "lists"),
                       "no file .*/train_places205.csv"),
    "too large of 205": ("places205", line_of("trainvalsplit_places205/train_places205.csv", lambda s: f"{s}99999"),
                         "train_places205.csv has label 1099999, but Places205 has 205 categories"),
    "another path": ("places205", line_of("trainvalsplit_places205/val_places205.csv", lambda line: "z/zoo/1.jpg 1"),
                     "1 of 5 files that were looked for .*z/zoo/1.jpg"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_PLACES)
def test_wrong_files_of_places_are_named(kind, tmp_path):
    name, spoil, message = BAD_PLACES[kind]
    WRITERS[name](tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        opened(name, tmp_path)


@pytest.mark.parametrize("name", transfer.SETS)
def test_images_that_are_missing_are_named_and_extra_ones_left_out_with_a_line(name, tmp_path, monkeypatch):
    WRITERS[name](tmp_path)
    path = tmp_path / expected(name, "train")[7][0]
    path.rename(path.with_name("extra.jpg"))
    with pytest.raises(UserError, match=f"1 of 12 files .*{path.name}.*--skip_bad_images"):
        opened(name, tmp_path)
    with pytest.raises(UserError, match=f"1 of 12 files .*{path.name}"):
        pretraining_images(str(tmp_path), name, "train", as_it_is, env(), 0, False)
    with project_log() as said:
        train_set, _ = opened(name, tmp_path, skip_bad=True)
    assert any(path.name in line and "--skip_bad_images" in line for line in said)
    assert any("left out: 1 images that neither" in line and "extra.jpg" in line for line in said)
    assert len(train_set) == 12
    monkeypatch.setattr("util.data.lists.SAMPLED", 1)  # a large set, of which the sample misses it
    monkeypatch.setattr(transfer, "check_there", lambda *args: None)
    with pytest.raises(UserError, match=f"1 images that the official files name are not there: .*{path.name}"):
        opened(name, tmp_path)


def test_images_that_are_named_twice_are_told_and_count_twice(tmp_path):
    write_inat(tmp_path / "json", "inat2018")
    again = IMAGES["inat2018"] + "/Fungi/10/0.jpg"
    edit(tmp_path / "json" / "val2018.json", lambda content: content["images"][0].update(file_name=again))
    write_places205(tmp_path)
    path = tmp_path / "trainvalsplit_places205" / "train_places205.csv"
    path.write_text(path.read_text() + "z/zoo/00000003.jpg 0\n" * 4)
    for name, root, n, which in (
        ("inat2018", tmp_path / "json", 12, "1 lines.*/10/0.jpg$"),
        ("places205", tmp_path, 16, r"4 lines.*(/zoo/00000003.jpg, .*){3}\.\.\.$"),
    ):
        with project_log() as said:
            train_set, _ = opened(name, root)
        assert len(train_set) == n and [line for line in said if re.search(which, line)], said


@pytest.mark.parametrize(
    ("root", "splits", "message"),
    [
        (None, ("train", "val"), "--dataset inat2018: --data_path None is no folder"),
        ("nowhere", ("train", "val"), "--data_path nowhere is no folder"),
        (".", ("training", "val"), "inat2018 has no split 'training': choose train or val"),
    ],
)
def test_options_that_fit_no_set_are_told(root, splits, message):
    with pytest.raises(UserError, match=message):
        labelled_images(root, "inat2018", splits, (as_it_is, as_it_is), N, env(), False, 0, False)


# through the scripts, and at size


@pytest.mark.parametrize("name", ["finetune", "linprobe"])
def test_classifiers_take_a_set_and_keep_its_names(name, tmp_path):
    write_inat(tmp_path / "set", "inat2018")
    of = ("--dataset", "inat2018", "--data_path", tmp_path / "set", "--nb_classes", N)
    said = train(name, tmp_path / "run", *CLASSIFY, *of, "--epochs", 1)
    assert "12 images to train, 5 to validate" in said and "of the network on the 5 test images" in said
    assert load(tmp_path / "run" / "checkpoint-0.pth")["classes"] == [f"species {k}" for k in range(N)]


def test_pretraining_takes_the_training_images_of_a_set(tmp_path):
    write_places365(tmp_path / "set")
    said = train(
        "pretrain",
        tmp_path / "run",
        *PRETRAIN,
        "--dataset",
        "places365",
        "--data_path",
        tmp_path / "set",
        "--epochs",
        1,
    )
    assert "12 training images" in said


def test_a_large_json_opens_in_its_share_of_time_and_memory(tmp_path):
    """A twentieth of iNaturalist 2017's images, none of them on the disk."""
    n = 29_000
    images = [{"id": i, "file_name": f"train_val_images/Aves/species {i % 5089}/{i:032x}.jpg", "width": 800,
               "height": 600, "license": 1, "rights_holder": "somebody"} for i in range(n)]  # fmt: skip
    content = {
        "images": images,
        "annotations": [{"id": i, "image_id": i, "category_id": i % 5089} for i in range(n)],
        "categories": [{"id": k, "name": f"species {k}", "supercategory": "Aves"} for k in range(5089)],
    }
    (tmp_path / "train2017.json").write_text(json.dumps(content))
    begun = time.process_time()
    part = transfer._open("inat2017", str(tmp_path), "train")
    assert time.process_time() - begun < 5
    assert len(part.files) == n and part.files[5100] == (str(tmp_path / images[5100]["file_name"]), 11)
    tracemalloc.start()
    part = transfer._open("inat2017", str(tmp_path), "train")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < n * 110 + 2**21 and peak < n * 1500, (kept / n, peak / n)
