"""Exports: the real libraries load what we write, and give our outputs to 1e-4."""

import json
import re
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import assert_same, load
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_transform, resolve_model_data_config
from timm.layers import resample_patch_embed
from torch import nn
from transformers import AutoImageProcessor, ViTMAEForPreTraining, ViTMAEModel

import models_mae
import models_vit
from util.errors import UserError
from util.export import export, main
from util.pos_embed import resample
from util.targets import PCA, Tokens
from util.transforms import eval_transform
from util.weights import build
from util.weights.checkpoint import load_pretrained


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


VARIANTS = {
    "mask tokens": ({"encoder_mask_tokens": True}, None, {"encoder_mask_tokens": True}),
    "pca": ({}, PCA(48, 8), {"target": "pca"}),
    "tokens": ({}, Tokens(16), {"target": "tokens"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_decoder_that_others_do_not_have_stays_here(variant, tmp_path):
    options, target, args = VARIANTS[variant]
    model = models_mae.mae_vit_tiny_patch4(**options).eval()
    if target:
        model.set_target(target)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "x.pth")
    source, imgs = str(tmp_path / "x.pth"), batch(model)[0]
    with pytest.raises(UserError, match="ViTMAE predicts pixels, .*x.pth does otherwise: use --part"):
        export(source, "hf", part="full", output=tmp_path / "full")
    folder, _ = export(source, "hf", output=tmp_path / "encoder")
    order = torch.arange(64).expand(2, -1) / 64
    theirs = ViTMAEModel.from_pretrained(folder, mask_ratio=0.0)(imgs, noise=order).last_hidden_state
    close(theirs[:, 0], model.encode(imgs)[0])
    if variant == "tokens":
        with pytest.raises(UserError, match="takes its tokenizer, which no checkpoint holds: use --part encoder"):
            export(source, "onnx", part="full", output=tmp_path / "x.onnx")
        assert not (tmp_path / "x.onnx").exists()
    path, _ = export(source, "safetensors", part="full", output=tmp_path / "x.safetensors")
    assert_same(build.open_model(path).state_dict(), model.state_dict())


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


# what a classifier gets to see, through timm's own transform


def ours(image: Image.Image, size) -> torch.Tensor:
    """[3, H, W]: an image as evaluation prepares it here."""
    pixels, _ = eval_transform(size)(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    mean, std = (torch.tensor(values) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((pixels / 255 - mean) / std).permute(2, 0, 1)


def theirs(image: Image.Image, model: nn.Module) -> torch.Tensor:
    return create_transform(**resolve_model_data_config(model))(image)


@pytest.fixture(scope="module")
def digits():
    """Images of 56 x 40 pixels, each a digit in the middle, in colour; their labels."""
    data, labels = load_digits(return_X_y=True)
    tint = np.random.default_rng(0).uniform(0.5, 1, (len(data), 1, 1, 3))
    pixels = (data.reshape(-1, 8, 8, 1) / 16 * tint * 255).astype(np.uint8)
    images = []
    for digit in pixels[:900]:
        image = Image.new("RGB", (40, 56))
        image.paste(Image.fromarray(digit).resize((32, 32), Image.Resampling.BICUBIC), (4, 12))
        images.append(image)
    return images, torch.from_numpy(labels[:900]).long()


@pytest.fixture(scope="module", params=["mean", "token", "probe"])
def classifier(request, digits, tmp_path_factory):
    """(checkpoint, model): a classifier of digits of each kind, whose head is fitted to random features."""
    torch.manual_seed(0)
    images, labels = digits
    model = models_vit.vit_tiny_patch4(num_classes=10, global_pool=request.param == "mean").eval()
    with torch.no_grad():
        for block in model.blocks:  # attention that looks at something
            block.attn.qkv.weight.mul_(3)
        features = model.forward_features(torch.stack([ours(image, 32) for image in images[:700]]))
        norm = nn.BatchNorm1d(64, affine=False, eps=1e-6, momentum=None)
        norm(features)
        inputs = torch.cat([norm.eval()(features) if request.param == "probe" else features, torch.ones(700, 1)], 1)
        ridge = 1e-3 * torch.eye(65)
        fitted = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ F.one_hot(labels[:700]).float()).T
        head = nn.Linear(64, 10)
        head.weight.copy_(fitted[:, :-1])
        head.bias.copy_(fitted[:, -1])
    model.head = nn.Sequential(norm, head) if request.param == "probe" else head
    path = tmp_path_factory.mktemp("digits") / "checkpoint-9.pth"
    torch.save({"model": model.state_dict(), "args": {"model": "vit_tiny_patch4", "input_size": 32}}, path)
    return path, model.eval()


def test_timm_classifies_as_we_do_through_its_own_transform(classifier, digits, tmp_path):
    """Image by image; with timm's own idea of mean, size and crop it would not."""
    path, model = classifier
    images, labels = digits[0][700:], digits[1][700:]
    _, line = export(str(path), "timm", output=tmp_path / "digits")
    exported = by_line(line, "model").eval()
    expected = model(torch.stack([ours(image, 32) for image in images])).argmax(1)
    found = exported(torch.stack([theirs(image, exported) for image in images])).argmax(1)
    accuracy = (expected == labels).float().mean()
    assert accuracy > 0.6
    assert (found == expected).float().mean() >= 0.99  # Pillow's resize and ours differ by 0.03 grey levels
    defaults = timm.create_model("vit_base_patch16_224", num_classes=10, img_size=32)
    wrong = torch.stack([F.interpolate(theirs(image, defaults)[None], 32)[0] for image in images])
    assert (exported(wrong).argmax(1) == labels).float().mean() < accuracy - 0.1


@pytest.mark.parametrize("size", [32, 96, 224, 240, (32, 64), (64, 32), (288, 240)])
@pytest.mark.parametrize("shape", [(300, 400), (500, 100), (50, 60)])
def test_timm_prepares_images_as_our_evaluation(size, shape, tmp_path):
    source, _ = saved(tmp_path, "vit_tiny_patch16", num_classes=3, img_size=size, depth=1)
    path = tmp_path / "checkpoint-7.pth"
    full = models_vit.vit_tiny_patch16(num_classes=3, img_size=size)
    torch.save({**load(path), "model": full.state_dict()}, path)
    _, line = export(source, "timm", output=tmp_path / "x.safetensors")
    coarse = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(shape, Image.Resampling.BICUBIC)
    expected, found = ours(image, size), theirs(image, by_line(line, "model"))
    assert found.shape == expected.shape
    assert (found - expected).abs().mean() < 0.02, "in units of the deviation: 1 grey level"


# another size than the checkpoint's


@pytest.mark.parametrize("size", [16, 48, (32, 64)])
@pytest.mark.parametrize("name", ["mae_vit_tiny_patch4", "vit_tiny_patch4"])
def test_at_another_size_features_are_those_of_a_fine_tuned_start(name, size, tmp_path):
    """The same positions as --finetune gives a classifier of that size, learned or sin-cos."""
    options = {"num_classes": 3} if name.startswith("vit") else {}
    source, _ = saved(tmp_path, name, **options)
    classifier = models_vit.vit_tiny_patch4(img_size=size, num_classes=3).eval()
    load_pretrained(source, classifier)
    imgs, _ = batch(classifier)
    for to, ending in (("timm", ""), ("safetensors", ".safetensors")):
        path, line = export(source, to, output=tmp_path / f"{to}{ending}", input_size=size)
        if to == "timm":
            model = by_line(line, "model").eval()
            features = model.forward_head(model.forward_features(imgs), pre_logits=True)
        else:
            again = build.open_model(path, encoder_only=True)
            features = again.forward_features(imgs) if options else again.encode(imgs)[0]
        close(features, classifier.forward_features(imgs))


def test_at_another_size_a_decoder_moves_along(tmp_path, onnxruntime):
    source, model = saved(tmp_path)
    path, line = export(source, "hf", "full", tmp_path / "hf", input_size=48)
    theirs = by_line(line, "model").eval()
    path, _ = export(source, "onnx", "full", tmp_path / "mae", input_size=48)
    imgs, noise = torch.randn(2, 3, 48, 48), torch.rand(2, 144)
    expected = theirs(imgs, noise=noise)
    loss, pred, mask = onnx_outputs(onnxruntime, path, images=imgs, noise=noise)
    close(pred, expected.logits)
    for key in ("pos_embed", "decoder_pos_embed"):
        old = model.state_dict()[key][:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
        new = F.interpolate(old, (12, 12), mode="bicubic").flatten(2).transpose(1, 2)
        hugging_face = "decoder.decoder_pos_embed" if "decoder" in key else "vit.embeddings.position_embeddings"
        close(theirs.state_dict()[hugging_face][:, 1:], new)


def test_size_that_patches_do_not_divide_is_refused_with_sizes_that_work(tmp_path):
    source, _ = saved(tmp_path)
    with pytest.raises(UserError, match="side 50 .*such as 48 or 52"):
        export(source, "timm", output=tmp_path / "x", input_size=50)
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("to", ["timm", "safetensors", "onnx", "detectron2", "mmseg"])
@pytest.mark.parametrize("name", ["name", "name.v1", 'a "quoted" name', "name.pth"])
def test_name_without_the_ending_gets_it_and_the_line_loads_it(to, name, tmp_path, monkeypatch):
    source, model = saved(tmp_path)
    monkeypatch.setattr("util.export.to_onnx", lambda model, part, ratio, path: path.write_bytes(b"x"))
    path, line = export(source, to, output=tmp_path / name)
    ending = ".pth" if to in ("detectron2", "mmseg") else ".onnx" if to == "onnx" else ".safetensors"
    assert path.name == (name if name.endswith(ending) else name + ending) and path.is_file()
    if to in ("timm", "safetensors", "mmseg"):
        by_line(line, "weights" if to == "safetensors" else "model")


def test_place_that_cannot_be_written_is_told(tmp_path):
    source, _ = saved(tmp_path)
    (tmp_path / "file").touch()
    for to in ("timm", "hf", "mmseg"):
        with pytest.raises(UserError, match="cannot be written.*--output"):
            export(source, to, output=tmp_path / "file" / "x")


# detectors and segmenters: names as in the documentation of these libraries


def names_of(before: str, layer: str, in_layer: list[str], depth: int, rest: list[str]) -> set[str]:
    layers = [f"{layer}.{i}.{name}.{kind}" for i in range(depth) for name in in_layer for kind in ("weight", "bias")]
    return {before + name for name in layers + rest}


# https://github.com/facebookresearch/detectron2, detectron2/modeling/backbone/vit.py: the modules of class ViT
VITDET = names_of(
    "", "blocks", ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"], 4,
    ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"],
)  # fmt: skip
# https://github.com/open-mmlab/mmsegmentation, mmseg/models/backbones/{mae,beit}.py: class MAE, final_norm=True;
# its relative positions, zeros, and its gamma, ones, come from the config
MMSEG = names_of(
    "", "layers", ["ln1", "attn.qkv", "attn.proj", "ln2", "ffn.layers.0.0", "ffn.layers.1"], 4,
    ["cls_token", "pos_embed", "patch_embed.projection.weight", "patch_embed.projection.bias"],
) | {"ln1.weight", "ln1.bias"}  # fmt: skip


@pytest.mark.parametrize("name", ["mae_vit_tiny_patch4", "vit_tiny_patch4"])
def test_detectron2_gets_the_names_of_its_vit(name, tmp_path):
    """It leaves out the class token and the last norm."""
    source, model = saved(tmp_path, name)
    path, line = export(source, "detectron2", output=tmp_path / "x.pth")
    weights = load(path)["model"]
    assert weights.keys() - {"cls_token", "norm.weight", "norm.bias"} == VITDET
    assert "pretrain_img_size = 32" in line and "patch_size = 4" in line and f'init_checkpoint = "{path}"' in line
    assert_same(weights, {key: model.state_dict()[key] for key in weights})


def test_mmsegmentation_gets_its_names_and_features_stay(tmp_path):
    source, model = saved(tmp_path, img_size=(32, 64))
    path, line = export(source, "mmseg", output=tmp_path / "x.pth")
    weights, backbone = load(path), by_line(line, "model")["backbone"]
    assert weights.keys() == MMSEG
    assert "data_preprocessor" not in line and backbone["in_channels"] == 3, "their configs' own are ImageNet's"
    assert backbone["init_cfg"]["checkpoint"] == str(path) and backbone["init_values"] == 1.0
    options = {"patch_size": backbone["patch_size"], "embed_dim": backbone["embed_dims"], "num_classes": 0}
    options |= {"depth": backbone["num_layers"], "num_heads": backbone["num_heads"], "img_size": backbone["img_size"]}
    back = {"patch_embed.projection": "patch_embed.proj", "ffn.layers.0.0": "mlp.fc1", "ffn.layers.1": "mlp.fc2"}
    back |= {r"^ln1": "norm", r"\.ln": ".norm", "^layers": "blocks"}
    for pattern, name in back.items():
        weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
    theirs = timm.create_model("vit_base_patch16_224", **options).eval()
    theirs.load_state_dict(weights)
    imgs, _ = batch(model)
    close(theirs.forward_features(imgs)[:, 1:], model.encode(imgs)[1].flatten(2).transpose(1, 2))


@pytest.mark.parametrize("to", ["detectron2", "mmseg"])
def test_patches_of_another_size(to, tmp_path):
    """The kernel by timm's method, positions to the grid: 4 pixels to 8, so 8 x 8 positions to 4 x 4; then to 6 x 6."""
    source, model = saved(tmp_path)
    for size, side in ((None, 4), (48, 6)):
        path, line = export(source, to, output=tmp_path / f"{to}{side}.pth", patch_size=8, input_size=size)
        weights = load(path).get("model", load(path))
        kernel = weights["patch_embed.proj.weight" if to == "detectron2" else "patch_embed.projection.weight"]
        close(kernel, resample_patch_embed(model.patch_embed.proj.weight, (8, 8)))
        old = model.pos_embed[:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
        close(weights["pos_embed"][:, 1:], F.interpolate(old, (side, side), mode="bicubic").flatten(2).mT)
        assert torch.equal(weights["pos_embed"][:, :1], model.pos_embed[:, :1])
        assert re.search(r"patch_size\W+8\b", line)


def test_patches_of_14_pixels_become_16_on_the_grid_of_vit_det():
    """ViT-H/14 at 224 pixels: 16 x 16 positions to 14 x 14. Of smooth images the features hardly change."""
    model = models_mae.MaskedAutoencoderViT(patch_size=14, embed_dim=64, depth=2, num_heads=4, decoder_depth=1).eval()
    smooth = F.interpolate(torch.randn(2, 3, 4, 4), (224, 224), mode="bicubic")
    before = model.encode(smooth)[1]
    resample(model, 224, 16)
    assert model.patch_embed.grid_size == (14, 14) and model.pos_embed.shape == (1, 197, 64)
    assert model.patch_embed.proj.weight.shape == (64, 3, 16, 16)
    after = F.interpolate(model.encode(smooth)[1], (16, 16), mode="bicubic")
    assert F.cosine_similarity(before, after).mean() > 0.95


def test_what_detectors_do_not_take_is_refused(tmp_path):
    source, _ = saved(tmp_path, img_size=(32, 64))
    for to, options, reason in (
        ("detectron2", {}, "square, not 32 x 64"),
        ("mmseg", {"part": "full"}, "takes --part encoder"),
        ("mmseg", {"patch_size": 5}, "side 32 .*patches of 5"),
        ("timm", {"patch_size": 8}, "--patch 8 is for --to detectron2"),
    ):
        with pytest.raises(UserError, match=reason):
            export(source, to, output=tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))
