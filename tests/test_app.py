"""The demo's page: its functions, and the page itself in a real headless Chromium, as a Space would run it."""

import io
import itertools
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

import models_mae
import models_vit
from util.errors import UserError
from util.look.visualize import from_images, mask_noise, reconstruct

gr = pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")  # comes with gradio

from demo import app, drawing, handlers, uploads  # noqa: E402


def saved(folder, name, mean=None, std=None, **options):
    """A checkpoint whose weights are random, but there."""
    torch.manual_seed(0)
    model = models_mae.mae_vit_tiny_patch4(**options)
    args = {"model": "mae_vit_tiny_patch4", "input_size": model.patch_embed.img_size}
    args |= {"norm_pix_loss": model.norm_pix_loss, "mean": mean, "std": std}
    torch.save({"model": model.state_dict(), "args": args}, folder / name)
    return str(folder / name)


def picture(seed=0, size=(60, 40)):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


# functions


def test_a_drawing_depends_on_what_it_is_given_and_is_that_of_the_module(tmp_path):
    model = drawing.opened(saved(tmp_path, "a.pth", img_size=(16, 32))).model
    removed = drawing.random_mask(model, 75, 3)
    assert sum(removed) == 24 and removed != drawing.random_mask(model, 75, 4)
    first = drawing.draw(model, picture(0), removed)
    drawing.draw(model, picture(1), drawing.random_mask(model, 50, 1))  # another visitor
    assert drawing.draw(model, picture(0), removed) == first
    ratio, noise = mask_noise(torch.tensor([removed]))
    expected = reconstruct(model, from_images([picture(0)], (16, 32)), ratio, noise)
    assert (first.loss, first.statistics) == (expected.loss, "")
    pasted = np.asarray(first.pasted) / 255
    np.testing.assert_allclose(pasted, expected.pasted[0].permute(1, 2, 0).numpy(), atol=1 / 255)
    # what is hidden in full, the rest dimmed
    predicted = np.asarray(first.predicted)
    hidden = np.kron(np.array(removed).reshape(4, 8), np.ones((4, 4))) > 0
    assert (predicted[..., 3][hidden] == 255).all() and (predicted[..., 3][~hidden] < 64).all()
    assert (predicted[hidden][:, :3] == np.asarray(first.pasted)[hidden]).all()


def test_every_share_from_1_to_99_percent_leaves_something_to_see_and_to_predict(tmp_path):
    model = drawing.opened(saved(tmp_path, "a.pth")).model
    for percent in (1, 2, 50, 75, 98, 99):
        count = sum(drawing.random_mask(model, percent, 0))
        assert 1 <= count <= 63 and abs(count - percent / 100 * 64) <= 1


@pytest.mark.parametrize("grids", [((8, 8), (8, 8)), ((4, 8), (8, 8)), ((12, 12), (8, 4)), ((2, 3), (7, 5))])
def test_the_model_beside_hides_the_same_places(grids):
    (rows, columns), fine = grids
    removed = (np.random.default_rng(0).random(grids[0]) < 0.5).ravel().tolist()
    model = SimpleNamespace(patch_embed=SimpleNamespace(grid_size=fine))
    places = itertools.product(range(fine[0]), range(fine[1]))
    centres = [((row + 0.5) / fine[0], (column + 0.5) / fine[1]) for row, column in places]
    expected = [removed[int(y * rows) * columns + int(x * columns)] for y, x in centres]
    assert drawing.fitted_mask(removed, grids[0], model) == expected


