"""Lists of files as --data_path: read as csv reads them, refused with the line's number, small in memory."""

import csv
import os
import random
import shutil
import time
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from helpers import ON_CPU, assert_same, load, project_log, torchrun, write_image
from test_data import as_it_is, env
from test_saving import stop_at
from test_scripts import FINETUNE, LINPROBE, PRETRAIN, log_txt, train

from util.data import lists
from util.data.datasets import Images, PackedFiles
from util.data.lists import FileList, labelled, unlabelled
from util.data.readers import labelled_images, pretraining_images
from util.errors import UserError
from util.run.exits import Stopped


@pytest.fixture
def anything_is_there(monkeypatch):
    monkeypatch.setattr(lists, "check_there", lambda *args: None)


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(path, **options):
    """[(path in the list, label's text)] of a list."""
    codes = {} if options.get("labelled", True) else None
    files = FileList(path, **options).read(codes, "")
    return [(name, list(codes)[label] if codes else label) for name, label in files]


# what is in a list

HARD = ["plain.jpg", "a,b.jpg", 'quo"ted".png', "spaces in it .png", "# no comment.jpg", "schön 日本.png", "/abs/o.png",
        "../up.jpg", "two\nlines.png", "\r\n.png", "'single'.png", "a;b\tc.jpg", "-1", "trailing\\"]  # fmt: skip


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("header", [[], [("path", "label")], [("Path", " LABEL")]])
def test_what_csv_writes_is_what_is_read(header, mark, end, tmp_path):
    draw = random.Random(0)
    rows = [(path, draw.choice(["cat", "a dog", "x,y", 'say "hi"', "日本"])) for path in HARD * 200]
    with open(tmp_path / "files.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator=end).writerows([*header, *rows])
    path = written(tmp_path / "files.csv", mark + (tmp_path / "files.csv").read_bytes())
    assert read(path) == rows
    assert read(path, labelled=False) == [(name, -1) for name, _ in rows]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_txt_has_the_label_after_the_last_comma_or_is_all_path(end, tmp_path):
    names = [name for name in HARD if "\n" not in name]
    path = written(tmp_path / "files.txt", end.join(f"{name},c {i % 3} " for i, name in enumerate(names)))
    assert read(path) == [(name, f"c {i % 3}") for i, name in enumerate(names)]
    path = written(tmp_path / "paths.txt", "\ufeff" + end.join(["path", *names, ""]))
    assert read(path, labelled=False) == [(name, -1) for name in names]


def test_blank_lines_are_nothing_and_lines_twice_are_two(tmp_path):
    content = "\n \n\r\npath,label\n\na.jpg,1\n\n\na.jpg,1\npath,label\n" + "\n" * 2000 + "b.jpg,2"
    expected = [("a.jpg", "1"), ("a.jpg", "1"), ("path", "label"), ("b.jpg", "2")]
    assert read(written(tmp_path / "a.csv", content)) == read(written(tmp_path / "a.txt", content)) == expected


@pytest.mark.parametrize("n", [0, 1, 511, 512, 513, 1024])
def test_a_header_is_the_first_line_alone(n, tmp_path):
    rows = [("path", "label") if i == n else (f"{i}.jpg", "cat") for i in range(1500)]
    path = written(tmp_path / "a.csv", "".join(f"{name},{label}\n" for name, label in rows))
    assert read(path) == rows[n == 0 :]
    (tmp_path / "b.csv").write_text(f"path,label\n{(tmp_path / 'a.csv').read_text()}")
    assert read(str(tmp_path / "b.csv")) == rows


def test_names_that_are_no_utf8_are_found_on_the_disk(tmp_path):
    name = os.fsdecode(b"bad\xe9.png")
    write_image(tmp_path / "good.png", 0)
    os.rename(tmp_path / "good.png", tmp_path / name)
    path = written(tmp_path / "files.txt", b"bad\xe9.png\n")
    assert unlabelled(path, skip_bad=False)[0] == (str(tmp_path / name), -1)


def test_random_lines_are_read_as_a_loop_over_csv_reads_them(tmp_path):
    draw = random.Random(1)
    for trial in range(60):
        text = "".join(
            f"{''.join(draw.choices('ab/. é', k=draw.randint(1, 9)))}x,{draw.choice('pqr')}{draw.choice([' ', ''])}"
            + draw.choice(["\n", "\r\n", "\n\n", "\n  \n"])
            for _ in range(draw.choice([1, 5, 511, 512, 513, 1300]))
        )
        path = written(tmp_path / f"{trial}.csv", text)
        with open(path, newline="", encoding="utf-8") as file:
            naive = [(row[0], row[1].strip()) for row in csv.reader(file) if "".join(row).strip()]
        assert read(path) == naive == read(written(tmp_path / f"{trial}.txt", text))


# classes


def pair(folder, train, val, ending=".csv"):
    return written(folder / f"train{ending}", train), written(folder / f"val{ending}", val)


@pytest.mark.usefixtures("anything_is_there")
@pytest.mark.parametrize("ending", [".csv", ".txt"])
def test_classes_are_sorted_texts_or_the_numbers_themselves(ending, tmp_path):
    lists_ = pair(tmp_path, "a,dog\nb,cat\nc,10\nd,Cat\n", "e,cat\nf,10\n", ending)
    train, val, classes = labelled(*lists_, 4, True, False)
    assert classes == ["10", "Cat", "cat", "dog"]
    assert [label for _, label in train] == [3, 2, 0, 1] and [label for _, label in val] == [2, 0]
    lists_ = pair(tmp_path, "a,10\nb,2\nc,007\nd,2\n", "e,2\nf,10\n", ending)
    with project_log() as said:
        train, val, classes = labelled(*lists_, 11, True, False)
    assert classes == [str(k) for k in range(11)]
    assert [label for _, label in train] == [10, 2, 7, 2] and [label for _, label in val] == [2, 10]
    assert "8 of 11 classes have no image to train on, as '0'" in said[0] and "9 of 11" in said[1]


@pytest.mark.usefixtures("anything_is_there")
@pytest.mark.parametrize("nb_classes", [2, 10**12 + 1])
def test_numbers_that_are_ids_are_no_class_numbers(nb_classes, tmp_path):
    lists_ = pair(tmp_path, "a,7\nb,1000000000000\n", "c,7\n")
    with pytest.raises(UserError, match="train.csv and .*val.csv go up to 1000000000000, which are ids: number the 2"):
        labelled(*lists_, nb_classes, True, False)
    assert labelled(*lists_, None, True, False)[2] == ["7", "1000000000000"]


@pytest.mark.usefixtures("anything_is_there")
def test_an_evaluation_needs_the_list_of_training_for_its_classes_alone(tmp_path):
    train, val = pair(tmp_path, "a,ant\nb,bee\nc,cat\n", "e,bee\nf,cat\n")
    train_files, val_files, classes = labelled(train, val, 3, False, False)
    assert train_files is None and classes == ["ant", "bee", "cat"] and [label for _, label in val_files] == [1, 2]
    with pytest.raises(UserError, match="--nb_classes 3, but .*val.csv has 2 labels.*name the list of training"):
        labelled(None, val, 3, False, False)
    numbers = written(tmp_path / "n.csv", "e,1\nf,0\n")
    assert labelled(None, numbers, 3, False, False)[2] == ["0", "1", "2"]  # which say themselves what they are


WRONG_ROWS = {  # what is wrong: (train list, val list, words of the message); a name ends in .txt unless it says so
    "missing label": ("a,x\n\nb.jpg\n", "a,x\n", r"train.csv, line 3: no label after 'b.jpg'. A line is path,label"),
    "empty label": ("a,x\nb, \n", "a,x\n", "train.csv, line 2: no label after 'b'"),
    "empty path": ("a,x\n,x\n", "a,x\n", "train.csv, line 2: no path"),
    "three fields": ("path,label\na,x\nb,c,x\n", "a,x\n", "train.csv, line 3: 3 fields: quote"),
    "after a field of two lines": ('"a\nb",x\n\nb\n', "a,x\n", "train.csv, line 4: no label"),
    "no end of a quote": ('a,x\n"b,x\n' + "c,x\n" * 40000, "a,x\n", "train.csv, line 2: "),
    "quote that goes on": ('a,x\n"b"c,x\nd,x\n', "a,x\n", "train.csv, line 2: "),
    "empty": ("", "a,x\n", "train.csv holds no image: name one in each line"),
    "header alone": ("path,label\r\n\r\n", "a,x\n", "train.csv holds no image"),
    "val alone": ("a,x\n", "path,label\na,x\nb,y\nc,z\n", r"val.csv, line 3: no line of .*train.csv has the label 'y'"),
    "more of val alone": ("a,x\n", "b,y\nc,z\n", "val.csv, line 1: .* 'y', nor 1 more of"),
    "negative": ("a,0\nb,-1\n", "a,0\n", "train.csv, line 2: label -1, but class numbers count from 0"),
    "too few classes": ("a,x\nb,y\nc,z\n", "a,x\n", "--nb_classes 2, but .*train.csv and .* has 3 labels: pass"),
    "a header of other words": ("name,kind\na,x\nb,y\n", "a,x\n", "has 3 labels.* They are 'kind', 'x', 'y'"),
    "too many classes": ("a,x\n", "a,x\n", "--nb_classes 2, but .* has 1 labels"),
    "too large a number": ("a,0\nb,7\n", "a,0\n", "--nb_classes 2, but the class .* up to 7: pass --nb_classes 8"),
    "huge number": ("a,0\nb,99999999999\n", "a,0\n", "99999999999, which are ids: number the 2 from 0 on"),
    "too small numbers": ("a,0\nb,0\n", "a,0\n", "go up to 0: pass --nb_classes 1"),
    "label no UTF-8": (b"a,x\nb,caf\xe9\n", "a,x\n", r"train.csv, line 2: label 'caf\\xe9' is no UTF-8"),
    "UTF-16": ("a,x\n".encode("utf-16"), "a,x\n", "train.csv is no text of UTF-8: save it as UTF-8"),
    "binary": (b"PK\x03\x04\x00\x00", "a,x\n", "train.csv is no text of UTF-8"),
    "after thousands": ("a,x\n" * 3000 + "b\n", "a,x\n", "train.csv, line 3001: no label"),
}  # fmt: skip


@pytest.mark.usefixtures("anything_is_there")
@pytest.mark.parametrize("kind", WRONG_ROWS)
def test_what_is_wrong_is_told_with_its_line(kind, tmp_path):
    train, val, message = WRONG_ROWS[kind]
    with pytest.raises(UserError, match=message):
        labelled(*pair(tmp_path, train, val), 2, True, False)


def test_what_is_no_list_is_told(tmp_path):
    (tmp_path / "a.csv").mkdir()
    good = written(tmp_path / "good.csv", "a,x\n")
    nowhere = str(tmp_path / "nowhere.txt")
    transforms = (as_it_is, as_it_is)
    for root, val, message in (
        (good, None, "--val_path: not given"),
        (None, good, "--data_path: not given"),
        (str(tmp_path), good, "--data_path: .* is no list"),
        (good, str(tmp_path / "a.csv"), "--val_path: .*a.csv is no list"),
        (nowhere, good, r"no list .*nowhere.txt \(No such file"),
    ):
        with pytest.raises(UserError, match=message):
            labelled_images(root, "", ("train", "val"), transforms, 1, env(), False, 0, False, val)
    with pytest.raises(UserError, match="--val_path is a list .*--dataset"):
        labelled_images(good, "tar", ("train", "val"), transforms, 1, env(), False, 0, False, good)
    with pytest.raises(UserError, match="no list .*nowhere.txt"):
        pretraining_images(nowhere, "", "train", as_it_is, env(), 0, False)
    with pytest.raises(UserError, match="a.tsv .it is a file.*or is a list, .txt or .csv"):
        pretraining_images(written(tmp_path / "a.tsv", "a"), "", "train", as_it_is, env(), 0, False)
    with pytest.raises(UserError, match=r"line 1: 3 fields.*path or path,label"):
        unlabelled(written(tmp_path / "x.csv", "a,b,c\n"), False)


# files that are not there


def test_missing_files_are_named_with_their_lines_before_anything_else(tmp_path):
    for i in range(3):
        write_image(tmp_path / f"{i}.png", i)
    (tmp_path / "folder.png").mkdir()
    content = "path\n\n" + "0.png\n1.png\ngone.png\n2.png\nfolder.png\n"
    path = written(tmp_path / "files.txt", content)
    with pytest.raises(
        UserError, match=r"2 of 5 files .*/gone.png \(line 5\), .*/folder.png \(line 7\); .*relative to"
    ) as e:
        pretraining_images(path, "", "train", as_it_is, env(), 0, False)
    assert "--skip_bad_images" in e.value.message
    with project_log() as said:
        images = pretraining_images(path, "", "train", as_it_is, env(), 0, True)
    assert any("gone.png (line 5)" in line for line in said)
    assert torch.equal(images[2][0], images[3][0]) and [os.path.basename(p) for p in images.take_bad()] == ["gone.png"]
    with pytest.raises(UserError, match="1 of 1 files .*only a .csv may have labels"):  # none is there: a wrong folder
        unlabelled(written(tmp_path / "labels.txt", "0.png,cat\n"), skip_bad=True)


def test_of_a_long_list_a_sample_is_looked_for_and_the_rest_is_told_when_read(tmp_path, monkeypatch):
    write_image(tmp_path / "0.png", 0)
    path = written(tmp_path / "files.txt", "0.png\n" * 9999 + "gone.png\n")
    looked, isfile = [], os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda name: looked.append(name) or isfile(name))
    images = Images(unlabelled(path, False), as_it_is)
    assert 1000 <= len(looked) <= 2000
    with pytest.raises(UserError, match="cannot decode .*/gone.png .FileNotFoundError.*--skip_bad_images"):
        images[9999]


