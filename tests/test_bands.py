"""Images of any number of channels, of uint8, uint16 and float32: reading, normalising, and all scripts over them."""

import builtins
import contextlib
import io
import json
import shutil
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from helpers import ON_CPU, load, project_log, write_image, write_image_folder
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_evaluate
import main_finetune
import main_linprobe
import main_pretrain
import models_mae
import models_vit
from util import cli, export, rng
from util.data import bands, measure
from util.data.bands import RGB, Bands
from util.data.datasets import Images
from util.data.listing import list_images
from util.data.loader import normalise
from util.data.readers import pretraining_images
from util.dist import Dist
from util.errors import UserError
from util.look.features import from_files
from util.look.visualize import from_images, picture_range, reconstruct, to_pixels
from util.transforms import crop_and_resize, eval_transform, finetune_transform, pretrain_transform
from util.weights import build, checkpoint

TOP = {"uint8": 255, "uint16": 65535, "float32": 1}
CHANNELS, TYPES = (1, 3, 4, 13), tuple(TOP)
SMALL = ("--input_size", 32, "--batch_size", 4, "--num_workers", 0, "--warmup_epochs", 0, "--epochs", 1, *ON_CPU)
MAINS = {"pretrain": main_pretrain, "finetune": main_finetune, "linprobe": main_linprobe}


def values(key: int, channels: int, kind: str, size: tuple[int, int] = (20, 24)) -> np.ndarray:
    """Random [H, W, C] over the whole range of the type; floats are 0 to 1."""
    return (np.random.default_rng(key).random((*size, channels)) * TOP[kind]).astype(kind)


def write_values(root, channels, kind, ending):
    """train/ and val/ with classes a and b; returns all training values in units of 0..1, [n, C]."""
    everything = []
    for key, (split, name, i) in enumerate((s, n, i) for s in ("train", "val") for n in "ab" for i in range(3)):
        image = values(key, channels, kind)
        path = root / split / name / f"{i}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if ending == "npy":
            np.save(path, image if i else image.transpose(2, 0, 1))
        else:
            tifffile.imwrite(path, image[:, :, 0] if channels == 1 else image)
        if split == "train":
            everything.append(image.reshape(-1, channels).astype(np.float64) / TOP[kind])
    return np.concatenate(everything)


def start(name, data, *args, channels=None, output=""):
    """main() of a script in this process; what it says."""
    words = ["--data_path", data, *SMALL, "--output_dir", output, "--log_dir", output]
    words += ["--in_chans", channels] if channels else []
    words += ["--model", "mae_vit_tiny_patch4"] if name == "pretrain" else ["--model", "vit_tiny_patch4"]
    words += [] if name == "pretrain" else ["--nb_classes", 2]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        MAINS[name].main(MAINS[name].get_args_parser().parse_args([str(word) for word in (*words, *args)]))
    return said.getvalue()


def reader(channels: int) -> Bands:
    return Bands(channels, None, None, "stored")


