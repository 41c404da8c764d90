"""Exports: the real libraries load what we write, and give our outputs to 1e-4."""

import json
import sys

import pytest
import torch
from helpers import assert_same, load
from torch import nn
from transformers import AutoImageProcessor, ViTMAEForPreTraining, ViTMAEModel

import models_mae
import models_vit
from util import build
from util.checkpoint import load_pretrained
from util.errors import UserError
from util.export import export, main


def close(a, b):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=1e-4, rtol=0)


def saved(folder, name="mae_vit_tiny_patch4", **options):
    """A training checkpoint of a model whose every parameter was moved; returns (path, model)."""
    torch.manual_seed(0)
    builder = (models_mae.MODELS | models_vit.MODELS)[name]
    model = builder(**options).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05 * torch.randn_like(param))
    size = model.patch_embed.img_size
    args = {"model": name, "input_size": size, "norm_pix_loss": getattr(model, "norm_pix_loss", None)}
    torch.save({"model": model.state_dict(), "args": args}, folder / "checkpoint-7.pth")
    return str(folder / "checkpoint-7.pth"), model


def batch(model, n=2):
    torch.manual_seed(1)
    return torch.randn(n, 3, *model.patch_embed.img_size), torch.rand(n, model.patch_embed.num_patches)


def by_line(line, name):
    """What a printed line calls `name`, in a Python that has imported nothing."""
    names = {}
    exec(line, names)
    return names[name]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", ["mae_vit_tiny_patch16", "mae_vit_tiny_patch4"])  # timm has a name for the first
def test_timm_loads_the_encoder_by_the_line_that_is_printed(tmp_path, name):
    source, model = saved(tmp_path, name)
    path, line = export(source, "timm", output=tmp_path / "out" / "mae.safetensors")
    theirs = by_line(line, "model").eval()
    imgs, _ = batch(model)
    class_token, patch_map = model.encode(imgs)
    close(theirs(imgs), class_token)
    close(theirs.forward_features(imgs)[:, 1:], patch_map.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(("pool", "size"), [(True, 224), (False, 96)])
def test_timm_loads_a_classifier_by_the_line_that_is_printed(tmp_path, pool, size):
    source, model = saved(tmp_path, "vit_tiny_patch16", num_classes=7, global_pool=pool, img_size=size)
    _, line = export(source, "timm", output=tmp_path / "vit.safetensors")
    imgs, _ = batch(model)
    close(by_line(line, "model").eval()(imgs), model(imgs))


@pytest.mark.parametrize("norm_pix", [False, True])
def test_hugging_face_loads_the_autoencoder(tmp_path, norm_pix):
    source, model = saved(tmp_path, norm_pix_loss=norm_pix)
    path, line = export(source, "hf", "full", tmp_path / "hf", mask_ratio=0.5)
    assert isinstance(by_line(line, "model"), ViTMAEForPreTraining)
    theirs, told = ViTMAEForPreTraining.from_pretrained(path, output_loading_info=True)
    assert not any(told.values()), told
    imgs, noise = batch(model)
    loss, pred, mask = model(imgs, 0.5, noise)
    expected = theirs.eval()(imgs, noise=noise)
    close(expected.loss, loss)
    close(expected.logits, pred)
    assert torch.equal(expected.mask, mask)


def test_hugging_face_loads_the_encoder_and_its_preprocessing(tmp_path):
    source, model = saved(tmp_path)
    path, _ = export(source, "hf", output=tmp_path / "hf")
    theirs, told = ViTMAEModel.from_pretrained(path, output_loading_info=True)
    assert not any(told.values()), told
    imgs, _ = batch(model)
    in_order = torch.arange(64).expand(2, -1) / 64  # their encoder shuffles patches even where it keeps all
    tokens = theirs.eval()(imgs, noise=in_order).last_hidden_state
    class_token, patch_map = model.encode(imgs)
    close(tokens[:, 0], class_token)
    close(tokens[:, 1:], patch_map.flatten(2).transpose(1, 2))
    pixels = torch.full((3, 50, 40), 255, dtype=torch.uint8)
    prepared = AutoImageProcessor.from_pretrained(path)(pixels, return_tensors="pt")["pixel_values"]
    assert prepared.shape == (1, 3, 32, 32)
    close(prepared[0, :, 5, 5], (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]))


