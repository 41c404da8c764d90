"""Checkpoints: loaded as data and never as code, and fitted to a classifier."""

import argparse
import io
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, load, project_log
from torch import nn

from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util.errors import UserError
from util.weights import checkpoint
from util.weights.checkpoint import load_full_mae, load_pretrained, load_strictly

WIDTH = 16
mae = partial(
    MaskedAutoencoderViT, patch_size=4, embed_dim=WIDTH, depth=2, num_heads=2, decoder_embed_dim=8, decoder_depth=1,
    decoder_num_heads=2,
)  # fmt: skip
vit = partial(VisionTransformer, patch_size=4, embed_dim=WIDTH, depth=2, num_heads=2, num_classes=3)


def saved(path: Path, model: nn.Module, **more) -> str:
    torch.save({"model": model.state_dict(), **more}, path)
    return str(path)


# loading what may come from anywhere


def test_namespace_of_old_files_is_loaded(tmp_path):
    path = saved(tmp_path / "old.pth", nn.Linear(3, 2), args=argparse.Namespace(input_size=224, blr=1.5e-4), epoch=799)
    with pytest.raises(pickle.UnpicklingError):
        load(path)  # without the exception for this class it is refused
    state = checkpoint.load(path)
    assert state["args"] == argparse.Namespace(input_size=224, blr=1.5e-4) and state["epoch"] == 799
    with pytest.raises(pickle.UnpicklingError):
        load(path)  # the exception holds for our call alone


class Evil:
    """Unpickling it would create a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("key", ["args", "model"])
def test_file_with_code_is_refused_and_not_run(kind, key, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    state = {"model": {}, key: Evil(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match="refused, and nothing of it was run") as error:
        checkpoint.load(path)
    assert str(path) in error.value.message and not marker.exists()
    pickle.loads(pickle.dumps(state))  # the trap works: a plain unpickler would have run it
    assert marker.exists()


def whole_file(legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": nn.Linear(30, 30).state_dict()}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


NO_CHECKPOINTS = {
    "zero bytes": b"",
    "truncated": whole_file()[:1500],
    "last byte missing": whole_file()[:-1],
    "truncated, legacy": whole_file(legacy=True)[:300],
    "text": b"hello\n",
    "page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "stop": b".",
    "numbers": bytes(range(256)),
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused_by_name(name, tmp_path):
    path = tmp_path / "some.pth"
    path.write_bytes(NO_CHECKPOINTS[name])
    with pytest.raises(UserError) as error:
        checkpoint.load(path)
    assert str(path) in error.value.message


@pytest.mark.parametrize("state", [[1, 2], torch.zeros(2), {}, {"state_dict": {}}, {"model": None}, {"model": [1]}])
def test_file_without_a_state_dict_is_refused_by_name(state, tmp_path):
    torch.save(state, tmp_path / "some.pth")
    with pytest.raises(UserError, match="'model'") as error:
        checkpoint.load(tmp_path / "some.pth")
    assert str(tmp_path / "some.pth") in error.value.message


def test_missing_file_and_folder_are_refused_by_name(tmp_path):
    for path in (tmp_path / "lost.pth", tmp_path):
        with pytest.raises(UserError, match=f"no checkpoint {path}"):
            checkpoint.load(path)


# pretrained weights for a classifier


def without(state: dict, *prefixes: str) -> dict:
    return {name: value for name, value in state.items() if not name.startswith(prefixes)}


@pytest.mark.parametrize("global_pool", [True, False])
def test_masked_autoencoder_becomes_a_classifier(global_pool, tmp_path):
    source, model = mae(img_size=16), vit(img_size=16, global_pool=global_pool)
    new = ("head.", "fc_norm.") if global_pool else ("head.",)
    fresh = {name: value.clone() for name, value in model.state_dict().items() if name.startswith(new)}
    with project_log() as lines:
        load_pretrained(saved(tmp_path / "mae.pth", source), model)
    loaded = model.state_dict()
    assert ("norm.weight" in loaded) != global_pool and ("fc_norm.weight" in loaded) == global_pool
    for name, value in without(loaded, *new).items():
        assert torch.equal(value, source.state_dict()[name]), name
    assert_same({name: loaded[name] for name in fresh}, fresh)
    # the line names what starts from scratch
    assert all(name in lines[-1] for name in fresh)


def test_head_of_another_size_is_dropped_with_a_line(tmp_path):
    source, model = vit(img_size=16, num_classes=5, global_pool=True), vit(img_size=16, global_pool=True)
    head = model.head.weight.clone()
    with project_log() as lines:
        load_pretrained(saved(tmp_path / "vit.pth", source), model)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.fc_norm.weight, source.fc_norm.weight)
    assert any("dropped head.weight (5, 16)" in line and "(3, 16)" in line for line in lines)
    assert any("dropped head.bias (5,)" in line for line in lines)


def test_head_of_the_same_size_is_kept_without_a_line(tmp_path):
    source, model = vit(img_size=16, global_pool=True), vit(img_size=16, global_pool=True)
    nn.init.normal_(source.head.weight)
    with project_log() as lines:
        load_pretrained(saved(tmp_path / "vit.pth", source), model)
    assert_same(dict(model.state_dict()), dict(source.state_dict()))
    assert not any("dropped" in line for line in lines)


def resized(pos_embed: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """[1, 1 + h * w, D] -> [1, 1 + h' * w', D], channel by channel; the class token's row stays."""
    rows = [pos_embed[:, :1]]
    image = torch.stack([pos_embed[0, 1:, d].reshape(old) for d in range(pos_embed.shape[2])])[None]
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    rows.append(image[0].flatten(1).T[None])
    return torch.cat(rows, dim=1)