def read(raw: bytes, channels: int) -> np.ndarray:
    """A file's bytes -> [H, W, C]."""
    pixels = reader(channels).read(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    return pixels.permute(1, 2, 0).numpy()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def stored(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# from data to results, through all scripts


@pytest.fixture(scope="module")
def thirteen(tmp_path_factory):
    """13 channels of uint16, pretrained for an epoch: data, folder of the run, its checkpoint."""
    root = tmp_path_factory.mktemp("thirteen")
    write_values(root / "data", 13, "uint16", "tif")
    start("pretrain", root / "data", "--picture_every", 1, channels=13, output=root / "run")
    return SimpleNamespace(data=root / "data", run=root / "run", last=root / "run" / "checkpoint-0.pth")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_all_scripts_take_any_channels_of_any_type(channels, kind, tmp_path):
    data = tmp_path / "data"
    everything = write_values(data, channels, kind, "npy" if channels == 3 and kind == "uint16" else "tif")
    said = start("pretrain", data, "--picture_every", 1, "--knn_every", 1, channels=channels, output=tmp_path / "p")
    assert "from here on" not in said and "k-NN Acc@1" in said
    events = EventAccumulator(str(tmp_path / "p"), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == ["reconstructions"]
    args = load(tmp_path / "p" / "checkpoint-0.pth")["args"]
    mean, std = (
        (RGB.mean, RGB.std) if (channels, kind) == (3, "uint8") else (everything.mean(axis=0), everything.std(axis=0))
    )
    assert type(args["mean"]) is list and args["pixel_type"] == kind and args["in_chans"] == channels
    np.testing.assert_allclose(args["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(args["std"], std, rtol=1e-6)

    pretrained = ("--finetune", tmp_path / "p" / "checkpoint-0.pth")
    start("finetune", data, "--aa", "", *pretrained, channels=channels, output=tmp_path / "f")
    start("linprobe", data, *pretrained, channels=channels, output=tmp_path / "l")
    for name, folder in (("finetune", "f"), ("linprobe", "l")):
        last = tmp_path / folder / "checkpoint-0.pth"
        assert load(last)["args"]["mean"] == args["mean"]
        said = start(name, data, "--eval", "--resume", last)  # not told again
        trained = json.loads((tmp_path / folder / "log.txt").read_text())
        assert f"loss {trained['test_loss']:.3f}" in said
    words = ["--resume", last, "--set", f"own={data / 'val'}", "--output_dir", tmp_path / "e", "--num_workers", 0]
    main_evaluate.main(main_evaluate.get_args_parser().parse_args([str(word) for word in (*words, *ON_CPU)]))
    found = json.loads((tmp_path / "e" / "results.json").read_text())["sets"]["own"]
    assert found["images"] == 6 and found["loss"] == pytest.approx(trained["test_loss"], rel=1e-4)


def test_a_run_goes_on_with_its_own_mean_and_std_whatever_the_images_are_now(thirteen, tmp_path):
    before = load(thirteen.last)["args"]
    write_values(tmp_path / "other", 13, "uint16", "npy")
    dim = tmp_path / "other" / "train" / "a" / "0.npy"
    np.save(dim, np.load(dim) // 100)
    for data in (thirteen.data, tmp_path / "other"):
        start("pretrain", data, "--resume", thirteen.last, "--epochs", 2, channels=13, output=tmp_path / data.name)
        after = load(tmp_path / data.name / "checkpoint-1.pth")["args"]
        assert (after["mean"], after["std"]) == (before["mean"], before["std"])
    write_values(tmp_path / "four", 4, "uint16", "npy")
    with pytest.raises(UserError, match="takes images of 13 channels, the model here of 4: pass --in_chans 13"):
        start("pretrain", tmp_path / "four", "--resume", thirteen.last, channels=4)


def test_exports_tell_how_images_are_prepared(thirteen, tmp_path):
    args = load(thirteen.last)["args"]
    source = str(thirteen.last)
    _, line = export.export(source, "timm", output=tmp_path / "x.timm.safetensors")
    assert "in_chans=13" in line and repr(tuple(args["mean"])) in line and repr(tuple(args["std"])) in line
    folder, _ = export.export(source, "hf", output=tmp_path / "x-hf")
    written = json.loads((folder / "preprocessor_config.json").read_text())
    assert written["rescale_factor"] == 1 / 65535 and written["image_mean"] == args["mean"]
    _, line = export.export(source, "detectron2", output=tmp_path / "d.pth", input_size=64, patch_size=16)
    assert "backbone.net.in_chans = 13" in line and "pretrain_img_size = 64" in line
    told = dict(part.split(" = ") for part in line.split("; "))
    for name in ("mean", "std"):  # detectron2 and mmsegmentation normalise the files' own values
        expected = [65535 * value for value in args[name]]
        np.testing.assert_allclose(json.loads(told[f"model.pixel_{name}"]), expected, rtol=1e-6)
    path, line = export.export(source, "mmseg", output=tmp_path / "m.pth", input_size=64, patch_size=16)
    model = eval(line.removeprefix("model = "))
    assert model["backbone"]["in_channels"] == 13 and model["backbone"]["patch_size"] == 16
    np.testing.assert_allclose(model["data_preprocessor"]["mean"], [65535 * m for m in args["mean"]], rtol=1e-6)
    assert load(path)["patch_embed.projection.weight"].shape == (64, 13, 16, 16)
    path, _ = export.export(source, "safetensors", part="full", output=tmp_path / "x.safetensors")
    whole, _ = export.export(source, "hf", part="full", output=tmp_path / "full-hf")
    for again in (path, tmp_path / "x.timm.safetensors", folder / "model.safetensors", whole / "model.safetensors"):
        model = build.open_model(again, encoder_only=again not in (path, whole / "model.safetensors"))
        assert bands.of_model(model) == bands.of_model(build.open_model(source)), again
    assert bands.of_model(build.open_model(source)) == Bands(13, tuple(args["mean"]), tuple(args["std"]), "uint16")


@pytest.mark.parametrize("kind", TYPES)
def test_detectors_are_told_imagenets_statistics_in_the_units_of_the_files(kind, tmp_path):
    mae = models_mae.MODELS["mae_vit_tiny_patch4"](img_size=32)
    args = {"mean": list(RGB.mean), "std": list(RGB.std), "pixel_type": kind}
    torch.save({"model": mae.state_dict(), "args": args}, tmp_path / "x.pth")
    for to, word in (("detectron2", "pixel_mean"), ("mmseg", "data_preprocessor")):
        _, line = export.export(str(tmp_path / "x.pth"), to, output=tmp_path / to)
        assert (word in line) == (kind != "uint8")  # which their configs have already
        assert (f"{TOP[kind] * RGB.mean[0]:.7g}" in line) == (kind != "uint8")


def test_pictures_show_the_first_three_bands_as_the_checkpoint_normalises(thirteen):
    model = build.open_model(thirteen.last)
    image = torch.from_numpy(values(3, 13, "uint16", (32, 32)))[None]
    imgs = normalise(image, torch.tensor([False]), bands.of_model(model))
    shown = reconstruct(model, imgs).original[0].permute(1, 2, 0)
    np.testing.assert_allclose(shown, image[0, :, :, :3].numpy() / 65535, atol=1e-5)
    with pytest.raises(UserError, match="13 channels"):
        from_images([Image.new("RGB", (40, 40))], (32, 32), bands.of_model(model))


@pytest.mark.parametrize(("channels", "dtype"), [(13, "uint16"), (1, "float32"), (4, "uint8")])
def test_files_become_what_a_model_was_trained_on(tmp_path, channels, dtype):
    mean, std = tuple(np.linspace(0.1, 0.6, channels)), tuple(np.linspace(0.2, 0.4, channels))
    model = models_mae.mae_vit_tiny_patch4(in_chans=channels)
    model.bands = {"in_chans": channels, "mean": mean, "std": std, "pixel_type": dtype}
    images = [values(i, channels, dtype, (36, 36)) for i in range(2)]  # evaluation resizes to 36 and cuts 32
    for i, image in enumerate(images):
        np.save(tmp_path / f"{i}.npy", image)
    found = from_files(sorted(tmp_path.iterdir()), model)
    top = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    expected = [(image[2:34, 2:34].reshape(32, 32, channels) / top - mean) / std for image in images]
    np.testing.assert_allclose(found.permute(0, 2, 3, 1).numpy(), np.stack(expected), rtol=1e-4, atol=1e-4)
    np.save(tmp_path / "1.npy", values(0, channels + 1, dtype, (36, 36)))
    with pytest.raises(UserError, match=rf"1\.npy has {channels + 1} channels .*--in_chans is {channels}"):
        from_files(sorted(tmp_path.iterdir()), model)


def test_a_dim_band_is_stretched_and_one_channel_is_grey():
    mean, std = (0.02, 0.5, 12.0), (0.01, 0.1, 4.0)
    imgs = torch.tensor([-2.0, 0.0, 2.0]).view(3, 1, 1, 1).expand(-1, 3, 1, 1)
    shown = to_pixels(imgs, **picture_range(mean, std))[:, :, 0, 0]
    assert torch.allclose(shown, torch.tensor([[0.0, 0.3, 0.0], [0.5, 0.5, 0.5], [1.0, 0.7, 1.0]]))
    assert torch.allclose(to_pixels(imgs[:, :1], [0.5], [0.1])[:, :, 0, 0], torch.tensor([[0.3], [0.5], [0.7]]))
    grey = from_images([Image.new("RGB", (40, 40), (10, 200, 90))], (32, 32), Bands(1, (0.0,), (1.0,), "uint8"))
    assert grey.shape == (1, 1, 32, 32) and grey[0, 0, 0, 0] * 255 == pytest.approx(131, abs=0.6)


def test_what_starts_from_a_file_takes_its_channels_mean_and_std_unless_given(thirteen, tmp_path):
    before = load(thirteen.last)["args"]
    write_values(tmp_path / "dim", 13, "float32", "npy")
    start_from = ("--finetune", thirteen.last)
    for name in ("finetune", "linprobe"):
        said = start(name, tmp_path / "dim", *start_from, *["--aa", ""][: 2 * (name == "finetune")], output=tmp_path)
        after = load(tmp_path / "checkpoint-0.pth")["args"]
        assert [after[key] for key in ("in_chans", "mean", "std")] == [13, before["mean"], before["std"]]
        assert after["pixel_type"] == "float32" and "unless given: in_chans 13, type uint16, mean and std" in said
        assert "images are of float32, not uint16" in said
        (tmp_path / "checkpoint-0.pth").unlink(), (tmp_path / "log.txt").unlink()
    start("pretrain", thirteen.data, "--init", thirteen.last, output=tmp_path / "init")
    assert load(tmp_path / "init" / "checkpoint-0.pth")["args"]["mean"] == before["mean"]
    given = ("--mean", *[0.5] * 13, "--std", *[0.25] * 13)
    start("linprobe", tmp_path / "dim", *start_from, *given, output=tmp_path / "given")
    assert load(tmp_path / "given" / "checkpoint-0.pth")["args"]["mean"] == [0.5] * 13


def test_weights_of_photographs_lend_their_mean_to_photographs_alone(tmp_path):
    write_image_folder(tmp_path / "photographs", 2, 1, ("a", "b"))
    own = ("--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.2, 0.1)
    start("pretrain", tmp_path / "photographs", *own, output=tmp_path / "p")
    pretrained = ("--finetune", tmp_path / "p" / "checkpoint-0.pth")
    start("linprobe", tmp_path / "photographs", *pretrained, output=tmp_path / "l")
    assert load(tmp_path / "l" / "checkpoint-0.pth")["args"]["mean"] == [0.5, 0.4, 0.3]
    everything = write_values(tmp_path / "deep", 3, "uint16", "npy")
    start("linprobe", tmp_path / "deep", *pretrained, channels=3, output=tmp_path / "d")
    np.testing.assert_allclose(load(tmp_path / "d" / "checkpoint-0.pth")["args"]["mean"], everything.mean(axis=0))


@pytest.mark.parametrize("given", ["in_chans: 3", "--in_chans 3"])
def test_in_chans_3_in_a_file_of_options_is_as_on_a_command_line(given, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(given if ":" in given else "seed: 1")
    words = ["main_pretrain.py", "--config", str(tmp_path / "config.yaml"), *(given.split() if "-" in given else [])]
    monkeypatch.setattr(sys, "argv", words)
    assert cli.parse(main_pretrain.get_args_parser(), "").pixel_type == "stored"
    (tmp_path / "config.yaml").write_text("pixel_type: rgb\nin_chans: 3")  # as runs write it
    assert cli.parse(main_pretrain.get_args_parser(), "").pixel_type == "rgb"


def test_validation_images_of_other_channels_are_told_before_training(tmp_path):
    write_values(tmp_path, 4, "uint8", "npy")
    np.save(tmp_path / "val" / "a" / "0.npy", values(0, 5, "uint8"))
    with pytest.raises(UserError, match="val/a/0.npy has 5 channels .*--in_chans is 4"):
        start("linprobe", tmp_path, channels=4, output=tmp_path / "out")
    assert "Epoch" not in (tmp_path / "out" / "train.log").read_text()


def test_images_to_judge_that_are_of_another_type_are_told(tmp_path):
    write_values(tmp_path, 4, "uint8", "tif")
    shutil.rmtree(tmp_path / "val")
    write_values(tmp_path / "other", 4, "float32", "npy")
    (tmp_path / "other" / "val").rename(tmp_path / "val")
    said = start("finetune", tmp_path, "--aa", "", channels=4, output=tmp_path)
    assert "images to validate on are of float32, not uint8 as those to train on: mean and std are in units" in said
    words = ["--resume", tmp_path / "checkpoint-0.pth", "--set", f"own={tmp_path / 'val'}", "--num_workers", 0]
    words = [str(word) for word in (*words, "--output_dir", tmp_path / "out", *ON_CPU)]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main_evaluate.main(main_evaluate.get_args_parser().parse_args(words))
    assert "images of own are of float32, not uint8 as the checkpoint says" in said.getvalue()


def test_files_that_need_in_chans_say_so(tmp_path):
    many = tiff(values(0, 13, "uint16"), photometric="minisblack", planarconfig="contig")
    for raw in (many, npy(values(0, 3, "uint8"))):
        (tmp_path / "odd.tif").write_bytes(raw)
        with pytest.raises(UserError, match="--in_chans C reads NumPy arrays and TIFF of many bands"):
            Images([(str(tmp_path / "odd.tif"), 0)], eval_transform(32))[0]


def test_without_in_chans_nothing_changes(tmp_path):
    write_image_folder(tmp_path, 3, 1, ("a", "b"))
    np.save(tmp_path / "train" / "a" / "depth.npy", np.zeros((4, 4)))
    said = start("pretrain", tmp_path, output=tmp_path / "out")
    assert "1 ending in .npy" in said and "6 training images" in said
    args = load(tmp_path / "out" / "checkpoint-0.pth")["args"]
    assert (args["in_chans"], args["pixel_type"]) == (3, "rgb")
    assert (args["mean"], args["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


# reading


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("channels", (1, 2, 3, 4, 13))
def test_values_come_as_they_are_stored(channels, kind):
    image = values(channels, channels, kind)
    planes = image.transpose(2, 0, 1)
    files = {
        "[H, W, C]": npy(image), "[C, H, W]": npy(planes), "Fortran": npy(np.asfortranarray(image)),
        "big-endian": npy(image.astype(image.dtype.newbyteorder(">"))), "pages": tiff(planes, photometric="minisblack"),
    }  # fmt: skip
    if channels == 1:
        files |= {"[H, W]": npy(image[:, :, 0]), "tiff": tiff(image[:, :, 0])}
    else:
        many = {"photometric": "minisblack", "planarconfig": "contig"}
        files |= {
            "colours": tiff(image),
            "bands": tiff(image, **many),
            "deflate": tiff(image, compression="zlib", **many),
        }
        files |= {"big tiff": tiff(image, bigtiff=True, byteorder=">", **many)}
        files["planar"] = tiff(planes, photometric="minisblack", planarconfig="separate")
    for name, raw in files.items():
        np.testing.assert_array_equal(read(raw, channels), image, err_msg=name)
        assert read(raw, channels).dtype == image.dtype


def test_where_both_ends_may_be_channels_the_last_is():
    image = values(0, 4, "uint8", (4, 9))
    np.testing.assert_array_equal(read(npy(image), 4), image)


def test_ordinary_files_of_one_and_four_channels():
    colour = values(1, 3, "uint8")
    grey = np.asarray(Image.fromarray(colour).convert("L"))[:, :, None]
    for raw in (stored(Image.fromarray(colour), "png"), stored(Image.fromarray(colour), "tiff")):
        np.testing.assert_array_equal(read(raw, 1), grey)
        np.testing.assert_array_equal(read(raw, 3), colour)
    deep = values(2, 1, "uint16")
    for kind in ("png", "tiff", "ppm"):
        np.testing.assert_array_equal(read(stored(Image.fromarray(deep[:, :, 0]), kind), 1), deep, err_msg=kind)
    white_is_zero = tiff(deep[:, :, 0], photometric="miniswhite")
    np.testing.assert_array_equal(read(white_is_zero, 1), 65535 - deep)
    floats = 1000 * values(3, 1, "float32") - 300
    np.testing.assert_array_equal(read(stored(Image.fromarray(floats[:, :, 0]), "tiff"), 1), floats)
    four = values(4, 4, "uint8")
    for kind, options in (("png", {}), ("tiff", {"compression": "tiff_lzw"})):
        np.testing.assert_array_equal(read(stored(Image.fromarray(four, "RGBA"), kind, **options), 4), four)
    jpeg = stored(Image.fromarray(colour), "jpeg")
    np.testing.assert_array_equal(read(jpeg, 1)[:, :, 0], np.asarray(Image.open(io.BytesIO(jpeg)).convert("L")))


@pytest.mark.parametrize(
    "raw, channels, there",
    [
        (npy(values(0, 13, "uint8")), 4, "13 channels"),
        (npy(values(0, 13, "uint8")[:, :, 0]), 3, "1 channel "),
        (tiff(values(0, 13, "uint16"), photometric="minisblack", planarconfig="contig"), 3, "13 channels"),
        (tiff(values(0, 13, "uint8").transpose(2, 0, 1), photometric="minisblack"), 1, "13 channels"),
        (tiff(values(0, 2, "uint8"), photometric="minisblack", planarconfig="contig"), 1, "2 channels"),
        (tiff(values(0, 4, "uint8"), photometric="rgb", extrasamples=["unspecified"]), 3, "4 channels"),
        (stored(Image.new("RGB", (9, 9)), "png"), 4, "3 channels"),
        (stored(Image.new("L", (9, 13)), "png"), 13, "1 channel "),
        (stored(Image.new("P", (9, 9)), "png"), 4, "3 channels"),
        (stored(Image.new("RGBA", (9, 9)), "tiff"), 13, "4 channels"),
    ],
)
def test_another_number_of_channels_names_file_channels_and_option(raw, channels, there, tmp_path):
    (tmp_path / "odd.png").write_bytes(raw)
    for skip_bad in (False, True):  # it can be decoded: to skip all files of a wrong option would help nobody
        images = Images([(str(tmp_path / "odd.png"), 0)], eval_transform(32), skip_bad=skip_bad, bands=reader(channels))
        with pytest.raises(UserError, match=f"odd.png has {there}.*--in_chans is {channels}"):
            images[0]


BAD = {
    "NaN": (npy(np.full((9, 9, 2), np.nan, np.float32)), "162 of 162 values are NaN"),
    "inf": (tiff(np.full((9, 9, 2), np.inf, np.float32), photometric="minisblack"), "NaN or infinite"),
    "objects": (npy(np.array([{}, []], object)), "object, which are no numbers"),
    "cut off": (npy(np.zeros((9, 9, 2), np.uint8))[:-5], "157 bytes of values, not 162"),
    "cut tiff": (tiff(values(0, 2, "uint8"), photometric="minisblack", planarconfig="contig")[:90], ""),
    "no image": (npy(np.zeros((2, 9, 9, 2), np.uint8)), "shape 2 x 9 x 9 x 2"),
    "empty": (npy(np.zeros((0, 9, 2), np.uint8)), "shape 0 x 9 x 2"),
    "line": (npy(np.zeros((1, 2001, 2), np.uint8)), "over 1000 times"),
    "version": (b"\x93NUMPY\x09\x00" + bytes(60), "version"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_decoded_is_named_or_skipped(name, tmp_path):
    raw, reason = BAD[name]
    (tmp_path / "bad.npy").write_bytes(raw)
    np.save(tmp_path / "good.npy", np.zeros((9, 9, 2), np.float32))
    files = list_images(tmp_path, reader(2).endings)
    images = Images(files, eval_transform(32), bands=reader(2))
    with pytest.raises(UserError, match=f"cannot decode .*bad.npy .*{reason}"):
        images[0]
    skipping = Images(files, eval_transform(32), skip_bad=True, bands=reader(2))
    assert skipping[0][0].shape == (32, 32, 2) and [path[-7:] for path in skipping.take_bad()] == ["bad.npy"]


@pytest.mark.parametrize("kind", ["int16", "int32", "uint32", "int64", "float16", "float64", "bool", "complex64"])
def test_other_types_of_values_are_refused_with_a_remedy_and_not_skipped(kind, tmp_path):
    array = np.zeros((9, 9, 2), kind)
    files = {"a.npy": npy(array), "b.tif": tiff(array, photometric="minisblack", planarconfig="contig")}
    files |= {"grey.tif": tiff(array[:, :, 0])} if kind != "bool" else {}  # that is black and white
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
        of = reader(1 if name == "grey.tif" else 2)
        images = Images([(str(tmp_path / name), 0)], eval_transform(32), skip_bad=True, bands=of)
        with pytest.raises(UserError, match=f"{name} has values of {kind}: save them as uint8, uint16 or float32"):
            images[0]


def test_pickles_are_no_images_and_are_not_run(tmp_path):
    class Touch:
        def __reduce__(self):
            return open, (str(tmp_path / "touched"), "w")

    with pytest.raises(ValueError, match="no numbers"):
        read(npy(np.array([Touch()], object)), 2)
    assert not (tmp_path / "touched").exists()


def test_a_compression_that_tifffile_lacks_names_the_package(tmp_path, monkeypatch):
    """Pillow writes none of many bands: a made header claims LZW."""
    raw = tiff(values(0, 5, "uint8"), photometric="minisblack", planarconfig="contig")
    place = raw.index((259).to_bytes(2, "little") + (3).to_bytes(2, "little")) + 8
    (tmp_path / "a.tif").write_bytes(raw[:place] + (5).to_bytes(2, "little") + raw[place + 2 :])
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(UserError, match="a.tif has a compression .*pip install imagecodecs"):
        Images([(str(tmp_path / "a.tif"), 0)], eval_transform(32), skip_bad=True, bands=reader(5))[0]


@pytest.mark.parametrize("size", ((6, 4), (4, 6), (4, 4)))
def test_the_channels_of_a_tiff_are_the_axis_that_it_names(size):
    image = values(0, 4, "uint16", size)
    planes, many = image.transpose(2, 0, 1), {"photometric": "minisblack"}
    files = {
        "planes": tiff(planes, planarconfig="separate", **many),
        "interleaved": tiff(image, planarconfig="contig", **many),
        "pages": tiff(planes, **many),
        "ImageJ": tiff(planes, imagej=True, metadata={"axes": "CYX"}),
        "OME": tiff(planes, ome=True, metadata={"axes": "CYX"}, **many),
        "shaped": tiff(image, metadata={"axes": "YXC"}, **many),
    }
    for name, raw in files.items():
        np.testing.assert_array_equal(read(raw, 4), image, err_msg=name)
    with pytest.raises(bands.WrongKind, match="3 channels"):  # though the width fits
        read(tiff(values(0, 3, "uint16", size).transpose(2, 0, 1), planarconfig="separate", **many), 4)


def test_a_header_of_a_few_bytes_asks_for_no_gigabytes(monkeypatch):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (60000, 60000, 2)})
    with pytest.raises(Exception, match="over the limit"):
        read(header.getvalue(), 2)
    monkeypatch.setattr(bands.decode, "pixel_limit", lambda: 100)
    for raw in (npy(np.zeros((18, 9, 2), np.uint8)), tiff(np.zeros((18, 9, 2), np.uint8), photometric="minisblack")):
        with pytest.raises(Exception, match="over the limit of 100"):
            read(raw, 2)


def test_a_missing_tifffile_is_named_and_not_skipped(monkeypatch, tmp_path):
    whole = builtins.__import__

    def without(name, *args, **options):
        if name == "tifffile":
            raise ImportError("No module named 'tifffile'")
        return whole(name, *args, **options)

    (tmp_path / "a.tif").write_bytes(tiff(values(0, 13, "uint8"), photometric="minisblack", planarconfig="contig"))
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="a.tif has .*pip install tifffile"):
        Images([(str(tmp_path / "a.tif"), 0)], eval_transform(32), skip_bad=True, bands=reader(13))[0]


@pytest.mark.parametrize("kind", ["tar", "wds"])
def test_archives_and_streams_are_read_as_stored_and_measured_too(kind, tmp_path):
    images = [values(i, 1, "uint16", (16, 16)) for i in range(4)]
    with tarfile.open(tmp_path / ("train.tar" if kind == "tar" else "train-0000.tar"), "w") as tar:
        for i, image in enumerate(images):
            png = stored(Image.fromarray(image[:, :, 0]), "png")
            for name, raw in ((f"ant/{i}.png" if kind == "tar" else f"{i}.png", png), (f"{i}.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))
    split = {"name": "train", "filenames": ["train-0000.tar"], "shard_lengths": [4], "num_samples": 4}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    name, transform, env = "tar" if kind == "tar" else "wds/own", eval_transform(16), Dist(torch.device("cpu"))
    dataset = pretraining_images(str(tmp_path), name, "train", transform, env, 0, skip_bad=False)
    found = measure.settle(reader(1), env, "cpu", dataset)
    assert found.pixel_type == "uint16"
    np.testing.assert_allclose(found.mean, np.mean(np.stack(images) / 65535), rtol=1e-6)
    np.testing.assert_allclose(found.std, np.std(np.stack(images) / 65535), rtol=1e-6)
    dataset.bands = reader(4)
    with pytest.raises(UserError, match="1 channel .*--in_chans is 4"):
        next(dataset.iterate(0)) if kind == "wds" else dataset[0]


# mean and deviation, draws, resizing


@pytest.mark.parametrize("kind", TYPES)
def test_the_device_normalises_each_type(kind):
    pixels, mean, std = values(5, 5, kind), np.linspace(0.1, 0.5, 5), np.linspace(0.2, 0.6, 5)
    there = torch.from_numpy(np.stack([pixels, pixels]))
    found = normalise(there, torch.tensor([False, True]), Bands(5, tuple(mean), tuple(std), kind))
    expected = ((pixels / TOP[kind] - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    np.testing.assert_allclose(found[1], expected[:, :, ::-1], atol=1e-5)
    np.testing.assert_array_equal(there[1], pixels)  # what came is left as it is


def test_a_batch_of_several_types_is_in_units_of_one():
    eight, deep = torch.full((2, 2, 1), 51, dtype=torch.uint8), torch.full((2, 2, 1), 13107, dtype=torch.uint16)
    pixels, mirror, labels = bands.collate([(eight, True, 1), (deep, False, 2)])
    assert pixels.dtype == torch.float32 and torch.allclose(pixels, torch.tensor(0.2)) and labels.tolist() == [1, 2]


@pytest.mark.parametrize("part", [1, 40, measure.PART])
def test_measured_means_weigh_pixels_and_stand_far_from_zero(part, monkeypatch):
    monkeypatch.setattr(measure, "PART", part)
    images = [1e4 + values(i, 2, "float32", (5 + i, 7)) for i in range(4)]
    mean, std = measure.measure(torch.from_numpy(image).permute(2, 0, 1) for image in images)
    everything = np.concatenate([image.reshape(-1, 2) for image in images]).astype(np.float64)
    np.testing.assert_allclose(mean, everything.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(std, everything.std(axis=0), rtol=1e-6)


def test_a_sample_is_evenly_spaced_and_a_constant_channel_has_std_1(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "N_MEASURED", 3)
    for i in range(9):
        np.save(tmp_path / f"{i}.npy", np.stack([np.full((4, 4), i, np.uint8), np.full((4, 4), 51, np.uint8)]))
    images = Images(list_images(tmp_path, reader(2).endings), eval_transform(32), bands=reader(2))
    with project_log() as lines:
        found = measure.settle(reader(2), Dist(torch.device("cpu")), "cpu", images)
    assert found.mean == pytest.approx((3 / 255, 0.2), abs=1e-7) and found.std[1] == 1.0
    assert found.std[0] == pytest.approx(np.std([0, 3, 6]) / 255, abs=1e-7) and images.bands is found
    assert any("channels [1] have one value" in line for line in lines) and any(found.statistics() in s for s in lines)


@pytest.mark.parametrize(("n_values", "n_images"), [(20 * 32, 20), (1, 16)])
def test_of_large_images_fewer_are_measured(tmp_path, monkeypatch, n_values, n_images):
    monkeypatch.setattr(measure, "N_VALUES", n_values)
    for i in range(40):
        np.save(tmp_path / f"{i:02d}.npy", np.full((4, 8, 1), i * 5, np.uint8))
    images = Images(list_images(tmp_path, reader(1).endings), eval_transform(32), bands=reader(1))
    with project_log() as lines:
        found = measure.settle(reader(1), Dist(torch.device("cpu")), "cpu", images)
    taken = [5 / 255 * (i * 40 // n_images) for i in range(n_images)]
    assert found.mean == pytest.approx([np.mean(taken)]) and found.std == pytest.approx([np.std(taken)])
    assert any(f"measured on {n_images} training images" in line for line in lines)


def test_a_constant_channel_has_std_1_whatever_rounding_leaves(tmp_path):
    for i in range(7):  # sums of 100 / 255 are not exact
        np.save(tmp_path / f"{i}.npy", np.full((5 + i, 7), 100, np.uint8))
    images = Images(list_images(tmp_path, reader(1).endings), eval_transform(32), bands=reader(1))
    assert measure.settle(reader(1), Dist(torch.device("cpu")), "cpu", images).std == (1.0,)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("make", [pretrain_transform, lambda *a: finetune_transform(a[0], None, "", a[1], a[2])])
def test_draws_are_the_same_whatever_the_channels(make, kind):
    """A ramp of columns and rows tells where a pixel came from."""
    transform = make(16, 0.2, 0.5)
    rows, columns = np.meshgrid(np.arange(40), np.arange(60), indexing="ij")
    ramp = (rows + columns) * (TOP[kind] / 100)
    many, three = (np.repeat(ramp[:, :, None], c, axis=2) for c in (13, 3))
    for seed in range(5):
        rng.seed_sample(0, 0, seed)
        pixels, mirror = transform(torch.from_numpy(many.astype(kind)).permute(2, 0, 1))
        rng.seed_sample(0, 0, seed)
        eight, same = transform(torch.from_numpy((three / TOP[kind] * 255).astype(np.uint8)).permute(2, 0, 1))
        assert mirror == same and pixels.dtype == getattr(torch, kind)
        np.testing.assert_allclose(pixels[:, :, :3].numpy() / TOP[kind], eight.numpy() / 255, atol=0.01)


@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_resizing_is_pillows_antialiased_bicubic(kind):
    image = values(7, 13, kind, (50, 70))
    found = crop_and_resize(torch.from_numpy(image).permute(2, 0, 1), (3, 5, 40, 60), (16, 24)).numpy()
    assert found.dtype == image.dtype
    for channel in (0, 12):
        plane = Image.fromarray(image[3:43, 5:65, channel].astype(np.float32))
        expected = np.asarray(plane.resize((24, 16), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(found[:, :, channel], expected, atol=0.51 if kind == "uint16" else 1e-5)
    black_and_white = (image > TOP[kind] / 2) * np.array(TOP[kind], kind)  # overshoots: nothing may wrap around
    larger = crop_and_resize(torch.from_numpy(black_and_white).permute(2, 0, 1), (0, 0, 50, 70), (100, 140)).numpy()
    if kind == "uint16":
        inside = larger[20:-20, 20:-20].astype(np.float64)
        there = crop_and_resize(
            torch.from_numpy(black_and_white / 1.0).float().permute(2, 0, 1), (0, 0, 50, 70), (100, 140)
        )
        np.testing.assert_allclose(inside, there.numpy()[20:-20, 20:-20].clip(0, 65535), atol=0.51)


def test_patches_of_many_channels_go_by_row_column_channel():
    model = models_mae.MODELS["mae_vit_tiny_patch4"](img_size=8, in_chans=13)
    imgs = torch.randn(2, 13, 8, 8)
    patches = model.patchify(imgs)
    for p in range(4):
        for place, (row, column, channel) in enumerate(
            (r, c, k) for r in range(4) for c in range(4) for k in range(13)
        ):
            there = imgs[:, channel, p // 2 * 4 + row, p % 2 * 4 + column]
            assert torch.equal(patches[:, p, place], there)
    assert torch.equal(model.unpatchify(patches), imgs)


# what does not fit


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_an_encoder_of_three_channels_starts_another_by_timms_rule(channels, tmp_path):
    torch.manual_seed(0)
    mae = models_mae.MODELS["mae_vit_tiny_patch4"](img_size=32)
    torch.save({"model": mae.state_dict()}, tmp_path / "three.pth")
    first = mae.patch_embed.proj.weight.detach().numpy()
    if channels == 1:
        expected = first.sum(axis=1, keepdims=True)
    else:
        expected = np.stack([first[:, i % 3] for i in range(channels)], axis=1) * (3 / channels)
    for start_from, model in (
        (checkpoint.load_pretrained, models_vit.MODELS["vit_tiny_patch4"](img_size=32, in_chans=channels)),
        (checkpoint.load_init, models_mae.MODELS["mae_vit_tiny_patch4"](img_size=32, in_chans=channels)),
    ):
        with project_log() as lines:
            start_from(tmp_path / "three.pth", model)
        np.testing.assert_allclose(model.patch_embed.proj.weight.detach(), expected, rtol=1e-6)
        assert torch.equal(model.blocks[3].mlp.fc2.weight, mae.blocks[3].mlp.fc2.weight)
        assert any(f"3 channels: its first layer is adapted to {channels}" in line for line in lines)
    assert any("the decoder is new" in line for line in lines)


@pytest.mark.parametrize(
    "name, option", [("finetune", "--finetune"), ("linprobe", "--finetune"), ("pretrain", "--init")]
)
def test_a_checkpoint_of_other_channels_names_both(name, option, thirteen, tmp_path):
    write_values(tmp_path / "four", 4, "uint8", "npy")
    no_augmentation = ["--aa", ""] if name == "finetune" else []
    with pytest.raises(UserError, match="takes images of 13 channels, the model here of 4: pass --in_chans 13"):
        start(name, tmp_path / "four", option, thirteen.last, *no_augmentation, channels=4)


@pytest.mark.parametrize(
    "name, words, match",
    [
        ("finetune", [], "--aa.* need 3 channels of uint8, not 13 channels: pass --aa ''"),
        ("finetune", ["--aa=", "--color_jitter", 0.4], "--color_jitter"),
        ("pretrain", ["--augment", "jitter"], "--augment jitter"),
        ("pretrain", ["--decode", "cuda"], "--decode cuda needs 3 channels of uint8"),
        ("linprobe", ["--mean", 1, 2, "--std", 1, 2], "--mean has 2 numbers, but --in_chans is 13"),
        ("linprobe", ["--std", *[1] * 13], "--mean and --std go together"),
        ("pretrain", ["--pixel_type", "rgb"], "--pixel_type rgb has 3 channels"),
        ("pretrain", ["--pixel_type", "uint8", "--mean", *[110] * 13, "--std", *[60] * 13], "--mean 110 .* by 255"),
    ],
)
def test_options_that_do_not_fit_are_named_before_any_file_is_looked_for(name, words, match):
    with pytest.raises(UserError, match=match):
        start(name, "/nowhere", *words, channels=13)


@pytest.mark.parametrize("words", [["--std", "0"], ["--std", "-1"], ["--mean", "nan"], ["--in_chans", "0"]])
def test_values_that_are_none_are_refused_by_the_parser(words, capsys):
    with pytest.raises(SystemExit):
        main_pretrain.get_args_parser().parse_args(words)
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize("name, words", [("finetune", []), ("pretrain", ["--augment", "jitter"])])
def test_three_channels_of_another_type_are_no_material_for_augmentation(name, words, tmp_path):
    write_values(tmp_path, 3, "uint16", "npy")
    with pytest.raises(UserError, match="need 3 channels of uint8, not 3 channels of uint16: pass --aa ''"):
        start(name, tmp_path, *words, channels=3)


def test_an_odd_file_among_photographs_is_no_material_either(tmp_path):
    write_image(tmp_path / "a.png", 0)
    np.save(tmp_path / "b.npy", values(0, 3, "float32"))
    transform = finetune_transform(32, None, "rand-m9-mstd0.5-inc1")
    images = Images(list_images(tmp_path, reader(3).endings), transform, bands=reader(3))
    assert images[0, 0][0].dtype == torch.uint8
    with pytest.raises(UserError, match="an image has 3 of float32: pass --aa ''"):
        images[0, 1]


@pytest.mark.parametrize(
    "kind, mean, std, words", [("uint8", 120, 50, "--mean 120 .*by 255"), ("uint16", 0.5, 900, "--std 900 .*by 65535"),
                               ("float32", 120, 50, "")]
)  # fmt: skip
def test_means_of_integers_are_in_units_of_0_to_1(kind, mean, std, words, tmp_path):
    write_values(tmp_path, 4, kind, "npy")
    given = ("--mean", *[mean] * 4, "--std", *[std] * 4)
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        start("pretrain", tmp_path, *given, channels=4)


@pytest.mark.parametrize("name", ["finetune", "linprobe", "evaluate"])
def test_a_classifier_that_tells_no_mean_is_evaluated_by_the_given_one(name, tmp_path):
    write_image_folder(tmp_path, 3, 3, ("a", "b"))
    torch.manual_seed(0)
    classifier = models_vit.MODELS["vit_tiny_patch4"](img_size=32, num_classes=2)
    head = {"head.0.running_mean": torch.zeros(64), "head.0.running_var": torch.ones(64),
            "head.0.num_batches_tracked": torch.tensor(1), "head.1.weight": 9 * torch.randn(2, 64),
            "head.1.bias": torch.zeros(2)}  # fmt: skip
    weights = classifier.state_dict() | {"head.weight": 9 * torch.randn(2, 64)}
    if name == "linprobe":
        weights = {key: value for key, value in weights.items() if not key.startswith("head.")} | head
    torch.save({"model": weights, "classes": ["a", "b"]}, tmp_path / "silent.pth")
    classifier = build.open_model(tmp_path / "silent.pth")
    losses = {}
    for given in ((), ("--mean", 0.5, 0.4, 0.3, "--std", 0.1, 0.2, 0.3)):
        bands_ = Bands(3, given[1:4] or RGB.mean, given[5:] or RGB.std)
        images = Images(sorted((str(path), "ab".index(path.parent.name)) for path in (tmp_path / "val").rglob("*.png")),
                        eval_transform(32))  # fmt: skip
        pixels, mirror, labels = bands.collate([images[i] for i in range(6)])
        logits = classifier(normalise(pixels, mirror, bands_))
        expected = torch.nn.functional.cross_entropy(logits, labels).item()
        out = tmp_path / f"out{len(given)}"
        if name == "evaluate":
            words = ["--resume", tmp_path / "silent.pth", "--set", f"own={tmp_path / 'val'}", "--output_dir", out]
            words = [str(word) for word in (*words, *given, "--num_workers", 0, *ON_CPU)]
            main_evaluate.main(main_evaluate.get_args_parser().parse_args(words))
            found = json.loads((out / "results.json").read_text())["sets"]["own"]["loss"]
            assert found == pytest.approx(expected, rel=1e-4)
        else:
            said = start(name, tmp_path, "--eval", "--resume", tmp_path / "silent.pth", *given)
            assert f"loss {expected:.3f}" in said
        losses[given] = round(expected, 3)
    assert len(set(losses.values())) == 2
    with pytest.raises(UserError, match="--mean and --std go together"):
        if name == "evaluate":
            words = [*words[: words.index("--mean")], *words[words.index("--num_workers") :], "--std", "1", "1", "1"]
            main_evaluate.main(main_evaluate.get_args_parser().parse_args(words))
        start(name, tmp_path, "--eval", "--resume", tmp_path / "silent.pth", "--std", 1, 1, 1)


@pytest.mark.parametrize("name", ["finetune", "linprobe"])
def test_an_evaluation_reads_files_as_it_is_told(name, tmp_path):
    write_values(tmp_path, 3, "float32", "npy")
    start(name, tmp_path, *(["--aa", ""] if name == "finetune" else []), channels=3, output=tmp_path)
    last = tmp_path / "checkpoint-0.pth"
    said = start(name, tmp_path, "--eval", "--resume", last, "--pixel_type", "uint16")
    assert "images are of float32, not uint16 as --pixel_type or the checkpoint says" in said
    with pytest.raises(UserError, match="images are files ending in"):  # rgb reads no arrays
        start(name, tmp_path, "--eval", "--resume", last, "--pixel_type", "rgb")
    torch.save({"model": load(last)["model"]}, tmp_path / "silent.pth")
    for given in (["--pixel_type", "stored"], ["--in_chans", 3]):
        assert "3 channels of float32" in start(name, tmp_path, "--eval", "--resume", tmp_path / "silent.pth", *given)


def test_a_file_that_does_not_tell_its_mean_needs_it(thirteen, tmp_path):
    classifier = models_vit.MODELS["vit_tiny_patch4"](img_size=32, in_chans=13, num_classes=2)
    args = {"model": "vit_tiny_patch4", "input_size": 32}
    torch.save({"model": classifier.state_dict(), "args": args, "classes": ["a", "b"]}, tmp_path / "silent.pth")
    with pytest.raises(UserError, match="mean and std of its 13 channels: give --mean and --std"):
        start("finetune", thirteen.data, "--eval", "--resume", tmp_path / "silent.pth")
    given = ["--mean", *[0.5] * 13, "--std", *[0.25] * 13]
    said = start("finetune", thirteen.data, "--eval", "--resume", tmp_path / "silent.pth", *given)
    assert "6 test images" in said
    parser = main_evaluate.get_args_parser()
    words = ["--resume", tmp_path / "silent.pth", "--set", f"own={thirteen.data / 'val'}", "--num_workers", 0, *ON_CPU]
    words = [str(word) for word in (*words, "--output_dir", tmp_path / "out")]
    with pytest.raises(UserError, match="mean of its 13 channels: give --mean and --std"):
        main_evaluate.main(parser.parse_args(words))
    main_evaluate.main(parser.parse_args([*words, *map(str, given)]))
    assert json.loads((tmp_path / "out" / "results.json").read_text())["sets"]["own"]["images"] == 6


def test_an_evaluation_with_another_mean_than_the_files_is_refused(thirteen, tmp_path):
    start("linprobe", thirteen.data, channels=13, output=tmp_path)
    other = ["--mean", *[0.5] * 13, "--std", *[1] * 13]
    with pytest.raises(UserError, match="so it takes --mean .* leave out --mean 0.5"):
        start("linprobe", thirteen.data, "--eval", "--resume", tmp_path / "checkpoint-0.pth", *other)