@pytest.mark.parametrize(("grid", "fine"), [((14, 14), (8, 8)), ((12, 12), (5, 7)), ((8, 8), (14, 14))])
def test_one_patch_hidden_or_left_is_one_for_the_model_beside_too(grid, fine):
    model, length = SimpleNamespace(patch_embed=SimpleNamespace(grid_size=fine)), grid[0] * grid[1]
    for hidden in (True, False):
        for place in range(length):
            fitted = drawing.fitted_mask([(i == place) == hidden for i in range(length)], grid, model)
            assert hidden in fitted and (not hidden) in fitted, place
            if fitted.count(hidden) == 1 and fine < grid:  # where it is, give or take a patch
                row, column = divmod(fitted.index(hidden), fine[1])
                assert abs((row + 0.5) / fine[0] - (place // grid[1] + 0.5) / grid[0]) < 1 / fine[0]
                assert abs((column + 0.5) / fine[1] - (place % grid[1] + 0.5) / grid[1]) < 1 / fine[1]


def test_a_model_that_is_being_fetched_delays_nobody_else(tmp_path, monkeypatch):
    here, release, loaded = saved(tmp_path, "a.pth"), threading.Event(), []
    open_model = drawing.open_model

    def slow(source):
        loaded.append(source)
        if source != here:
            assert release.wait(30)
        return open_model(here)

    monkeypatch.setattr(drawing, "open_model", slow)
    monkeypatch.setattr(drawing, "find", lambda source: here)
    with ThreadPoolExecutor(4) as pool:
        first, second = pool.submit(drawing.opened, "afar"), pool.submit(drawing.opened, "afar")
        assert pool.submit(drawing.opened, here).result(20).model is not None
        assert not first.done() and not second.done()
        release.set()
        assert first.result(20) is second.result(20)
    assert sorted(loaded) == sorted(["afar", here]), "once for everybody"


def test_numbers_typed_beyond_the_sliders_are_those_of_their_ends():
    for typed, meant in {0: 1, 150: 99, -5: 1, 3.7: 4, 10**400: 99, math.inf: 99}.items():
        assert handlers.settings(typed, 7) == (meant, 7)
    assert handlers.settings(50, 1e9) == (50, 100) and handlers.settings(50, -1) == (50, 0)
    for bad in (math.nan, None, "50", True, [50]):
        with pytest.raises(gr.Error):
            handlers.settings(bad, 0)
        with pytest.raises(gr.Error):
            handlers.settings(50, bad)


def test_an_animation_moves_through_its_drawings(tmp_path):
    source = saved(tmp_path, "a.pth")
    do = handlers.Handlers({"a": source}, {"photographs": [picture()]})
    visit = do.choose(None, "a", handlers.NOTHING, 75, 0)
    for way, count in (("ratio", len(handlers.RATIOS)), ("seed", handlers.SEEDS)):
        html = do.gif(visit, way, 75, 0)
        assert 'download="' in html
        gif = Image.open(io.BytesIO(decoded(re.search(r'src="([^"]+)"', html)[1])))
        frames = []
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(gif.convert("RGB").tobytes())
        assert len(frames) == count == len(set(frames))


def test_a_model_of_normalised_pixels_says_whose_statistics_it_shows(tmp_path):
    do = handlers.Handlers({"n": saved(tmp_path, "n.pth", norm_pix_loss=True)}, {"photographs": [picture()]})
    visit = do.choose(None, "n", handlers.NOTHING, 75, 0)
    shown = {choice: do.board(replace(visit, statistics=choice)) for choice in handlers.STATISTICS.values()}
    assert "visible neighbours" in shown["neighbours"] and "Uses the answer" in shown["answer"]
    predicted = [re.search(r'id=reconstructed.*?src="([^"]+)"', html)[1] for html in shown.values()]
    assert predicted[0] != predicted[1]


def test_visitors_who_open_the_page_together_cost_one_drawing(tmp_path, monkeypatch):
    do = handlers.Handlers({"m": saved(tmp_path, "m.pth")}, {"photographs": [picture(), picture(seed=1)]})
    drawn, draw = [], handlers.draw
    monkeypatch.setattr(handlers, "draw", lambda *given: drawn.append(given) or draw(*given))
    first = [do.board(do.choose(None, "m", handlers.NOTHING, 75, 0)) for _ in range(3)]
    assert len(drawn) == 1 and len(set(first)) == 1
    visit = do.choose(None, "m", handlers.NOTHING, 75, 0)
    others = [do.board(do.picked(visit, 1)), do.board(do.choose(None, "m", handlers.NOTHING, 75, 1)), do.board(visit)]
    assert len(drawn) == 4 and len({*first, *others[:2]}) == 3, "another picture and another mask are drawn"


def test_the_page_says_what_a_model_was_trained_on_and_shows_such_pictures(tmp_path):
    choices, pictures = {}, {"photographs": [picture(0)], "emoji": [picture(1)], "digits": [picture(2)]}
    for name in ("emoji", "digits", "<b>cats</b>"):
        path = saved(tmp_path, f"{len(choices)}.pth")
        state = torch.load(path, weights_only=True)
        state["args"]["data_path"] = f"/somewhere/secret/{name}"
        torch.save(state, path)
        choices[name] = path
    choices["unknown"] = saved(tmp_path, "u.pth")
    do = handlers.Handlers(choices, pictures)
    for name, words, kind in (
        ("emoji", "OpenMoji", "emoji"), ("digits", "handwritten digits", "digits"),
        ("<b>cats</b>", "the folder <q>b&gt;</q>", "photographs"), ("unknown", "does not tell", "photographs"),
    ):  # fmt: skip
        visit = do.choose(None, name, handlers.NOTHING, 75, 0)
        assert words in do.about(visit) and "secret" not in do.about(visit)
        assert (visit.kind, visit.image) == (kind, pictures[kind][0])
        assert ("nothing but" in do.board(replace(visit, kind="own"))) == (name in ("emoji", "digits"))
    assert drawing.RELEASED["ViT-L, pixels + GAN"] == "mae_visualize_vit_large_ganloss"


def test_impossible_wishes_get_words(tmp_path):
    weights = {"patch_embed.proj.weight": torch.zeros(1), "cls_token": torch.zeros(1)}
    torch.save({"model": weights, "args": {"model": "mae_vit_tiny_patch4"}}, tmp_path / "encoder.pth")
    do = handlers.Handlers(
        {"a": saved(tmp_path, "a.pth"), "encoder": str(tmp_path / "encoder.pth")}, {"photographs": [picture()]}
    )
    for text in ("1" * 64, "0" * 64):
        with pytest.raises(gr.Error, match="Leave at least one patch to see, and hide at least one"):
            handlers.mask_of(text, 64)
    with pytest.raises(UserError, match="cannot reconstruct.*mae_visualize_vit"):
        do.choose(None, "encoder", handlers.NOTHING, 75, 0)
    with pytest.raises(gr.Error, match="reload the page first"):
        do.check(None)


def opened_picture(path):
    with open(path, "rb") as file:
        return uploads.open_picture(file)


def decoded(url):
    """The bytes of a data URL."""
    return urllib.request.urlopen(url).read()


def png_of(width: int, height: int, path) -> None:
    """A PNG that promises this size and is only a few bytes long."""
    Image.new("L", (1, 1)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    path.write_bytes(content)


def test_broken_and_huge_uploads_get_a_friendly_note(tmp_path):
    path = tmp_path / "upload.png"
    for content in (b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"0" * 50, b"<svg/>"):
        path.write_bytes(content)
        with pytest.raises(gr.Error, match="cannot be read as a picture"):
            opened_picture(path)
    picture().save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(gr.Error, match="cannot be read as a picture"):
        opened_picture(path)
    png_of(10_000, 8_000, path)
    start = time.perf_counter()
    with pytest.raises(gr.Error, match="80 megapixels"):
        opened_picture(path)
    png_of(100_000, 100_000, path)
    with pytest.raises(gr.Error, match="far too large"):
        opened_picture(path)
    assert time.perf_counter() - start < 1, "without decoding"


@pytest.mark.parametrize("stray", [b"", b"\x00\x12\x34", b"\xff\xd0", b"\xff\x01"])
def test_a_jpeg_whose_size_only_libjpeg_sees_is_refused(tmp_path, stray):
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "jpeg")
    content = bytearray(file.getvalue())
    frame = content.find(b"\xff\xc0")
    content[frame + 5 : frame + 9] = (24_000).to_bytes(2, "big") * 2
    (tmp_path / "a.jpg").write_bytes(content[:frame] + stray + content[frame:])
    start = time.perf_counter()
    with pytest.raises(gr.Error, match="megapixels|cannot be read"):
        opened_picture(tmp_path / "a.jpg")
    assert time.perf_counter() - start < 1, "without decoding"


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_pictures_of_every_kind_are_welcome(tmp_path, mode):
    ending = {"CMYK": "jpg"}.get(mode, "png")
    image = picture(size=(2000, 50)).convert("L" if mode == "I;16" else mode).convert(mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image) * np.uint16(257))
    image.save(tmp_path / f"a.{ending}")
    opened = opened_picture(tmp_path / f"a.{ending}")
    assert opened.mode == "RGB" and opened.size[0] <= uploads.SIDE
    mean = np.asarray(picture(size=(2000, 50)).convert("L")).mean()
    assert abs(np.asarray(opened.convert("L")).mean() - mean) < 30, "neither black nor white"


@pytest.mark.parametrize("kind", ["RGBA png", "RGBA webp", "LA png", "P png", "P gif"])
def test_what_is_transparent_is_white(tmp_path, kind):
    """A black sign whose transparent ground is black as well, as drawing programs leave it."""
    mode, ending = kind.split()
    alpha = np.zeros((40, 60), np.uint8)
    alpha[10:30, 20:40] = 255
    if mode == "P":
        image = Image.fromarray(alpha // 255, "P")  # colour 0 is transparent
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.save(tmp_path / f"a.{ending}", transparency=0)
    else:
        image = Image.new(mode, (60, 40))
        image.putalpha(Image.fromarray(alpha))
        options = {"lossless": True} if ending == "webp" else {}
        image.save(tmp_path / f"a.{ending}", **options)
    expected = 255 - np.repeat(alpha[..., None], 3, 2)
    np.testing.assert_array_equal(np.asarray(opened_picture(tmp_path / f"a.{ending}")), expected)


def test_a_photograph_is_turned_as_the_camera_was(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(size=(60, 40)).save(tmp_path / "a.jpg", exif=exif)
    assert opened_picture(tmp_path / "a.jpg").size == (40, 60)


def test_checkpoints_given_come_before_the_environment_s_and_the_demo_s(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "ROOT", tmp_path)
    monkeypatch.delenv("MAE_CHECKPOINT", raising=False)
    assert app.local_checkpoints([]) == {}
    for i, (demo, name) in enumerate(
        (("digits", "checkpoint-99.pth"), ("emoji", "checkpoint-9.pth"), ("emoji", "checkpoint-4.pth"))
    ):
        trained = tmp_path / "demo" / "output" / demo / "pretrain" / name
        trained.parent.mkdir(parents=True, exist_ok=True)
        trained.touch()
        os.utime(trained, (i, i))
    emoji, digits = app.local_checkpoints([]).items()
    assert emoji == ("tiny, emoji, pixels", str(trained))
    assert digits == (
        "tiny, digits, pixels",
        str(tmp_path / "demo" / "output" / "digits" / "pretrain" / "checkpoint-99.pth"),
    )
    monkeypatch.setenv("MAE_CHECKPOINT", "/a/b.pth")
    assert app.local_checkpoints([]) == {"b (a)": "/a/b.pth"}
    names = app.local_checkpoints(["x/c.pth", "y/c.pth", "z/x/c.pth"])
    assert list(names) == ["c (x)", "c (y)", "c (x)'"] and list(names.values()) == ["x/c.pth", "y/c.pth", "z/x/c.pth"]


def test_without_weights_the_server_does_not_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["app.py", str(tmp_path / "lost.pth")])
    with pytest.raises(SystemExit) as left:
        app.main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "no checkpoint" in said and "lost.pth" in said and "make demo" in said


def test_what_draws_no_pictures_is_told_before_the_page_opens_and_one_channel_is_welcome(tmp_path, monkeypatch, capsys):
    torch.save({"model": models_vit.vit_tiny_patch4(num_classes=3).state_dict()}, tmp_path / "classifier.pth")
    bands = {"in_chans": 13, "mean": [0.1] * 13, "std": [0.1] * 13}
    saved(tmp_path, "13.pth", **bands)
    for name, words in (("13.pth", "images of 13 channels"), ("classifier.pth", "is a classifier")):
        monkeypatch.setattr(sys, "argv", ["app.py", str(tmp_path / name)])
        with pytest.raises(SystemExit) as left:
            app.main()
        assert left.value.code == 2 and words in capsys.readouterr().err
    grey = saved(tmp_path, "grey.pth", in_chans=1, mean=[0.5], std=[0.2])
    drawn = drawing.draw(drawing.opened(grey).model, picture(), [True, False] * 32)
    pixels = np.asarray(drawn.original)
    assert (pixels == pixels[:, :, :1]).all() and pixels.std() > 10
    with pytest.raises(UserError, match="does not tell the mean of its 1 channels"):
        drawing.opened(saved(tmp_path, "untold.pth", in_chans=1))


@pytest.mark.slow
def test_a_base_model_answers_in_two_seconds_on_two_cores():
    model = models_mae.mae_vit_base_patch16().eval()  # random: nobody looks at it
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))
    try:
        seconds = []
        for seed in range(3):
            start = time.perf_counter()
            removed = drawing.random_mask(model, 75, seed)
            drawing.row_of(drawing.draw(model, picture(size=(1024, 768)), removed), removed, (14, 14))
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(seconds) < 2, seconds
    # where the CPU computes in bf16, so does the page: two grey levels from float32 at most
    image = picture(size=(1024, 768))
    ratio, noise = mask_noise(torch.tensor([removed]))
    expected = (
        255 * reconstruct(model, from_images([image], (224, 224)), ratio, noise).pasted[0].permute(1, 2, 0).numpy()
    )
    assert np.abs(np.asarray(drawing.draw(model, image, removed).pasted) - expected).mean() < 2