# memory and time


def test_a_digest_is_that_of_the_folder_and_tells_lists_apart(tmp_path):
    paths = [f"train/{name}/{i}.png" for name in ("ant", "bee") for i in range(40000)]
    in_folder = PackedFiles([(f"/data/{path}", -1) for path in paths])
    relative = FileList(written(tmp_path / "a.txt", "\n".join(paths)), labelled=False).read(None)
    assert in_folder.digest() == relative.digest()
    other = FileList(written(tmp_path / "b.txt", "\n".join(paths[::-1])), labelled=False).read(None)
    assert other.digest() != relative.digest() and len(other) == len(relative)


@pytest.mark.usefixtures("anything_is_there")
def test_memory_is_that_of_arrays_and_time_in_proportion(tmp_path):
    """At the size of CI: a fiftieth of ten million lines. Those, measured: see PRETRAIN.md."""
    n = 200_000
    lines = (f"train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG,n{i % 1000:08d}\n" for i in range(n))
    train, val = pair(tmp_path, "".join(lines), "".join(f"v,n{i:08d}\n" for i in range(1000)))
    begun = time.process_time()
    files = labelled(train, val, 1000, True, False)[0]
    files.digest()
    assert time.process_time() - begun < 60 * n / 10_000_000 * 5  # five times the share: other machines are slower
    assert len(files) == n and [files[i][1] for i in (0, 1234, n - 1)] == [0, 234, 999]
    del files
    tracemalloc.start()
    labelled(train, val, 1000, True, False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < n * 75 + 2**20, f"{peak / n:.0f} bytes a line"  # of which 37 the path; as objects, over 300


# through the scripts


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 images to train on, 9 to validate, of three classes, in one folder; and lists of them beside it."""
    root = tmp_path_factory.mktemp("photos")
    rows = {"train": [], "val": []}
    for i in range(33):
        write_image(root / "all" / f"{i}.png", i)
        rows["train" if i < 24 else "val"].append((f"all/{i}.png", ("wasp", "ant", "bee")[i % 3]))
    for split, of in rows.items():
        (root / f"{split}.csv").write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in of))
        (root / f"{split}.txt").write_text("".join(f"{path}\n" for path, _ in of))
    return SimpleNamespace(root=root, given=("--data_path", root / "train.csv", "--val_path", root / "val.csv"))


@pytest.mark.parametrize("name", ["finetune", "linprobe"])
def test_classifiers_train_from_lists_resume_and_evaluate(name, photos, tmp_path, monkeypatch):
    args = (*(FINETUNE if name == "finetune" else LINPROBE), *photos.given, "--epochs", 2)
    said = train(name, tmp_path / "whole", *args)
    assert "24 images to train, 9 to validate, 6 batches an epoch" in said
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 4)
        train(name, tmp_path / "parts", *args)
    train(name, tmp_path / "parts", *args, "--resume", "auto")
    whole, parts = (load(tmp_path / which / "checkpoint-1.pth") for which in ("whole", "parts"))
    assert whole["classes"] == ["ant", "bee", "wasp"]
    assert_same(whole["model"], parts["model"])
    accuracy = log_txt(tmp_path / "whole")[-1]["test_acc1"]
    last = ("--eval", "--resume", tmp_path / "whole" / "checkpoint-1.pth", "--num_workers", 0, *ON_CPU)
    said = train(name, tmp_path / "eval", *last, *photos.given)
    assert f"* Acc@1 {accuracy:.3f}" in said and "other names" not in said
    other = written(photos.root / f"{name}.csv", (photos.root / "val.csv").read_text().replace("ant", "x"))
    said = train(name, tmp_path / "eval", *last, "--val_path", other)  # sorted: bee, wasp, x
    assert "3 of 3 classes have other names than in" in said and "as class 0: 'bee' here, 'ant' there" in said


def test_pretraining_takes_the_same_images_from_a_txt_a_csv_and_a_folder(photos, tmp_path, monkeypatch):
    ends = []
    (tmp_path / "train").mkdir()
    for line in (photos.root / "train.txt").read_text().split():  # sorted as text, as a folder's are
        (tmp_path / "train" / f"{int(line[4:-4]):02d}.png").symlink_to(photos.root / line)
    for name in ("train.txt", "train.csv"):
        said = train("pretrain", tmp_path / name, *PRETRAIN, "--data_path", photos.root / name, "--epochs", 1)
        assert "24 training images, 6 batches an epoch" in said
        ends.append(load(tmp_path / name / "checkpoint-0.pth")["model"])
    train("pretrain", tmp_path / "of_folder", *PRETRAIN, "--data_path", tmp_path / "train", "--epochs", 1)
    for end in ends:
        assert_same(end, load(tmp_path / "of_folder" / "checkpoint-0.pth")["model"])
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 3)
        train("pretrain", tmp_path / "parts", *PRETRAIN, "--data_path", photos.root / "train.txt", "--epochs", 1)
    turned = written(photos.root / "turned.txt", "".join(f"all/{i}.png\n" for i in reversed(range(24))))
    again = ("--epochs", 1, "--resume", "auto")
    for name, other in (("train.csv", False), (turned, True)):
        shutil.copytree(tmp_path / "parts", tmp_path / f"parts{other}")
        said = train("pretrain", tmp_path / f"parts{other}", *PRETRAIN, "--data_path", photos.root / name, *again)
        assert ("other training images, or in another order, than those 24" in said) == other
    shorter = written(photos.root / "shorter.txt", "all/0.png\n" * 20)
    said = train("pretrain", tmp_path / "parts", *PRETRAIN, "--data_path", shorter, *again)
    assert "20 training images, so another order (was 24)" in said


@pytest.mark.slow
def test_two_ranks_train_from_a_list(photos):
    args = ("--device", "cpu", *PRETRAIN, "--epochs", 1, "--output_dir", "", "--log_dir", "")
    said = torchrun("main_pretrain.py", *args, "--data_path", photos.root / "train.csv").stdout
    assert "24 training images, 3 batches an epoch" in said
