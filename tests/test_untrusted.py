"""Files that are no checkpoint, and checkpoints of another model: each gets a message that says which it is."""

import argparse
import ast
import gzip
import io
import json
import pickle
import re
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import ROOT, assert_same
from PIL import Image
from torch import nn

from models_mae import MODELS as MAE_MODELS
from models_mae import MaskedAutoencoderViT
from models_vit import MODELS as VIT_MODELS
from models_vit import VisionTransformer
from util import checkpoint, contents
from util.checkpoint import describe
from util.errors import UserError
from util.lars import LARS


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
    message = refused(checkpoint.resume_for_eval, tmp_path, state(classifier), model)
    assert "holds a classifier of 7 classes (width 16" in message and "which is a masked autoencoder" in message
    message = refused(checkpoint.load_full_mae, tmp_path, state(classifier), model)
    assert "holds a classifier of 7 classes" in message and "cannot reconstruct" in message


def test_masked_autoencoder_is_no_classifier_but_may_become_one(tmp_path):
    message = refused(
        checkpoint.resume_for_eval,
        tmp_path,
        state(mae(embed_dim=16, depth=2)),
        vit(embed_dim=16, depth=2, num_classes=7),
    )
    assert "holds a masked autoencoder" in message and "--finetune" in message


@pytest.mark.parametrize("function", [checkpoint.resume_for_eval, checkpoint.load_pretrained])
def test_other_size_is_told_with_both(function, tmp_path):
    big, model = vit(embed_dim=24, depth=3, num_classes=7), vit(embed_dim=16, depth=2, num_classes=7)
    message = refused(function, tmp_path, state(big), model)
    assert "width 24, 3 blocks" in message and "width 16, 2 blocks" in message and "--model" in message


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
    "epoch below 0": ("epoch", -1, "epoch is '-1'"),
    "epoch of truth": ("epoch", True, "epoch is 'True'"),
    "no optimizer": ("optimizer", None, "no state"),
    "no groups": ("optimizer/param_groups", {}, "no param_groups"),
    "group of words": ("optimizer/param_groups/0", "group", "no param_groups"),
    "fewer parameters": ("optimizer/param_groups/0/params", [0], "other parameter groups"),
    "no parameters": ("optimizer/param_groups/0/params", None, "other parameter groups"),
    "parameter of words": ("optimizer/param_groups/0/params", [0, "1"], "'1'"),
    "moment of another shape": ("optimizer/state/0/exp_avg", torch.zeros(2, 4), "exp_avg of parameter 0 is of shape"),
    "moment of words": ("optimizer/state/1/exp_avg_sq", "0", "exp_avg_sq of parameter 1 is '0'"),
    "no moments": ("optimizer/state/1", None, "parameter 1 lacks"),
    "state of nobody": ("optimizer/state/7", {}, "in no group, such as '7'"),
    "state of words": ("optimizer/state/1", "0", "parameter 1 lacks"),
    "step below 0": ("optimizer/state/1/step", torch.tensor(-4096.0), "step of parameter 1 is '-4096.0'"),
    "step that is no number": ("optimizer/state/1/step", float("nan"), "step of parameter 1 is 'nan'"),
    "step of words": ("optimizer/state/1/step", [1], "step of parameter 1 is list"),
    "moment of whole numbers": ("optimizer/state/0/exp_avg", torch.zeros(2, 3, dtype=torch.int64), "exp_avg of param"),
    "rate of words": ("optimizer/param_groups/0/lr", "0.1", "lr of a group is '0.1'"),
    "scaler of words": ("scaler/scale", "1", "scale of its loss scaler is '1'"),
    "scaler beyond float32": ("scaler/scale", 1e193, "scale of its loss scaler is '1e+193'"),
    "scaler beyond int32": ("scaler/_growth_tracker", 2**31, "_growth_tracker of its loss scaler is '2147483648'"),
    "scaler that is no number": ("scaler/scale", float("nan"), "scale of its loss scaler is 'nan'"),
    "scaler of nothing known": ("scaler", {"a": 1}, "scale of its loss scaler is 'None'"),
    "scaler in a list": ("scaler", [1.0], "its loss scaler is a list"),
    "iteration of words": ("iteration", "2", "iteration is '2'"),
    "no batch size": ("args", {"accum_iter": 1}, "batch_size is 'None'"),
    "no steps an update": ("args/accum_iter", 0, "accum_iter is '0'"),
    "no processes": ("world_size", -1, "world_size is '-1'"),
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
    contents.check_training_state(state, optimizer, scaler)
    with pytest.raises(ValueError, match=re.escape(expected)):
        contents.check_training_state(changed(state, path, value), optimizer, scaler)


def test_state_of_another_optimizer_is_refused():
    both = optimizers()
    for ours, theirs in (("AdamW", "LARS"), ("LARS", "AdamW")):
        state = {"epoch": 3, "optimizer": both[theirs].state_dict()}
        with pytest.raises(ValueError, match="lacks"):
            contents.check_training_state(state, both[ours])
        contents.check_training_state({"epoch": 3, "optimizer": both[ours].state_dict()}, both[ours])


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
            if path.parent.name != "tests":
                assert name not in forbidden, f"{path}:{node.lineno} {name}"
                if name == "np.load":
                    assert "allow_pickle" not in ast.unparse(node), f"{path}:{node.lineno}"
    assert "util/untrusted.py" in loads and len(loads) >= 2


def test_namespace_is_allowed_for_our_call_alone(tmp_path):
    before = torch.serialization.get_safe_globals()  # what torch itself allows
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pth")
    assert checkpoint.load(tmp_path / "w.pth")["args"] == argparse.Namespace(lr=0.1)
    after = torch.serialization.get_safe_globals()
    assert set(after) == set(before) and argparse.Namespace not in after
