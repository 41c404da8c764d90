"""Files that are no checkpoint, and checkpoints of another model: each gets a message that says which it is."""

import argparse
import ast
import gzip
import io
import json
import pickle
import re
import resource
import sys
import tarfile
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import ROOT, assert_same, project_log
from PIL import Image
from torch import nn

import main_finetune
from models_mae import MODELS as MAE_MODELS
from models_mae import MaskedAutoencoderViT
from models_vit import MODELS as VIT_MODELS
from models_vit import VisionTransformer
from util import export
from util.dist import Dist
from util.errors import UserError
from util.lars import LARS
from util.run import resume
from util.run.training_state import check_training_state
from util.weights import build, checkpoint, convert
from util.weights.checkpoint import describe


def bytes_of(save, *args, **kwargs) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *args, **kwargs)
    return buffer.getvalue()


def image(kind: str) -> bytes:
    return bytes_of(Image.new("RGB", (9, 9)).save, kind)


def archive(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("w.pth"))
    return buffer.getvalue()


def compressed(whole: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return buffer.getvalue()


def flipped(whole: bytes, record: str) -> bytes:
    """`whole` with one bit of a record's content changed."""
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        (info,) = [info for info in file.infolist() if info.filename.endswith(record)]
        content = file.read(info)
    at = whole.index(content, info.header_offset) + len(content) // 2
    return whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]


WEIGHTS = {"weight": torch.arange(900.0)}
WHOLE = bytes_of(lambda file: torch.save({"model": WEIGHTS}, file))
LEGACY = bytes_of(lambda file: torch.save({"model": WEIGHTS}, file, _use_new_zipfile_serialization=False))
PROGRAM = archive(**{f"m/{name}": b"x" for name in ("data.pkl", "constants.pkl", "code/__torch__.py")})

