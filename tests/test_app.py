"""The demo's page: its functions, and the page itself in a real headless Chromium, as a Space would run it."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zlib

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

import models_mae
from util.visualize import from_images, mask_noise, reconstruct

gr = pytest.importorskip("gradio")

from demo import app  # noqa: E402


def saved(folder, name, **options):
    """A checkpoint whose weights are random, but there."""
    torch.manual_seed(0)
    model = models_mae.mae_vit_tiny_patch4(**options)
    args = {"model": "mae_vit_tiny_patch4", "input_size": model.patch_embed.img_size}
    args["norm_pix_loss"] = model.norm_pix_loss
    torch.save({"model": model.state_dict(), "args": args}, folder / name)
    return str(folder / name)


def picture(seed=0, size=(60, 40)):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


# functions


def test_a_drawing_depends_on_what_it_is_given_and_is_that_of_the_module(tmp_path):
    source = saved(tmp_path, "a.pth", img_size=(16, 32))
    removed = app.random_mask(source, 0.75, 3)
    assert sum(removed) == 24 and removed != app.random_mask(source, 0.75, 4)
    first = app.draw(source, picture(0), removed, "neighbours")
    app.draw(source, picture(1), app.random_mask(source, 0.5, 1), "neighbours")  # another visitor
    second = app.draw(source, picture(0), removed, "neighbours")
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first[:4], second[:4], strict=True))
    model = app.model_of(source)
    ratio, noise = mask_noise(torch.tensor([removed]))
    expected = reconstruct(model, from_images([picture(0)], (16, 32)), ratio, noise)
    assert f"Loss {expected.loss:.4f}** over 24 hidden of 32 patches" in first[4]
    assert first[3].size == (896, 448)
    small = np.asarray(first[3].resize((32, 16), Image.Resampling.NEAREST)) / 255
    np.testing.assert_allclose(small, expected.pasted[0].permute(1, 2, 0).numpy(), atol=1 / 255)


def test_a_model_of_normalised_pixels_says_whose_statistics_it_shows(tmp_path):
    source = saved(tmp_path, "n.pth", norm_pix_loss=True)
    removed = app.random_mask(source, 0.75, 0)
    drawn = {choice: app.draw(source, picture(), removed, choice) for choice in app.STATISTICS.values()}
    assert "visible neighbours" in drawn["neighbours"][4] and "Uses the answer" in drawn["answer"][4]
    assert drawn["neighbours"][2].tobytes() != drawn["answer"][2].tobytes()


@pytest.mark.parametrize("size", [32, (16, 48)])
def test_a_click_anywhere_in_a_patch_hides_or_shows_that_patch(tmp_path, size):
    source = saved(tmp_path, "c.pth", img_size=size)
    rows, columns = app.model_of(source).patch_embed.grid_size
    width, height = 56 * columns, 56 * rows
    removed = app.random_mask(source, 0.5, 0)
    for row, column in np.ndindex(rows, columns):
        for x, y in ((0, 0), (55.9, 55.9)):
            after = app.toggle(source, removed, 56 * column + x, 56 * row + y, width, height)
            changed = [i for i, (a, b) in enumerate(zip(removed, after, strict=True)) if a != b]
            assert changed == [row * columns + column]
    assert len(app.toggle(source, removed, width, height, width, height)) == len(removed), "on the very edge"


def test_impossible_wishes_get_a_note(tmp_path):
    source = saved(tmp_path, "a.pth")
    with pytest.raises(gr.Error, match="drop a picture first"):
        app.draw(source, None, app.random_mask(source, 0.5, 0), "neighbours")
    for removed in ([True] * 64, [False] * 64):
        with pytest.raises(gr.Error, match="Leave at least one patch to see, and hide at least one"):
            app.draw(source, picture(), removed, "neighbours")
    weights = {"patch_embed.proj.weight": torch.zeros(1), "cls_token": torch.zeros(1)}
    torch.save({"model": weights, "args": {"model": "mae_vit_tiny_patch4"}}, tmp_path / "encoder.pth")
    with pytest.raises(gr.Error, match="cannot reconstruct.*mae_visualize_vit"):
        app.model_of(str(tmp_path / "encoder.pth"))


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
            app.open_upload(path)
    picture().save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(gr.Error, match="cannot be read as a picture"):
        app.open_upload(path)
    png_of(10_000, 8_000, path)
    start = time.perf_counter()
    with pytest.raises(gr.Error, match="80 megapixels"):
        app.open_upload(path)
    png_of(100_000, 100_000, path)
    with pytest.raises(gr.Error, match="far too large"):
        app.open_upload(path)
    assert time.perf_counter() - start < 1, "without decoding"


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_pictures_of_every_kind_are_welcome(tmp_path, mode):
    ending = {"CMYK": "jpg"}.get(mode, "png")
    image = picture(size=(2000, 50)).convert("L" if mode == "I;16" else mode).convert(mode)
    image.save(tmp_path / f"a.{ending}")
    opened = app.open_upload(tmp_path / f"a.{ending}")
    assert opened.mode == "RGB" and opened.size[0] <= 1024


def test_a_photograph_is_turned_as_the_camera_was(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(size=(60, 40)).save(tmp_path / "a.jpg", exif=exif)
    assert app.open_upload(tmp_path / "a.jpg").size == (40, 60)


def test_checkpoints_given_come_before_the_environment_s_and_the_demo_s(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "ROOT", tmp_path)
    monkeypatch.delenv("MAE_CHECKPOINT", raising=False)
    assert app.local_checkpoints([]) == {}
    trained = tmp_path / "demo" / "output" / "pretrain"
    trained.mkdir(parents=True)
    for i, name in enumerate(("checkpoint-99.pth", "checkpoint-4.pth")):
        (trained / name).touch()
        os.utime(trained / name, (i, i))
    assert app.local_checkpoints([]) == {"checkpoint-4 (pretrain)": str(trained / "checkpoint-4.pth")}
    monkeypatch.setenv("MAE_CHECKPOINT", "/a/b.pth")
    assert app.local_checkpoints([]) == {"b (a)": "/a/b.pth"}
    assert list(app.local_checkpoints(["x/c.pth", "y/c.pth"])) == ["c (x)", "c (y)"]


def test_without_weights_the_server_does_not_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["app.py", str(tmp_path / "lost.pth")])
    with pytest.raises(SystemExit) as left:
        app.main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "no checkpoint" in said and "lost.pth" in said and "make demo" in said


@pytest.mark.slow
def test_a_base_model_answers_in_two_seconds_on_two_cores(monkeypatch):
    model = models_mae.mae_vit_base_patch16().eval()  # random: nobody looks at it
    monkeypatch.setattr(app, "_opened", lambda source: model)
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))
    try:
        seconds = []
        for seed in range(3):
            start = time.perf_counter()
            app.draw("base", picture(size=(1024, 768)), app.random_mask("base", 0.75, seed), "neighbours")
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(seconds) < 2, seconds


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
def address(tmp_path_factory):
    """Where the page is served, from a folder that has what the README copies into a Space and nothing else."""
    space = tmp_path_factory.mktemp("space")
    commands = re.search(r"```bash\n(cp -r demo .*?)```", (ROOT / "demo" / "README.md").read_text(), re.S)[1]
    subprocess.run(["bash", "-ec", commands.replace("space/", f"{space}/")], cwd=ROOT, check=True)
    shutil.rmtree(space / "demo" / "output", ignore_errors=True)
    checkpoints = [saved(space, "pixels.pth"), saved(space, "normalised.pth", norm_pix_loss=True)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, space_header()["app_file"], *checkpoints, "--port", str(port)]
    quiet = {"GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(space / "tmp")}
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

    def pictures(self):
        return [self.page.get_attribute(f"#{kind} img", "src") for kind in app.KINDS]

    def after(self, action):
        """Do something that redraws; returns the pictures before and after."""
        before, said = self.pictures(), self.loss()
        action()
        self.page.wait_for_function("old => document.querySelector('#loss').innerText != old", arg=said)
        self.page.wait_for_timeout(300)
        return before, self.pictures()


@pytest.mark.slow
def test_a_visitor_changes_mask_picture_and_model(address, browser, tmp_path):
    visitor = Visitor(browser, address)
    page = visitor.page
    assert visitor.hidden() == 48

    before, after = visitor.after(lambda: page.fill("#ratio input[type=number]", "0.5"))
    assert visitor.hidden() == 32
    assert before[0] == after[0] and all(a != b for a, b in zip(before[1:], after[1:], strict=True))

    def press():
        page.focus("#ratio input[type=range]")
        page.keyboard.press("ArrowRight")

    visitor.after(press)
    assert visitor.hidden() == 36, "the slider itself"

    box = page.locator("#masked img").bounding_box()
    count = visitor.hidden()
    before, after = visitor.after(lambda: page.mouse.click(box["x"] + 5, box["y"] + 5))
    assert abs(visitor.hidden() - count) == 1 and before[1] != after[1] and before[0] == after[0]
    visitor.after(lambda: page.mouse.click(box["x"] + 5, box["y"] + 5))
    assert visitor.hidden() == count and visitor.pictures() == before, "the same patch back"

    before, after = visitor.after(lambda: page.click("#again"))
    assert before[1] != after[1]
    before, after = visitor.after(lambda: page.locator("#examples button").nth(3).click())
    assert before[0] != after[0]

    picture(5, (300, 200)).save(tmp_path / "mine.jpg")
    before, after = visitor.after(lambda: page.set_input_files("#upload input[type=file]", tmp_path / "mine.jpg"))
    assert all(a != b for a, b in zip(before, after, strict=True))

    assert not page.is_visible("#statistics")

    def choose_the_other():
        page.click("#model input")
        page.click("text=normalised (")

    visitor.after(choose_the_other)
    assert "visible neighbours" in visitor.loss() and page.is_visible("#statistics")
    before, after = visitor.after(lambda: page.click("text=using the answer"))
    assert "Uses the answer" in visitor.loss() and before[2] != after[2] and before[:2] == after[:2]
    assert not visitor.errors


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
        visitor.after(lambda page=visitor.page: page.click("#again"))  # and the page goes on


@pytest.mark.slow
def test_two_visitors_have_their_own_pictures_and_masks(address, browser):
    ann, bob = Visitor(browser, address), Visitor(browser, address)
    ann.after(lambda: ann.page.fill("#ratio input[type=number]", "0.9"))
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
    boxes = [visitor.page.locator(f"#{kind} img").bounding_box() for kind in app.KINDS]
    in_a_row = 2 if width < 760 else 4
    assert len({round(box["y"]) for box in boxes}) == 4 // in_a_row
    assert all(width / in_a_row * 0.75 < box["width"] < width / in_a_row for box in boxes)