# what a Space needs


def space_header():
    text = (ROOT / "demo" / "README.md").read_text()
    return dict(line.split(": ", 1) for line in text.split("---\n")[1].splitlines())


def test_the_header_is_that_of_a_space_of_this_app():
    header = space_header()
    assert header["sdk"] == "gradio" and header["sdk_version"].split(".")[0] == gr.__version__.split(".")[0]
    assert (ROOT / header["app_file"]).samefile(app.__file__)
    assert len(header["short_description"]) <= 60 and header["license"] == "cc-by-nc-4.0"
    assert {"title", "emoji", "colorFrom", "colorTo"} <= header.keys()


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A folder that has what the README copies into a Space and nothing else, and two checkpoints."""
    space = tmp_path_factory.mktemp("space").rename(tmp_path_factory.getbasetemp() / "space")
    commands = re.search(r"```bash\n(cp -r demo .*?)```", (ROOT / "demo" / "README.md").read_text(), re.S)[1]
    subprocess.run(["bash", "-ec", commands.replace("space/", f"{space}/")], cwd=ROOT, check=True)
    for folder in (space / "demo").glob("output*"):
        shutil.rmtree(folder)
    saved(space, "pixels.pth")
    saved(space, "normalised.pth", norm_pix_loss=True)
    return space


@pytest.fixture(scope="module")
def address(space):
    """Where the page is served."""
    checkpoints = [str(space / "pixels.pth"), str(space / "normalised.pth")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, space_header()["app_file"], *checkpoints, "--port", str(port)]
    quiet = {
        "GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(space / "tmp"),
        "TORCH_HOME": str(space / "torch"), "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    with (space / "log.txt").open("w") as log:
        server = subprocess.Popen(command, cwd=space, env={**os.environ, **quiet}, stdout=log, stderr=log)
        try:
            for _ in range(240):
                assert server.poll() is None, (space / "log.txt").read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(20)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


# what anybody may send


class Caller:
    """A program that talks to the page as its own scripts do."""

    def __init__(self, address):
        self.address, self.session, self.http = address, uuid.uuid4().hex, httpx.Client(timeout=60)
        config = self.http.get(f"{address}/config").json()
        self.functions = {entry["api_name"]: entry for entry in config["dependencies"]}
        self.valid = {
            "start": [None, "pixels (space)", handlers.NOTHING, 75, 0], "mask_again": [None, 75, 0],
            "next_mask": [None, 75, 0], "paint": [None], "pick": [None], "new_image": [None, None],
            "another_source": [None, "answer"], "animate_ratio": [None, 75, 0], "animate_seed": [None, 75, 0],
        }  # fmt: skip
        self.valid["start_1"] = self.valid["start_2"] = self.valid["start"]
        self.valid |= {"fetch": self.valid["start"][:3], "back": [None], "settle": [None, 75, 0]}

    def __call__(self, name, data=None, event=None):
        """-> (whether it succeeded, what was answered, as text)."""
        body = {
            "data": self.valid[name] if data is None else data, "fn_index": self.functions[name]["id"],
            "session_hash": self.session, "event_data": event,
        }  # fmt: skip
        joined = self.http.post(f"{self.address}/gradio_api/queue/join", json=body)
        if joined.status_code != 200:
            return False, joined.text
        where = {"session_hash": self.session}
        with self.http.stream("GET", f"{self.address}/gradio_api/queue/data", params=where) as answer:
            for line in answer.iter_lines():
                if line.startswith("data:") and (told := json.loads(line[5:]))["msg"] == "process_completed":
                    return told["success"], json.dumps(told["output"])
        raise AssertionError("no answer")

    def upload(self, content, name="a.png"):
        return self.http.post(f"{self.address}/gradio_api/upload", files={"files": (name, content)})


@pytest.fixture
def caller(address):
    caller = Caller(address)
    assert caller("start")[0]
    return caller


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def places(space):
    """Where no visitor may have a picture from: (what an event could name, the folder that uploads lie in)."""
    folder = space / "tmp"
    secret = space / "secret.png"
    secret.write_bytes(png(picture(9)))
    inside = folder / "planted"
    inside.mkdir(parents=True, exist_ok=True)
    for name in ("link.png", "fifo.png", "folder", "up"):
        (inside / name).unlink(missing_ok=True) if name != "folder" else (inside / name).mkdir(exist_ok=True)
    (inside / "link.png").symlink_to(secret)
    (inside / "up").symlink_to(space)
    os.mkfifo(inside / "fifo.png")
    return {
        "absolute": secret, "parents": f"{folder}/../secret.png", "link": inside / "link.png",
        "link to a folder": inside / "up" / "secret.png", "fifo": inside / "fifo.png", "folder": inside / "folder",
        "the upload folder": folder, "device": "/dev/zero", "terminal": "/dev/tty", "proc": "/proc/self/environ",
        "nothing": "", "missing": folder / "a" / "b.png", "sibling": f"{folder}-other/secret.png", 
        "nul": f"{secret}\0.png",
        "long": "a/" * 50_000, "relative": "secret.png", "web": "http://127.0.0.1:9/a.png", "url": f"file://{secret}",
        "number": 7, "none": None, "list": [str(secret)], "dict": {"path": str(secret)},
    }  # fmt: skip


@pytest.mark.slow
def test_an_upload_event_reads_nothing_but_uploads(space, caller):
    for what, path in places(space).items():
        path = os.fspath(path) if isinstance(path, os.PathLike) else path
        for more in ({}, {"meta": {"_type": "gradio.FileData"}}, {"url": path}, {"is_stream": True}):
            ok, answer = caller("new_image", [None, {"path": path, **more}])
            assert not ok and json.loads(answer)["error"], (what, more, answer)
            assert str(space) not in answer, (what, more)
    assert (space / "secret.png").exists()
    for value in (None, "secret.png", 7, [], {}, {"url": "data:image/png;base64,AAAA"}, True):
        ok, answer = caller("new_image", [None, value])
        assert not ok and json.loads(answer)["error"]
    assert "Traceback" not in (space / "log.txt").read_text()


@pytest.mark.slow
def test_an_upload_is_shown_and_then_gone(space, caller):
    for kind in ("png", "jpeg", "webp", "gif", "bmp"):
        file = io.BytesIO()
        picture(3).save(file, kind)
        path = caller.upload(file.getvalue(), f"a.{kind}").json()[0]
        ok, answer = caller("new_image", [None, {"path": path, "meta": {"_type": "gradio.FileData"}}])
        assert ok and "data:image/png" in answer and str(space) not in answer
        assert not os.path.exists(path)
    for kind in ("tiff", "ppm", "eps", "ico"):  # pictures, but of formats that nobody needs here
        file = io.BytesIO()
        picture(3, (16, 16)).save(file, kind)
        path = caller.upload(file.getvalue(), f"a.{kind}").json()[0]
        ok, answer = caller("new_image", [None, {"path": path, "meta": {"_type": "gradio.FileData"}}])
        assert not ok and "cannot be read as a picture" in answer
        assert not os.path.exists(path)


@pytest.mark.slow
def test_uploads_of_all_visitors_together_have_a_limit(space, caller):
    full = space / "tmp" / "of_others"
    with full.open("wb") as file:
        file.truncate((uploads.TOTAL_MEGABYTES - 10) * 2**20)  # sparse
    refused = caller.upload(png(picture()))
    full.unlink()
    assert refused.status_code == 507 and "try again" in refused.text
    assert caller.upload(png(picture())).status_code == 200
    assert caller.upload(bytes(uploads.MAX_BODY)).status_code == 413
    many = [("files", ("a.png", b"x"))] * 2
    assert caller.http.post(f"{caller.address}/gradio_api/upload", files=many).status_code == 413
    assert not caller("paint", event={"mask": "01" * 2**20})[0]


BAD = [
    None, True, False, [], {}, "", "x", "75", "../../etc/passwd", -1, 0.5, 1e308, -(10**30), 10**400, [75],
    {"value": 75},
    "encoder.pth", "mae_pretrain_vit_base", {"__type__": "update", "choices": ["x"]}, "\x1b[31m\0", "y" * 5000,
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, [["deep"] * 20] * 20,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["start", "start_1", "fetch", "mask_again", "settle", "next_mask", "new_image", "another_source", "animate_seed"],
)
def test_a_bad_value_in_any_place_gets_words(space, caller, name):
    valid = caller.valid[name]
    for place in range(1, len(valid)):
        for bad in BAD:
            ok, answer = caller(name, [*valid[:place], bad, *valid[place + 1 :]])
            assert ok or json.loads(answer).get("error") or json.loads(answer).get("detail"), (place, bad, answer[:200])
            assert len(answer) < 2000 or ok, (place, bad)
            assert str(space) not in answer and "/etc/passwd" not in answer
    for data in ([], [None] * 50, [None] * len(valid)):
        ok, answer = caller(name, data)
        assert ok or json.loads(answer).get("error")
    assert caller(name)[0] or name == "new_image", "and the page goes on"
    assert "Traceback" not in (space / "log.txt").read_text()


@pytest.mark.slow
def test_bad_events_of_painting_and_picking_get_words(space, caller):
    values = [*BAD, "01" * 31, "0" * 64, "1" * 64, "2" * 64, "０" * 64, 99, -1, 2.5]
    for name, field in (("paint", "mask"), ("pick", "index")):
        for event in [*BAD, *({field: value} for value in values)]:
            good = name == "pick" and event in ({field: 0.5}, {field: 2.5})  # rounded
            ok, answer = caller(name, event=event)
            assert ok == good, (name, event, answer[:200])
            assert ok or json.loads(answer)["error"]
    assert caller("paint", event={"mask": "01" * 32})[0] and caller("pick", event={"index": 4})[0]
    stranger = Caller(caller.address)  # has not opened the page
    for name in ("mask_again", "next_mask", "another_source", "settle", "animate_seed", "paint", "pick"):
        ok, answer = stranger(name, event={"mask": "01" * 32, "index": 0})
        assert not ok and "reload the page" in answer
    assert "Traceback" not in (space / "log.txt").read_text()


@pytest.mark.slow
def test_no_answer_names_a_folder_of_the_server(space, caller):
    pages = [caller.http.get(caller.address + path).text for path in ("/", "/config", "/gradio_api/info")]
    answers = [caller(name, event={"mask": "01" * 32, "index": 1})[1] for name in caller.valid if name != "new_image"]
    for text in pages + answers:
        for folder in (space, ROOT, sys.prefix, os.path.expanduser("~"), "pixels.pth"):
            assert str(folder) not in text
    for path in (space / "pixels.pth", space / "log.txt", "/etc/passwd", space / "tmp" / ".." / "log.txt"):
        assert caller.http.get(f"{caller.address}/gradio_api/file={path}").status_code in (403, 404)


# in a browser


class Visitor:
    """Somebody with the page open."""

    def __init__(self, browser, address, width=1280, height=900):
        self.page = browser.new_context(viewport={"width": width, "height": height}).new_page()
        self.page.set_default_timeout(30_000)
        self.errors = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#pasted img")
        self.page.wait_for_function("document.querySelector('#loss').innerText.includes('Loss')")

    def loss(self):
        return self.page.inner_text("#loss")

    def hidden(self):
        return int(re.search(r"over (\d+) hidden", self.loss())[1])

    def mask(self):
        """Which patches look hidden, "0110..." in image order."""
        return "".join(self.page.eval_on_selector_all(".paint i", "all => all.map(cell => cell.className ? '1' : '0')"))

    def slider(self):
        return int(self.page.input_value("#ratio input[type=number]"))

    def pictures(self):
        return [self.page.get_attribute(f"#{kind} img", "src") for kind in drawing.CAPTIONS]

    def after(self, action):
        """Do something that redraws; returns the pictures before and after."""
        before, said = self.pictures(), self.loss()
        action()
        self.page.wait_for_function("old => document.querySelector('#loss').innerText != old", arg=said)
        self.page.wait_for_timeout(300)
        return before, self.pictures()

    def stroke(self, *patches, grid=(8, 8)):
        """Drag over these (row, column) in the second picture."""
        box = self.page.locator(".paint").bounding_box()
        mouse = self.page.mouse
        for i, (row, column) in enumerate(patches):
            x, y = (column + 0.5) / grid[1] * box["width"], (row + 0.5) / grid[0] * box["height"]
            mouse.move(box["x"] + x, box["y"] + y)
            if not i:
                mouse.down()
        mouse.up()


@pytest.mark.slow
def test_a_visitor_changes_mask_picture_and_model(address, browser, tmp_path):
    visitor = Visitor(browser, address)
    page = visitor.page
    assert visitor.hidden() == 48 == visitor.mask().count("1")

    before, after = visitor.after(lambda: page.fill("#ratio input[type=number]", "50"))
    assert visitor.hidden() == 32 == visitor.mask().count("1")
    assert before[0] == after[0] and all(a != b for a, b in zip(before[2:], after[2:], strict=True))

    def press():
        page.focus("#ratio input[type=range]")
        page.keyboard.press("ArrowRight")

    visitor.after(press)
    assert visitor.hidden() == 33, "the slider itself"
    for typed, hidden in (("100", 63), ("", 1), ("0", 1), ("50", 32)):
        page.fill("#ratio input[type=number]", typed)
        page.keyboard.press("Tab")
        page.wait_for_timeout(1000)
        assert (visitor.slider(), visitor.hidden()) == (round(hidden / 0.64), hidden), typed
        assert page.locator(".toast-body").count() == 0
    assert page.locator("#ratio button").count() == 0, "gradio's reset sets the number alone"

    before, after = visitor.after(lambda: page.click("#again"))
    assert before[2] != after[2]
    before, after = visitor.after(lambda: page.locator("#examples button").nth(3).click())
    assert before[0] != after[0]

    picture(5, (300, 200)).save(tmp_path / "mine.jpg")
    before, after = visitor.after(lambda: page.set_input_files("#upload input[type=file]", tmp_path / "mine.jpg"))
    assert all(a != b for a, b in zip(before, after, strict=True))

    assert not page.is_visible("#statistics")

    def choose_the_other():
        page.click("#model input")
        page.click("text=normalised (space)")

    before, after = visitor.after(choose_the_other)
    assert "visible neighbours" in visitor.loss() and page.is_visible("#statistics")
    assert before[0] == after[0], "the visitor's own picture stays"

    def choose_with_keys(key):
        page.focus("#model input")
        page.wait_for_timeout(300)
        page.keyboard.press(key)
        page.wait_for_timeout(300)
        page.keyboard.press("Enter")

    visitor.after(lambda: choose_with_keys("ArrowUp"))
    assert page.input_value("#model input") == "pixels (space)" and not page.is_visible("#statistics")
    page.click("#intro h1")
    visitor.after(lambda: choose_with_keys("ArrowDown"))
    before, after = visitor.after(lambda: page.click("text=using the answer"))
    assert "Uses the answer" in visitor.loss() and before[2] != after[2] and before[:2] == after[:2]
    assert not visitor.errors


@pytest.mark.slow
def test_patches_are_painted_by_clicking_and_dragging_and_the_slider_follows(address, browser):
    visitor = Visitor(browser, address)
    at_first, mask = visitor.pictures(), visitor.mask()
    corner = (0, 0)
    visitor.after(lambda: visitor.stroke(corner))
    assert visitor.mask() == ("0" if mask[0] == "1" else "1") + mask[1:]
    visitor.after(lambda: visitor.stroke(corner))
    assert (visitor.mask(), visitor.pictures()) == (mask, at_first), "the same patch back"

    # a stroke does to all its patches what it does to the first, also to those that a fast pointer skips
    for row in (1, 6):
        mask = visitor.mask()
        hide = mask[8 * row] == "0"
        visitor.after(lambda row=row: visitor.stroke((row, 0), (row, 7)))
        assert visitor.mask() == mask[: 8 * row] + ("1" if hide else "0") * 8 + mask[8 * row + 8 :]
        assert visitor.hidden() == visitor.mask().count("1")
        assert abs(visitor.slider() - 100 * visitor.hidden() / 64) <= 0.5

    # nothing may be left to see, or to predict: a note, and the picture stays as it was
    visitor.after(lambda: visitor.page.fill("#ratio input[type=number]", "99"))
    mask = visitor.mask()
    assert mask.count("0") == 1
    visitor.stroke(divmod(mask.index("0"), 8))
    visitor.page.wait_for_selector("text=Leave at least one patch to see")
    assert visitor.mask() == mask and not visitor.errors


@pytest.mark.slow
def test_patches_are_painted_with_keys_and_the_result_is_told(address, browser):
    visitor = Visitor(browser, address)
    page, mask = visitor.page, visitor.mask()

    def press(*keys):
        for key in keys:
            page.keyboard.press(key)

    page.focus(".paint")
    visitor.after(lambda: press("ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowUp", "ArrowUp", "Space"))
    assert [i for i in range(64) if visitor.mask()[i] != mask[i]] == [1], "not beyond the border"
    assert page.inner_text(".status") == visitor.loss() and page.locator(".paint i[data-at]").count() == 1
    visitor.after(lambda: press("ArrowDown", "Enter"))  # the new drawing has the focus
    assert [i for i in range(64) if visitor.mask()[i] != mask[i]] == [1, 9]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.paint') === null")
    assert not visitor.errors


CONTRAST = r"""selector => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\d.]+/g).map(Number).map(v => colour.startsWith("rgb") ? v / 255 : v)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const text = light(getComputedStyle(document.querySelector(selector)).color);
  let below = document.querySelector(selector);
  while (/^rgba.*, 0\)$/.test(getComputedStyle(below).backgroundColor)) below = below.parentElement;
  const ground = light(getComputedStyle(below).backgroundColor);
  return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_on_their_ground(address, browser, scheme):
    page = browser.new_context(color_scheme=scheme).new_page()
    page.goto(address)
    page.wait_for_selector("#loss")
    page.eval_on_selector("#loss", "all => all.insertAdjacentHTML('beforeend', '<p class=hint>This model</p>')")
    for selector in ("#about p", "#loss .hint", ".pictures figcaption a"):
        assert page.evaluate(CONTRAST, selector) > 4.5, selector  # what WCAG 2 asks for


