"""The worked examples of PRETRAIN.md: what demo/make_solar.py and demo/make_sounds.py write."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from demo import make_solar, make_sounds
from util.errors import UserError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """elpv-dataset as it is laid out, with 40 cells: ten of each probability, one kind after the other."""
    folder = tmp_path / "elpv_dataset" / "data"
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(40):
        Image.new("L", (300, 300), i).save(folder / "images" / f"cell{i:04d}.png")
        probability = ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")[i % 4]
        lines.append(f"images/cell{i:04d}.png  {probability:<18}  {'mono' if i < 20 else 'poly'}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "elpv_dataset" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_cells_are_split_within_each_kind_and_probability(package, tmp_path):
    make_solar.write_cells(tmp_path / "out", side=20)
    files = sorted((tmp_path / "out").rglob("*.png"))
    found = Counter((f.parent.parent.name, f.parent.name) for f in files)
    # five of each kind and probability, of which the first and the fifth go to val/
    assert found == {(s, c): n for s, n in (("train", 12), ("val", 8)) for c in ("defective", "functional")}
    for file in files:
        i = int(file.stem[4:])
        assert (file.parent.name == "defective") == (i % 4 >= 2) and (file.parent.parent.name == "val") == (
            i % 20 // 4 in (0, 4)
        )
        with Image.open(file) as cell:
            assert (cell.size, cell.mode, cell.getpixel((9, 9))) == ((20, 20), "L", i)


def test_without_the_package_its_name_is_told(monkeypatch):
    monkeypatch.setattr(make_solar, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install elpv-dataset"):
        make_solar.elpv()


def test_the_real_package_has_what_the_page_says():
    pytest.importorskip("elpv_dataset")
    places = [place.split("/")[:2] for _, place in make_solar.cells(make_solar.elpv())]
    found = Counter(map(tuple, places))
    train, val = ({label: found[split, label] for label in ("functional", "defective")} for split in ("train", "val"))
    assert train == {"functional": 1351, "defective": 614} and val == {"functional": 452, "defective": 207}


def test_a_tone_is_one_band_at_all_times():
    t = np.arange(make_sounds.FRAMES * make_sounds.HOP) / make_sounds.RATE
    tone = torch.from_numpy(np.sin(2 * np.pi * 2000 * t)).float()
    picture = np.asarray(make_sounds.spectrogram(tone))
    assert picture.shape == (1024, 128) and picture.dtype == np.uint8, "time is the height"
    bands = picture[4:-4].argmax(axis=1)
    assert (np.abs(bands * 62.5 - 2000) <= 62.5).all() and (picture[4:-4, 60:] < 20).all()


@pytest.mark.parametrize(("kind", "sign"), [("rising", 1), ("falling", -1)])
def test_chirps_go_where_their_class_says(kind, sign):
    heard = torch.zeros(make_sounds.FRAMES * make_sounds.HOP)
    event = make_sounds.event(kind, 2.0, 1000.0)
    heard[: len(event)] = event
    loudest = np.asarray(make_sounds.spectrogram(heard)).astype(int)[20:180].argmax(axis=1)
    assert (sign * np.diff(loudest) >= 0).all() and abs(loudest[-1] - loudest[0]) > 12


def test_sounds_are_a_function_of_their_seed_and_differ(tmp_path):
    make_sounds.write_sounds(tmp_path, train=2, val=1)
    files = sorted(tmp_path.rglob("*.png"))
    assert {f.parent.name for f in files} == set(make_sounds.KINDS) and len(files) == 18
    assert len({f.read_bytes() for f in files}) == 18
    state = torch.get_rng_state()
    assert torch.equal(make_sounds.sound("trill", 3), make_sounds.sound("trill", 3))
    assert torch.equal(torch.get_rng_state(), state), "nobody else's draws change"