def test_hugging_face_gets_no_rectangles_and_no_classifiers(tmp_path):
    source, _ = saved(tmp_path, img_size=(32, 64))
    with pytest.raises(UserError, match="square images only, not 32 x 64"):
        export(source, "hf", output=tmp_path / "hf")
    source, _ = saved(tmp_path, "vit_tiny_patch4", num_classes=3)
    with pytest.raises(UserError, match="is a classifier.*--to timm"):
        export(source, "hf", output=tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("part", ["encoder", "full"])
def test_safetensors_open_here_without_saying_which_model(tmp_path, part):
    source, model = saved(tmp_path, img_size=(32, 16), norm_pix_loss=True)
    path, line = export(source, "safetensors", part, tmp_path / "mae.safetensors")
    assert_same({key: model.state_dict()[key] for key in by_line(line, "weights")}, by_line(line, "weights"))
    again = build.open_model(path, encoder_only=part == "encoder")
    assert again.patch_embed.img_size == (32, 16) and again.norm_pix_loss
    imgs, noise = batch(model)
    assert_same(list(again.encode(imgs)), list(model.encode(imgs)))
    if part == "full":
        assert_same(list(again(imgs, 0.75, noise)), list(model(imgs, 0.75, noise)))
    classifier = models_vit.vit_tiny_patch4(num_classes=2, img_size=(32, 16)).eval()
    load_pretrained(str(path), classifier)
    close(classifier.forward_features(imgs), model.encode(imgs)[0])


@pytest.fixture
def onnxruntime():
    for package in ("onnx", "onnxscript"):  # the exporter's
        pytest.importorskip(package)
    return pytest.importorskip("onnxruntime")


def onnx_outputs(onnxruntime, path, **inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


def test_onnxruntime_runs_the_encoder_on_any_batch(onnxruntime, tmp_path):
    source, model = saved(tmp_path, img_size=(32, 64))
    path, _ = export(source, "onnx", output=tmp_path / "mae.onnx")
    for n in (1, 5):
        imgs, _ = batch(model, n)
        for theirs, ours in zip(onnx_outputs(onnxruntime, path, images=imgs), model.encode(imgs), strict=True):
            close(theirs, ours)


def test_onnxruntime_runs_the_autoencoder_on_any_batch(onnxruntime, tmp_path):
    source, model = saved(tmp_path, norm_pix_loss=True)
    path, _ = export(source, "onnx", "full", tmp_path / "mae.onnx", mask_ratio=0.6)
    for n in (1, 3):
        imgs, noise = batch(model, n)
        for theirs, ours in zip(
            onnx_outputs(onnxruntime, path, images=imgs, noise=noise), model(imgs, 0.6, noise), strict=True
        ):
            close(theirs, ours)


def test_onnxruntime_runs_a_classifier(onnxruntime, tmp_path):
    source, model = saved(tmp_path, "vit_tiny_patch4", num_classes=3, global_pool=True)
    path, line = export(source, "onnx", output=tmp_path / "vit.onnx")
    imgs, _ = batch(model, 3)
    assert [value.name for value in by_line(line, "session").get_outputs()] == ["logits"]
    close(onnx_outputs(onnxruntime, path, images=imgs)[0], model(imgs))


def test_what_is_there_stays_there(tmp_path):
    source, _ = saved(tmp_path)
    (tmp_path / "mine.onnx").write_text("mine")
    with pytest.raises(UserError, match="mine.onnx exists.*--output"):
        export(source, "onnx", output=tmp_path / "mine.onnx")
    assert (tmp_path / "mine.onnx").read_text() == "mine"


def test_a_linear_probe_opens_as_a_classifier(tmp_path):
    """Its normalisation goes into the weights of the head, in evaluation the same."""
    path, probe = saved(tmp_path, "vit_tiny_patch4", num_classes=5, global_pool=False)
    norm = nn.BatchNorm1d(64, affine=False, eps=1e-6)
    norm.running_mean.normal_()
    norm.running_var.uniform_(1e-6, 2)  # so small that eps counts
    probe.head = nn.Sequential(norm, probe.head).eval()
    torch.save({**load(path), "model": probe.state_dict()}, path)
    images, _ = batch(probe)
    torch.testing.assert_close(build.open_model(path)(images), probe(images), atol=1e-3, rtol=1e-5)
    _, line = export(path, "timm", output=tmp_path / "probe.safetensors")
    torch.testing.assert_close(by_line(line, "model").eval()(images), probe(images), atol=1e-3, rtol=1e-5)


def test_timm_gets_no_decoder(tmp_path):
    source, _ = saved(tmp_path)
    with pytest.raises(UserError, match="takes --part encoder"):
        export(source, "timm", "full", tmp_path / "out")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "safetensors"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, missing):
    source, _ = saved(tmp_path)
    for name in [name for name in sys.modules if name == missing or name.startswith(missing + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=f"pip install .*{missing}"):
        export(source, "safetensors" if missing == "safetensors" else "onnx", output=tmp_path / "out")


def test_the_command_writes_where_the_caller_stands_and_says_how_to_load(tmp_path, monkeypatch, capsys):
    source, _ = saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export", source, "--to", "hf", "--part", "full"])
    main()
    assert 'ViTMAEForPreTraining.from_pretrained("checkpoint-7-full-hf")' in capsys.readouterr().out
    assert json.loads((tmp_path / "checkpoint-7-full-hf" / "config.json").read_text())["hidden_size"] == 64
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and "checkpoint-7-full-hf exists" in capsys.readouterr().err