GRIDS = {
    "square to square": (32, 64, None, (8, 8), (16, 16)),
    "square to smaller": (32, 16, None, (8, 8), (4, 4)),
    "square to rectangle": (32, (32, 48), None, (8, 8), (8, 12)),
    "square to rectangle of as many patches": (32, (16, 64), None, (8, 8), (4, 16)),
    # 4 x 16 patches are 64, as in a square of 8: only the arguments tell
    "rectangle, from a dict": ((16, 64), 32, {"input_size": (16, 64)}, (4, 16), (8, 8)),
    "rectangle, from a list": ((32, 64), 32, {"input_size": [32, 64]}, (8, 16), (8, 8)),
    "rectangle, from a namespace": ((32, 64), 48, argparse.Namespace(input_size=(32, 64)), (8, 16), (12, 12)),
    "square, from a dict": (32, 64, {"input_size": 32, "lr": None}, (8, 8), (16, 16)),
    "arguments without a size": (32, 64, {"lr": 0.1}, (8, 8), (16, 16)),
}


@pytest.mark.parametrize("name", GRIDS)
def test_positions_are_interpolated_bicubically(name, tmp_path):
    source_size, size, args, old, new = GRIDS[name]
    source, model = mae(img_size=source_size), vit(img_size=size, global_pool=True)
    nn.init.normal_(source.pos_embed)
    more = {} if args is None else {"args": args}
    with project_log() as lines:
        load_pretrained(saved(tmp_path / "mae.pth", source, **more), model)
    assert f"resized, from {old[0] * old[1]} patches an image to {new[0] * new[1]}" in "\n".join(lines)
    expected = resized(source.pos_embed.detach(), old, new)
    assert expected.shape == model.pos_embed.shape
    assert torch.allclose(model.pos_embed, expected, atol=1e-6)
    assert torch.equal(model.pos_embed[:, 0], source.pos_embed[:, 0])


@pytest.mark.parametrize("size", [32, (32, 64), (16, 64)])
def test_positions_of_the_same_grid_stay_bit_for_bit(size, tmp_path):
    source, model = mae(img_size=size), vit(img_size=size, global_pool=True)
    nn.init.normal_(source.pos_embed)
    with project_log() as lines:
        load_pretrained(saved(tmp_path / "mae.pth", source, args={"input_size": size}), model)
    assert torch.equal(model.pos_embed, source.pos_embed) and "resized" not in "\n".join(lines)


def test_unknown_rectangle_is_refused(tmp_path):
    source, model = mae(img_size=(32, 64)), vit(img_size=32, global_pool=True)
    with pytest.raises(UserError, match="128 patches"):
        load_pretrained(saved(tmp_path / "mae.pth", source), model)


@pytest.mark.parametrize(
    ("key", "global_pool"),
    [("blocks.1.mlp.fc1.weight", True), ("patch_embed.proj.bias", True), ("norm.weight", False), ("pos_embed", True)],
)
def test_missing_key_is_refused_by_name(key, global_pool, tmp_path):
    state = without(mae(img_size=16).state_dict(), key)
    torch.save({"model": state}, tmp_path / "mae.pth")
    with pytest.raises(UserError) as error:
        load_pretrained(str(tmp_path / "mae.pth"), vit(img_size=16, global_pool=global_pool))
    assert "1 keys missing" in error.value.message and key in error.value.message