@pytest.mark.slow
def test_two_models_side_by_side_and_an_animation_to_save(address, browser):
    visitor = Visitor(browser, address)
    page = visitor.page

    def choose_another():
        page.click("#other input")
        page.locator("[role=option]", has_text="normalised (space)").click()

    visitor.after(choose_another)
    assert page.locator("#board .pictures").count() == 2 and visitor.loss().count("Loss") == 2
    assert page.locator("#board h3").all_inner_texts() == ["pixels (space)", "normalised (space)"]
    shown = page.eval_on_selector_all("#board .cells", "all => all.map(cells => cells.innerHTML)")
    assert shown[0] == shown[1], "the same patches hidden"

    for way in handlers.WAYS:
        page.click(f"#by_{way}")
        page.wait_for_selector(f"#animation a[download*={way}]")
        with page.expect_download() as saved_gif:
            page.click("#animation a")
        with Image.open(saved_gif.value.path()) as gif:
            assert gif.format == "GIF" and gif.n_frames >= handlers.SEEDS
    with page.expect_download() as saved_picture:
        page.click("#pasted a")
    with Image.open(saved_picture.value.path()) as image:
        assert image.size == (256, 256)
    assert not visitor.errors


@pytest.mark.slow
def test_a_model_that_cannot_be_fetched_leaves_the_old_one_and_one_message(address, browser):
    visitor, other = Visitor(browser, address), Visitor(browser, address)
    page, before, asked = visitor.page, visitor.pictures(), []
    page.on("request", lambda request: asked.append("ViT-B, pixels" in (request.post_data or "")))
    page.click("#model input")
    page.click("text=ViT-B, pixels")
    other.after(lambda: other.page.click("#again"))  # meanwhile
    assert page.locator(".toast-body").count() == 0, "still fetching"
    page.wait_for_selector("text=cannot download", timeout=90_000)
    page.wait_for_timeout(1000)
    assert page.locator(".toast-body").count() == 1 == sum(asked), "tried once"
    assert page.input_value("#model input") == "pixels (space)" and visitor.pictures() == before
    assert "Error" not in page.inner_text("#about") and "processing" not in page.inner_text("#about")
    visitor.after(lambda: page.click("#again"))  # and the page goes on, with the old one
    assert "pixels (space)" in page.inner_text("#about") or "does not tell" in page.inner_text("#about")