FILES = {
    "zero bytes": (b"", "is empty"),
    "HTML": (b"\n <!DOCTYPE html><html><body>404 Not Found</body></html>", "an HTML or XML page"),
    "XML of a bucket": (b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "an HTML or XML page"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "text": (b"hello\tthere\r\n", "a text that begins with 'hello"),
    "text in French": ("déjà vu".encode() * 20, "a text that begins with 'déjà vu"),
    "JSON": (json.dumps({"model": 1}, indent=1).encode(), "a JSON text"),
    "PNG": (image("PNG"), "a PNG image"),
    "JPEG": (image("JPEG"), "a JPEG image"),
    "GIF": (image("GIF"), "a GIF image"),
    "TIFF": (image("TIFF"), "a TIFF image"),
    "BMP": (image("BMP"), "a BMP image"),
    "WebP": (image("WEBP"), "a WebP image"),
    "safetensors": (safetensors.torch.save(WEIGHTS)[:-1], "is a safetensors file, but damaged"),
    "npy": (bytes_of(np.save, np.zeros(3)), "a NumPy array"),
    "npz": (bytes_of(np.savez, a=np.zeros(3)), "a NumPy archive"),
    "gzip": (gzip.compress(WHOLE), "a gzip archive: unpack it"),
    "tar": (tar(), "a tar archive: unpack it"),
    "other zip": (archive(**{"word/document.xml": b"<a/>"}), "torch did not write (it holds word/document.xml)"),
    "empty zip": (archive(), "no torch file"),
    "TorchScript": (PROGRAM, "a TorchScript program"),
    "compressed": (compressed(WHOLE), "is compressed"),
    "cut off": (WHOLE[: len(WHOLE) // 2], "is cut off"),
    "last byte missing": (WHOLE[:-1], "is cut off"),
    "first four bytes": (WHOLE[:4], "is cut off"),
    "flipped weight": (flipped(WHOLE, "data/0"), "is damaged (Bad CRC-32"),
    "flipped pickle": (flipped(WHOLE, "data.pkl"), "is damaged (Bad CRC-32"),
    "legacy, cut off": (LEGACY[:-100], "a torch file, but cut off"),
    "legacy, cut off early": (LEGACY[:30], "a torch file, but cut off"),
    "pickle": (pickle.dumps({"model": {}}), "no torch file (it begins with b'\\x80"),
    "pickle of an array": (pickle.dumps(np.zeros(3), protocol=2), "it refers to numpy."),
    "bytes": (bytes(range(256)), "no torch file (it begins with"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_message_says_which_file_it_is(name, tmp_path):
    content, expected = FILES[name]
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        checkpoint.load(path)
    message = error.value.message
    assert str(path) in message and expected in message and "\n" not in message
    assert "weights_only" not in message, "torch's advice to run the file is not passed on"


def test_both_formats_of_torch_are_read(tmp_path):
    for content in (WHOLE, LEGACY):
        (tmp_path / "w.pth").write_bytes(content)
        assert_same(checkpoint.load(tmp_path / "w.pth")["model"], WEIGHTS)


def test_torch_alone_would_take_a_flipped_bit(tmp_path):
    """Why the checksums are compared here."""
    (tmp_path / "w.pth").write_bytes(flipped(WHOLE, "data/0"))
    loaded = torch.load(tmp_path / "w.pth", weights_only=True)["model"]["weight"]
    assert not torch.equal(loaded, WEIGHTS["weight"])


def test_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": WEIGHTS}, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "w.pth") as file:
        assert not any(record.CRC for record in file.infolist())
    assert_same(checkpoint.load(tmp_path / "w.pth")["model"], WEIGHTS)


class Custom:
    """A class that nobody allowed."""


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("thing", "named"),
    [(Custom(), "test_untrusted.Custom"), (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"), (print, "print"),
     (Path("x"), "pathlib."), (np.float64(1), "numpy.")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_other_classes_are_refused_by_name(thing, named, legacy, tmp_path):
    torch.save({"model": WEIGHTS, "args": thing}, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="nothing of it was run") as error:
        checkpoint.load(tmp_path / "w.pth")
    assert f"it refers to {named}" in error.value.message


TENSORS = {
    "number": 1.0,
    "nested": {"a": torch.zeros(1)},
    "sparse": torch.eye(3).to_sparse(),
    "on no device": torch.zeros(1, device="meta"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_what_is_no_ordinary_tensor_is_refused_by_name(name, tmp_path):
    torch.save({"model": {**WEIGHTS, "extra": TENSORS[name]}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="'extra'"):
        checkpoint.load(tmp_path / "w.pth")


def test_whole_numbers_are_not_taken_for_weights():
    model = nn.Linear(3, 2)
    with pytest.raises(UserError, match=r"weight \(2, 3\) of torch.int8, here \(2, 3\)"):
        checkpoint.load_strictly(model, {**model.state_dict(), "weight": torch.zeros(2, 3, dtype=torch.int8)}, "w.pth")


# checkpoints of another model

small = {"img_size": 16, "patch_size": 4, "num_heads": 2}
mae = partial(MaskedAutoencoderViT, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2, **small)
vit = partial(VisionTransformer, **small)


def state(model: nn.Module, *without: str) -> dict:
    return {name: value for name, value in model.state_dict().items() if not name.startswith(without)}


def strictly(path: str, model: nn.Module) -> None:
    checkpoint.load_strictly(model, checkpoint.load(path)["model"], path)


def refused(function, tmp_path: Path, weights: dict, model: nn.Module) -> str:
    torch.save({"model": weights}, tmp_path / "w.pth")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        function(str(tmp_path / "w.pth"), model)
    assert_same(dict(model.state_dict()), before)
    assert str(tmp_path / "w.pth") in error.value.message
    return error.value.message


@pytest.mark.parametrize("shape", [(), (8,), (17, 8), (1, 1, 8), (1, 0, 8), (2, 17, 8)])
def test_positions_of_no_such_shape_are_named(shape, tmp_path):
    weights = {**state(mae(embed_dim=8, depth=1)), "pos_embed": torch.zeros(shape)}
    model = vit(embed_dim=8, depth=1, num_classes=3)
    message = refused(checkpoint.load_pretrained, tmp_path, weights, model)
    assert f"pos_embed {shape}, here (1, 17, 8)" in message


def test_architectures_are_told_by_name_kind_and_size():
    with torch.device("meta"):
        large, probe = VIT_MODELS["vit_large_patch16"](), vit(embed_dim=24, depth=3, num_classes=5)
        huge = MAE_MODELS["mae_vit_huge_patch14"]()
    probe.head = nn.Sequential(nn.Identity(), probe.head)
    assert describe(state(large)) == (
        "a classifier of 1000 classes, large_patch16 (width 1024, 24 blocks, patches of 16)"
    )
    assert describe(state(huge)) == "a masked autoencoder, huge_patch14 (width 1280, 32 blocks, patches of 14)"
    assert describe(state(huge, "decoder", "mask_token")).startswith("an encoder alone, huge_patch14")
    assert describe(state(probe)) == "a linear probe of 5 classes (width 24, 3 blocks, patches of 4)"
    assert "no Vision Transformer" in describe(state(nn.Linear(2, 2))) and "weight, bias" in describe(
        state(nn.Linear(2, 2))
    )
    assert describe({}) == "no weights at all"


def test_every_model_of_ours_is_known_by_its_name():
    with torch.device("meta"):
        for models in (MAE_MODELS, VIT_MODELS):
            for name, builder in models.items():
                shared = re.sub("_dec.*", "", name.removeprefix("mae_").removeprefix("vit_"))
                assert f", {shared} (" in describe(builder().state_dict()), name


def test_classifier_is_no_masked_autoencoder(tmp_path):
    classifier, model = vit(embed_dim=16, depth=2, num_classes=7), mae(embed_dim=16, depth=2)
    message = refused(strictly, tmp_path, state(classifier), model)
    assert "holds a classifier of 7 classes (width 16" in message and "which is a masked autoencoder" in message
    message = refused(checkpoint.load_full_mae, tmp_path, state(classifier), model)
    assert "holds a classifier of 7 classes" in message and "cannot reconstruct" in message


def test_masked_autoencoder_is_no_classifier_but_may_become_one(tmp_path):
    message = refused(
        strictly,
        tmp_path,
        state(mae(embed_dim=16, depth=2)),
        vit(embed_dim=16, depth=2, num_classes=7),
    )
    assert "holds a masked autoencoder" in message and "--finetune" in message


@pytest.mark.parametrize("function", [strictly, checkpoint.load_pretrained])
def test_other_size_is_told_with_both(function, tmp_path):
    big, model = vit(embed_dim=24, depth=3, num_classes=7), vit(embed_dim=16, depth=2, num_classes=7)
    message = refused(function, tmp_path, state(big), model)
    assert "width 24, 3 blocks" in message and "width 16, 2 blocks" in message and "--model" in message


# anything under any key, through every loader

TINY = MAE_MODELS["mae_vit_tiny_patch4"]().state_dict()
CLASSIFIER = VIT_MODELS["vit_tiny_patch4"](num_classes=3, global_pool=True).state_dict()
NAMED = {"model": "mae_vit_tiny_patch4", "input_size": 32}


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def cyclic() -> list:
    value: list = []
    value.append(value)
    return value


def doubling(levels: int) -> list:
    """2^levels lists within lists, in a file of a few bytes for each level."""
    value: list = []
    for _ in range(levels):
        value = [value, value]
    return value


def resumed(path: str, name: str) -> None:
    models = MAE_MODELS if name.startswith("mae_") else VIT_MODELS
    model = models[name](**({} if name.startswith("mae_") else {"num_classes": 3, "global_pool": True}))
    args = main_finetune.get_args_parser().parse_args(["--resume", path, "--output_dir", "", "--input_size", "32"])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    resume.resume(Dist(torch.device("cpu")), args, model, torch.optim.AdamW(model.parameters()), scaler)


def evaluated(path: str) -> None:
    options = ["--eval", "--resume", path, "--input_size", "32", "--nb_classes", "3", "--model", "vit_tiny_patch4"]
    parser = main_finetune.get_args_parser()
    args = parser.parse_args(options)
    weights = build.take_options(args, parser, probe=False)
    sizes = {"img_size": args.input_size, "num_classes": args.nb_classes, "global_pool": args.global_pool}
    checkpoint.load_strictly(VIT_MODELS[args.model](**sizes), weights, path)


def exported(path: str) -> None:
    Path(path).with_suffix(".safetensors").unlink(missing_ok=True)
    export.export(path, "safetensors", output=Path(path).with_suffix(".safetensors"))


MAE_LOADERS = {
    "--resume": partial(resumed, name="mae_vit_tiny_patch4"),
    "--finetune": lambda path: checkpoint.load_pretrained(path, VIT_MODELS["vit_tiny_patch4"](num_classes=3)),
    "load_full_mae": lambda path: checkpoint.load_full_mae(path, MAE_MODELS["mae_vit_tiny_patch4"]()),
    "open_model": build.open_model,
    "open_model, encoder": partial(build.open_model, encoder_only=True),
    "export": exported,
}
CLASSIFIER_LOADERS = {
    "--resume": partial(resumed, name="vit_tiny_patch4"),
    "--finetune": lambda path: checkpoint.load_pretrained(path, VIT_MODELS["vit_tiny_patch4"](global_pool=True)),
    "--eval": evaluated,
    "open_model": build.open_model,
    "export": exported,
}


def plain_end(loader, state: object, tmp_path: Path) -> str:
    """The message of a UserError, or "" where it loads; nothing else may come of a file, and little memory."""
    path = tmp_path / "w.pth"
    recursion = sys.getrecursionlimit()
    sys.setrecursionlimit(10**5)  # to write it
    try:
        torch.save(state, path)
    finally:
        sys.setrecursionlimit(recursion)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
    try:
        loader(str(path))
    except UserError as error:
        assert str(path) in error.message and len(error.message) < 2000 and error.message.isprintable(), error.message
        return error.message
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    return ""


ODD_ARGS = {
    "number": 5, "text": "x", "list": [1], "tensor": torch.zeros(3), "none": None, "names": {5: 6, None: 7},
    "side as text": NAMED | {"input_size": "32"}, "side as float": NAMED | {"input_size": 32.0},
    "side that is no number": NAMED | {"input_size": float("nan")}, "side as dict": NAMED | {"input_size": {"a": 1}},
    "side of 30 digits": NAMED | {"input_size": 10**30}, "side of 500 digits": NAMED | {"input_size": 10**500},
    "side below 0": NAMED | {"input_size": -32}, "three sides": NAMED | {"input_size": [3, 32, 32]},
    "side as tensor": NAMED | {"input_size": torch.tensor(32)}, "side in a list": NAMED | {"input_size": [[32], 32]},
    "model in a list": NAMED | {"model": ["mae_vit_tiny_patch4"]}, "mask in a list": NAMED | {"mask": ["random"]},
    "deep": NAMED | {"seed": nested(3000)}, "deep side": NAMED | {"input_size": nested(3000)},
    "cyclic": NAMED | {"seed": cyclic()}, "cyclic side": NAMED | {"input_size": cyclic()},
    "doubling": NAMED | {"seed": doubling(60)}, "huge number": NAMED | {"lr": 10**400},
    "namespace": argparse.Namespace(input_size="32", model=nested(3000)),
    "long name": {"model": "x" * 10**6}, "name with escapes": {"model": "x\x1b[31m\nerror: y"}, "no name": {"model": 5},
    "long text": NAMED | {"seed": "x" * 10**6}, "escapes": NAMED | {"seed": "\x1b[31m\n"}, "\x1b[31m": {"\x1b[31m": 5},
}  # fmt: skip
CONTRADICTING = {
    "a million pixels": NAMED | {"input_size": 10**6}, "other grid": NAMED | {"input_size": [16, 32]},
    "2^62 pixels": NAMED | {"input_size": 2**62}, "below a patch": NAMED | {"input_size": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_ARGS)
def test_args_of_any_type_tell_nothing_and_hurt_nothing(name, tmp_path):
    """Each by half of the loaders, in turn."""
    turn = list(ODD_ARGS).index(name) % 2
    for loader in list(MAE_LOADERS)[turn::2]:
        with project_log() as lines:
            assert not plain_end(MAE_LOADERS[loader], {"model": TINY, "args": ODD_ARGS[name]}, tmp_path), loader
        assert all(len(line) < 2000 and line.isprintable() for line in lines)
        if "side" in name and loader != "load_full_mae":
            assert any("input_size" in line and "not used" in line for line in lines)


@pytest.mark.parametrize("loader", ["--resume", "--finetune", "open_model", "export"])
@pytest.mark.parametrize("name", CONTRADICTING)
def test_a_size_that_the_positions_contradict_is_refused(name, loader, tmp_path):
    assert "input_size" in plain_end(MAE_LOADERS[loader], {"model": TINY, "args": CONTRADICTING[name]}, tmp_path)


@pytest.mark.parametrize("name", ["mae_vit_huge_patch14", "vit_huge_patch14"])
@pytest.mark.parametrize("encoder_only", [False, True])
def test_a_small_file_makes_no_room_for_the_large_model_that_it_names(name, encoder_only, tmp_path):
    shapes = {"cls_token": (1, 1, 8), "pos_embed": (1, 257, 8), "patch_embed.proj.weight": (8, 3, 14, 14)}
    weights = {key: torch.zeros(shape) for key, shape in (shapes | {"decoder_norm.bias": (8,)}).items()}
    loader = partial(build.open_model, encoder_only=encoder_only)
    assert "does not fit" in plain_end(loader, {"model": weights, "args": {"model": name}}, tmp_path)


def expanded(*shape: int) -> torch.Tensor:
    return torch.zeros(1).expand(*shape)


ODD_TENSORS = {
    "0-d": torch.zeros(()), "empty": torch.zeros(0), "no width": torch.zeros(1, 0, 0), "1-d": torch.zeros(64),
    "terabytes": expanded(10**6, 10**6), "terabytes of positions": expanded(1, 10**11, 64),
    "many dimensions": torch.zeros((1,) * 60), "meta": torch.zeros(1, 65, 64, device="meta"),
    "sparse": torch.ones(1, 65, 64).to_sparse(), "csr": torch.eye(3).to_sparse_csr(),
    "complex": torch.zeros(1, 65, 64, dtype=torch.complex64), "whole": torch.zeros(1, 65, 64, dtype=torch.int64),
    "bool": torch.zeros(1, 65, 64, dtype=torch.bool), "float8": torch.zeros(1, 65, 64).to(torch.float8_e4m3fn),
    "quantized": torch.quantize_per_tensor(torch.zeros(1, 65, 64), 0.1, 0, torch.quint8),
    "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "Inf in float32": torch.full((1, 65, 64), 1e300, dtype=torch.float64),
    "number": 5, "huge number": 10**500, "text": "x" * 10**6, "deep": nested(3000), "cyclic": cyclic(), "none": None,
    "NaN": torch.full((1, 65, 64), float("nan")), "one Inf": torch.tensor([[[1.0] * 64] * 64 + [[-float("inf")] * 64]]),
}  # fmt: skip
VICTIMS = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.attn.qkv.weight")


def in_layouts(weights: dict, victim: str, value: object) -> dict[str, dict]:
    """One file as each project writes it, with another value at one place."""
    theirs = convert.to_hugging_face({key: tensor for key, tensor in weights.items() if not key.startswith("fc_norm")})
    names = {"cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings",
             "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
             "blocks.1.attn.qkv.weight": "vit.encoder.layer.1.attention.attention.key.weight"}  # fmt: skip
    changed = {**weights, victim: value}
    return {
        "ours": {"model": changed, "args": NAMED},
        "timm": changed,
        "Hugging Face": {**theirs, names[victim]: value},
        "Lightning": {"state_dict": {f"net.{key}": tensor for key, tensor in changed.items()}},
    }


@pytest.mark.parametrize("layout", ["ours", "timm", "Hugging Face", "Lightning"])
@pytest.mark.parametrize("name", ODD_TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_odd_tensors_are_refused_in_every_layout_by_every_loader(name, layout, tmp_path):
    for number, victim in enumerate(VICTIMS):
        loaders = list((MAE_LOADERS if number % 2 else CLASSIFIER_LOADERS).values())
        loader = loaders[(number + len(name)) % len(loaders)]
        weights = TINY if number % 2 else CLASSIFIER
        assert plain_end(loader, in_layouts(weights, victim, ODD_TENSORS[name])[layout], tmp_path), victim


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_number_that_is_not_finite_is_named_by_every_loader(value, dtype, tmp_path):
    for loaders, weights, key in (
        (MAE_LOADERS, TINY, "blocks.2.mlp.fc1.weight"), (CLASSIFIER_LOADERS, CLASSIFIER, "head.weight"),
    ):  # fmt: skip
        bad = weights[key].to(dtype).clone()
        bad.view(-1)[-2] = value
        for name, loader in loaders.items():
            message = plain_end(loader, {"model": {**weights, key: bad}}, tmp_path)
            assert f"'{key}' holds {'NaN' if value != value else 'Inf'}" in message, name


ODD_KEYS = {
    "number": 5, "none": None, "tuple": (1, 2), "long": "x" * 10**6, "escapes": "\x1b[31m\nerror: \x07",
    "surrogate": "\ud800", "long prefix": "x." * 10**5 + "cls_token", "empty": "",
}  # fmt: skip


@pytest.mark.parametrize("loader", CLASSIFIER_LOADERS)
@pytest.mark.parametrize("name", ODD_KEYS)
def test_odd_keys_are_refused(name, loader, tmp_path):
    weights = {**CLASSIFIER, ODD_KEYS[name]: torch.zeros(1)}
    assert plain_end(CLASSIFIER_LOADERS[loader], {"model": weights}, tmp_path)
    foreign = {"state_dict": {"x" if key == "cls_token" else key: value for key, value in weights.items()}}
    assert plain_end(CLASSIFIER_LOADERS[loader], foreign, tmp_path)


NO_STATES = [nested(3000), cyclic(), {"a": nested(3000)}, {"x" * 10**6: 1}, {5: {}}, 10**500, "x", {"\x1b[31m": 1}]


@pytest.mark.parametrize("state", NO_STATES, ids=range(len(NO_STATES)))
def test_what_is_no_state_dict_is_told_in_a_line(state, tmp_path):
    assert "no state dict" in plain_end(checkpoint.load, state, tmp_path)


def test_a_hundred_thousand_keys_are_answered_within_seconds(tmp_path):
    """As many names of one tensor; in a zip file and in safetensors the number is known before they are read."""
    many = {f"blocks.{i}.weight": torch.zeros(0) for i in range(100_000)}
    torch.save({"model": dict.fromkeys(many, torch.zeros(1))}, tmp_path / "views.pth")
    safetensors.torch.save_file(many, tmp_path / "many.safetensors")
    for path in tmp_path.iterdir():
        start = time.process_time()
        with pytest.raises(UserError) as error:
            checkpoint.load_pretrained(path, VIT_MODELS["vit_tiny_patch4"](num_classes=3))
        assert time.process_time() - start < 10 and len(error.value.message) < 2000


HEADERS = ["[" * 10**5, '{"input_size": ' + "9" * 10**5 + "}", "{", "5", '{"model": "\\u001b"}', '{"input_size": NaN}']


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_the_header_of_safetensors_may_hold_anything(header, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors.torch.save(TINY, {"args": header}))
    with project_log() as lines:
        model = build.open_model(path)
    assert_same(dict(model.state_dict()), TINY)
    assert all(line.isprintable() for line in lines)


def test_a_pickle_may_not_ask_for_memory(tmp_path):
    """torch lets a file of 100 bytes call bytearray(10**12)."""
    content = (
        b"\x80\x02}X\x05\0\0\0modelc__builtin__\nbytearray\n\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85Rs."
    )
    path = tmp_path / "w.pth"
    path.write_bytes(archive(**{"m/data.pkl": content, "m/version": b"3\n", "m/byteorder": b"little"}))
    with pytest.raises(UserError, match="it refers to bytearray"):
        checkpoint.load(path)
    path.write_bytes(LEGACY + b"\nbytearray\n")
    with pytest.raises(UserError, match="it refers to bytearray"):
        checkpoint.load(path)


# training state


def optimizers() -> dict[str, torch.optim.Optimizer]:
    found = {}
    for name, make in {"AdamW": partial(torch.optim.AdamW, lr=0.1), "LARS": partial(LARS, lr=0.1)}.items():
        model = nn.Linear(3, 2)
        model(torch.ones(1, 3)).sum().backward()
        found[name] = make(model.parameters())
        found[name].step()
    return found


def changed(state: dict, path: str, value: object) -> dict:
    *above, last = (int(part) if part.isdigit() else part for part in path.split("/"))
    inner = state
    for part in above:
        inner = inner[part]
    inner[last] = value
    return state


BAD_STATES = {
    "epoch of words": ("epoch", "7", "epoch is '7'"),
    "epoch below 0": ("epoch", -1, "epoch is -1"),
    "epoch of truth": ("epoch", True, "epoch is True"),
    "no optimizer": ("optimizer", None, "no state"),
    "no groups": ("optimizer/param_groups", {}, "no param_groups"),
    "group of words": ("optimizer/param_groups/0", "group", "no param_groups"),
    "fewer parameters": ("optimizer/param_groups/0/params", [0], "other parameter groups"),
    "no parameters": ("optimizer/param_groups/0/params", None, "other parameter groups"),
    "parameter of words": ("optimizer/param_groups/0/params", [0, "1"], "'1'"),
    "moment of another shape": ("optimizer/state/0/exp_avg", torch.zeros(2, 4), "exp_avg of parameter 0 is of shape"),
    "moment of words": ("optimizer/state/1/exp_avg_sq", "0", "exp_avg_sq of parameter 1 is '0'"),
    "no moments": ("optimizer/state/1", None, "parameter 1 lacks"),
    "state of nobody": ("optimizer/state/7", {}, "in no group, such as 7"),
    "state of words": ("optimizer/state/1", "0", "parameter 1 lacks"),
    "step below 0": ("optimizer/state/1/step", torch.tensor(-4096.0), "step of parameter 1 is -4096.0"),
    "step that is no number": ("optimizer/state/1/step", float("nan"), "step of parameter 1 is nan"),
    "step of words": ("optimizer/state/1/step", [1], "step of parameter 1 is [1]"),
    "moment of whole numbers": ("optimizer/state/0/exp_avg", torch.zeros(2, 3, dtype=torch.int64), "exp_avg of param"),
    "rate of words": ("optimizer/param_groups/0/lr", "0.1", "lr of a group is '0.1'"),
    "scaler of words": ("scaler/scale", "1", "scale of its loss scaler is '1'"),
    "scaler beyond float32": ("scaler/scale", 1e193, "scale of its loss scaler is 1e+193"),
    "scaler beyond int32": ("scaler/_growth_tracker", 2**31, "_growth_tracker of its loss scaler is 2147483648"),
    "scaler that is no number": ("scaler/scale", float("nan"), "scale of its loss scaler is nan"),
    "scaler of nothing known": ("scaler", {"a": 1}, "scale of its loss scaler is None"),
    "scaler in a list": ("scaler", [1.0], "its loss scaler is a list"),
    "iteration of words": ("iteration", "2", "iteration is '2'"),
    "no batch size": ("args", {"accum_iter": 1}, "batch_size is None"),
    "no steps an update": ("args/accum_iter", 0, "accum_iter is 0"),
    "no processes": ("world_size", -1, "world_size is -1"),
    "progress of words": ("progress/sums", "loss", "progress is no dict"),
    "progress of another": ("progress", {"sums": {"loss": 1.0}, "counts": {"loss": 2}}, "progress is no dict"),
    "best of words": ("best", "checkpoint-2.pth", "best is 'checkpoint-2.pth'"),
    "accuracy of words": ("max_accuracy", "50", "max_accuracy is '50'"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_training_state_that_cannot_go_on_is_refused(name, tmp_path):
    path, value, expected = BAD_STATES[name]
    optimizer = optimizers()["AdamW"]
    scaler = torch.amp.GradScaler("cpu")
    state = {
        "epoch": 3, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "iteration": 2, "world_size": 1,
        "args": {"batch_size": 4, "accum_iter": 1},
        "progress": {"sums": {"loss": 1.0, "lr": 1.0}, "counts": {"loss": 2, "lr": 2}},
        "best": (50.0, 2), "max_accuracy": 50.0,
    }  # fmt: skip
    check_training_state(state, optimizer, scaler)
    with pytest.raises(ValueError, match=re.escape(expected)):
        check_training_state(changed(state, path, value), optimizer, scaler)


def test_state_of_another_optimizer_is_refused():
    both = optimizers()
    for ours, theirs in (("AdamW", "LARS"), ("LARS", "AdamW")):
        state = {"epoch": 3, "optimizer": both[theirs].state_dict()}
        with pytest.raises(ValueError, match="lacks"):
            check_training_state(state, both[ours])
        check_training_state({"epoch": 3, "optimizer": both[ours].state_dict()}, both[ours])


# the rule itself


def python_files() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if not {".venv", ".git"} & set(path.relative_to(ROOT).parts)]


def test_no_file_of_the_project_is_ever_loaded_as_code():
    """Every torch.load says weights_only=True, literally; pickles are read in tests alone."""
    loads, forbidden = [], ("pickle.load", "pickle.loads", "torch.jit.load", "torch.hub.load", "pickle.Unpickler")
    for path in python_files():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "pickle"):
                assert not {"load", "loads", "Unpickler"} & {alias.name for alias in node.names}, path
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name in ("torch.load", "torch.hub.load_state_dict_from_url"):
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
                loads.append(path.relative_to(ROOT).as_posix())
            # --tokenizer is code that its user names, as a script of his own; no checkpoint leads there
            tokenizer = path.relative_to(ROOT).as_posix() == "util/targets.py" and name == "torch.jit.load"
            if path.parent.name != "tests" and not tokenizer:
                assert name not in forbidden, f"{path}:{node.lineno} {name}"
                if name == "np.load":
                    assert "allow_pickle" not in ast.unparse(node), f"{path}:{node.lineno}"
    assert "util/weights/untrusted.py" in loads and len(loads) >= 2


def test_namespace_is_allowed_for_our_call_alone(tmp_path):
    before = torch.serialization.get_safe_globals()  # what torch itself allows
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pth")
    assert checkpoint.load(tmp_path / "w.pth")["args"] == argparse.Namespace(lr=0.1)
    after = torch.serialization.get_safe_globals()
    assert set(after) == set(before) and argparse.Namespace not in after