def test_unknown_key_is_refused_by_name(tmp_path):
    state = {**mae(img_size=16).state_dict(), "gate.weight": torch.zeros(1)}
    torch.save({"model": state}, tmp_path / "mae.pth")
    with pytest.raises(UserError, match="gate.weight"):
        load_pretrained(str(tmp_path / "mae.pth"), vit(img_size=16, global_pool=True))


def test_what_a_file_holds_is_told_of_the_file(tmp_path):
    """Not of the mixture that would be loaded, with this model's own head."""
    encoder = {name: value for name, value in mae(img_size=16, embed_dim=32).state_dict().items()
               if "decoder" not in name and name != "mask_token"}  # fmt: skip
    torch.save({"model": encoder}, tmp_path / "mae.pth")
    with pytest.raises(UserError, match="holds an encoder alone"):
        load_pretrained(str(tmp_path / "mae.pth"), vit(img_size=16, global_pool=True))


def test_other_patches_are_refused_as_such(tmp_path):
    """16 patches of 4 pixels fit no grid of 8 pixels, but that is not what is wrong."""
    source = mae(img_size=16, patch_size=4)
    torch.save({"model": source.state_dict(), "args": {"input_size": 16}}, tmp_path / "mae.pth")
    model = vit(img_size=16, patch_size=8, global_pool=True)
    with pytest.raises(UserError, match=r"patch_embed.proj.weight \(\d+, 3, 4, 4\), here .*--model"):
        load_pretrained(str(tmp_path / "mae.pth"), model)


def test_other_width_is_refused_with_both_shapes(tmp_path):
    source = mae(img_size=16, embed_dim=32)
    for size in (16, 32):  # with and without interpolation
        with pytest.raises(UserError, match="of another shape") as error:
            load_pretrained(saved(tmp_path / "mae.pth", source), vit(img_size=size, global_pool=True))
        assert "32" in error.value.message and "here" in error.value.message
        assert "--model" in error.value.message


def test_refused_weights_leave_the_model_as_it_was(tmp_path):
    model = vit(img_size=16, global_pool=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({"model": without(mae(img_size=16).state_dict(), "cls_token")}, tmp_path / "mae.pth")
    with pytest.raises(UserError, match="cls_token"):
        load_pretrained(str(tmp_path / "mae.pth"), model)
    assert_same(dict(model.state_dict()), before)


# masked autoencoders with their decoder


def test_full_file_reconstructs_as_its_source(tmp_path):
    source, model = mae(img_size=16), mae(img_size=16)
    load_full_mae(saved(tmp_path / "full.pth", source), model)
    assert_same(dict(model.state_dict()), dict(source.state_dict()))


def test_encoder_alone_is_refused_naming_keys_and_the_files_to_use(tmp_path):
    model = mae(img_size=16)
    torch.save({"model": without(model.state_dict(), "decoder_", "mask_token")}, tmp_path / "encoder.pth")
    with pytest.raises(UserError) as error:
        load_full_mae(str(tmp_path / "encoder.pth"), model)
    message = error.value.message
    assert "mask_token" in message and "decoder_" in message
    assert (
        "_full.pth" in message and "mae_visualize_vit" in message and "https://dl.fbaipublicfiles.com/mae/" in message
    )


def test_other_mae_is_refused_without_advice_on_decoders(tmp_path):
    path = saved(tmp_path / "full.pth", mae(img_size=16, depth=1))
    with pytest.raises(UserError, match="blocks.1") as error:
        load_full_mae(path, mae(img_size=16))
    assert "_full" not in error.value.message


# all of a model


def strictly(path: str, model: nn.Module) -> None:
    load_strictly(model, checkpoint.load(path)["model"], path)


def test_weights_are_loaded_alone(tmp_path):
    source, model = nn.Linear(3, 2), nn.Linear(3, 2)
    strictly(saved(tmp_path / "c.pth", source, optimizer={}, epoch=7), model)
    assert_same(dict(model.state_dict()), dict(source.state_dict()))


def test_loading_another_model_is_refused_naming_the_keys(tmp_path):
    path = saved(tmp_path / "c.pth", nn.Linear(3, 2, bias=False))
    with pytest.raises(UserError, match="bias"):
        strictly(path, nn.Linear(3, 2))
    with pytest.raises(UserError, match=r"weight \(2, 3\), here \(4, 3\)"):
        strictly(path, nn.Linear(3, 4, bias=False))