@pytest.mark.slow
def test_broken_and_huge_files_get_a_note_and_change_nothing(address, browser, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    png_of(10_000, 8_000, tmp_path / "huge.png")
    (tmp_path / "heavy.jpg").write_bytes(b"\xff\xd8\xff" + bytes(21 * 2**20))
    for name, note in (("broken.jpg", "cannot be read"), ("huge.png", "80 megapixels"), ("heavy.jpg", "20.0 Mb")):
        visitor = Visitor(browser, address)
        before = visitor.pictures()
        visitor.page.set_input_files("#upload input[type=file]", tmp_path / name)
        visitor.page.wait_for_selector(f"text={note}")
        assert visitor.pictures() == before
        # an image that is still loading, or that gives way to its note, is none to look at
        broken = "image => !image.naturalWidth && getComputedStyle(image).visibility != 'hidden'"
        visitor.page.wait_for_function(f"() => ![...document.images].some({broken})", timeout=10_000)
        visitor.page.wait_for_selector("text=Drop a picture of yours here")
        visitor.after(lambda page=visitor.page: page.click("#again"))  # and the page goes on
        visitor.page.set_input_files("#upload input[type=file]", tmp_path / name)  # the same note again
        visitor.page.wait_for_function("count => document.querySelectorAll('.toast-body').length >= 1", arg=1)


@pytest.mark.slow
def test_two_visitors_have_their_own_pictures_and_masks(address, browser):
    ann, bob = Visitor(browser, address), Visitor(browser, address)
    ann.after(lambda: ann.page.fill("#ratio input[type=number]", "90"))
    bob.after(lambda: bob.page.locator("#examples button").nth(2).click())
    assert (ann.hidden(), bob.hidden()) == (58, 48)
    assert ann.pictures()[0] != bob.pictures()[0]
    hers = ann.pictures()
    bob.after(lambda: bob.page.click("#again"))
    assert ann.pictures() == hers
    ann.after(lambda: ann.page.click("#again"))
    assert (ann.hidden(), bob.hidden()) == (58, 48) and ann.pictures()[0] == hers[0]


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_width(address, browser, width):
    visitor = Visitor(browser, address, width)
    assert visitor.page.evaluate("document.documentElement.scrollWidth") == width
    boxes = [visitor.page.locator(f"#{kind} img").bounding_box() for kind in drawing.CAPTIONS]
    in_a_row = 2 if width < 760 else 4
    assert len({round(box["y"]) for box in boxes}) == 4 // in_a_row
    assert all(width / in_a_row * 0.75 < box["width"] < width / in_a_row for box in boxes)
