"""Files that may be anything: read as data and never as code, with a message that says what else a file is."""

import argparse
import os
import re
import zipfile
from pathlib import Path

import torch

from util.convert import read_safetensors
from util.errors import UserError

_BEGINNINGS = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"%PDF": "a PDF document",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file, as Keras writes them",
    b"\x1f\x8b": "a gzip archive: unpack it and give the file inside",
    b"BZh": "a bzip2 archive: unpack it and give the file inside",
    b"\xfd7zXZ": "an xz archive: unpack it and give the file inside",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive: unpack it and give the file inside",
    b"version https://git-lfs": "a Git LFS pointer and not the file itself: run git lfs pull where it comes from",
    b"<": "an HTML or XML page, probably an error message that was saved in place of the file: download it again",
    b"{": "a JSON text",
}
_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9\x20j\xa8P\x19."  # how torch.save began its files before it wrote zips


def read(path: Path) -> object:
    """File of torch.save or safetensors -> what it holds, on the CPU. Nothing in the file is run.

    Allowed are tensors, plain values and `argparse.Namespace` (files of the original code hold one). Zip files must
    agree with their checksums, which torch writes and does not check. Raises UserError saying what the file is instead.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, this takes names that are too long
        raise UserError(f"no checkpoint {path}: give a file or an https:// URL")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): mend that, or give another file") from error
    if not head:
        raise UserError(f"{path} is empty (0 bytes): whoever wrote it was cut off; give another file")
    if head[8:10] == b'{"':
        return read_safetensors(path)
    if head.startswith(_ZIP):
        _check_zip(path)
    elif what := _what_it_is(head):
        raise UserError(f"{path} is no checkpoint but {what}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # garbage makes the reader raise whatever it likes
        raise UserError(f"{path} {_why_refused(error, head)}") from error


def _what_it_is(head: bytes) -> str:
    """First bytes of a file -> what it is, '' where it may be a torch file of the old format."""
    for beginning, what in _BEGINNINGS.items():
        if head.lstrip(b" \t\r\n\xef\xbb\xbf").startswith(beginning):
            return what
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "a WebP image"
    if head.startswith(b"BM") and head[6:10] == bytes(4):
        return "a BMP image"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it and give the file inside"
    try:
        text = head.decode()
    except UnicodeDecodeError:
        return ""
    readable = text.isprintable() or text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable()
    return f"a text that begins with {text[:30]!r}" if readable else ""


def _check_zip(path: Path) -> None:
    """Raise UserError unless `path` is a whole, undamaged zip file that torch.save wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            names = [record.filename for record in records]
            if what := _what_zip_it_is(names):
                raise UserError(f"{path} is no checkpoint but {what}")
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise UserError(f"{path} is compressed, which torch never does: save it again by torch.save")
            for record in records:
                if record.CRC:  # 0: torch was told not to compute it
                    with archive.open(record) as file:
                        while file.read(2**20):
                            pass
    except UserError:
        raise
    except Exception as error:  # as above
        size = path.stat().st_size
        if "not a zip file" in str(error):
            raise UserError(
                f"{path} ({size:,} bytes) is cut off: the directory at the end of a checkpoint is missing or damaged. "
                "Download or copy it again"
            ) from error
        raise UserError(f"{path} ({size:,} bytes) is damaged ({error}): download or copy it again") from error


def _what_zip_it_is(names: list[str]) -> str:
    """Names in a zip file -> what it is, '' where torch.save wrote it."""
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program: save the state_dict() of the model instead"
    if any(name.endswith("/data.pkl") for name in names):
        return ""
    if any(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz)"
    return f"a zip archive that torch did not write (it holds {', '.join(names[:3]) or 'nothing'})"


def _why_refused(error: Exception, head: bytes) -> str:
    """What torch.load raised -> the rest of a message that begins with the file's name.

    Its own words are left out where they advise to load the file as code.
    """
    message = str(error)
    refused = "was refused, and nothing of it was run:"
    if match := re.search(r"GLOBAL ([\w.]+)|[Ii]nstance of ([\w.]+)", message):
        return (
            f"{refused} it refers to {match[1] or match[2]}, and only tensors, plain values and argparse.Namespace are "
            "taken. Where you trust its source, load it there and save the state_dict() alone"
        )
    if not head.startswith((_ZIP, _LEGACY)):
        return f"{refused} it is no torch file (it begins with {head[:16]!r})"
    reason = message.strip().split("\n")[0]
    reason = "" if "weights_only" in reason else f" ({reason[:200] or type(error).__name__})"
    return f"{refused} it is a torch file, but cut off, damaged or made by hand{reason}"


def check_state_dict(state: object, name: str | Path) -> None:
    """Raise UserError unless `state` is a dict whose `model` maps names to tensors of ordinary kind."""
    weights = state.get("model") if isinstance(state, dict) else None
    if not isinstance(weights, dict):
        what = f"a dict of {', '.join(map(repr, list(state)[:5])) or 'nothing'}" if isinstance(state, dict) else ""
        raise UserError(
            f"{name} is no checkpoint of this project: it has no state dict under the key 'model', but is "
            f"{what[:200] or 'a ' + type(state).__name__}"
        )
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(
                f"{name} is no checkpoint of this project: {str(key)[:80]!r} under 'model' is a {type(value).__name__} "
                "and no tensor"
            )
        ordinary = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
        if not ordinary or value.is_quantized or value.device.type != "cpu":
            raise UserError(
                f"{name}: {key!r} is another kind of tensor ({value.layout}, {value.dtype}, {value.device}): save it "
                "as an ordinary one"
            )


def options_of(state: dict) -> dict[str, object]:
    """Checkpoint -> the options that it was trained with, plain values alone; {} where it tells none."""
    args = state.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, dict):
        return {}
    plain = {name: value for name, value in args.items() if isinstance(name, str) and _is_plain(value)}
    size = plain.get("input_size")
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(_is_count(side) and side > 0 for side in sides):
        plain.pop("input_size", None)
    return plain


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _are_numbers(values: object) -> bool:
    return isinstance(values, dict) and all(isinstance(value, int | float) for value in values.values())


def check_training_state(
    state: dict, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
) -> None:
    """Raise ValueError, saying what is wrong, unless a run with `optimizer` and `scaler` can go on from `state`."""
    if not _is_count(state["epoch"]):
        raise ValueError(f"its epoch is {str(state['epoch'])[:80]!r}")
    saved = state.get("scaler")
    if saved is not None and not isinstance(saved, dict):
        raise ValueError(f"the state of its loss scaler is a {type(saved).__name__}")
    for name, ours in (scaler.state_dict() if scaler is not None and saved else {}).items():
        if not isinstance(saved.get(name), int if isinstance(ours, int) else int | float):
            raise ValueError(f"{name} of its loss scaler is {str(saved.get(name))[:80]!r}")
    _check_position(state)
    _check_optimizer(state["optimizer"], optimizer)


def _check_position(state: dict) -> None:
    """What tells where within an epoch the run was, and what it had reached."""
    options, iteration = options_of(state), state.get("iteration", 0)
    if not _is_count(iteration):
        raise ValueError(f"its iteration is {str(iteration)[:80]!r}")
    if "world_size" in state or iteration:
        for name, value in (
            ("batch_size", options.get("batch_size")), ("accum_iter", options.get("accum_iter")),
            ("world_size", state.get("world_size")),
        ):  # fmt: skip
            if not _is_count(value) or value == 0:
                raise ValueError(f"its {name} is {str(value)[:80]!r}")
    progress = state.get("progress")
    sums_and_counts = [progress.get(name) for name in ("sums", "counts")] if isinstance(progress, dict) else [None]
    if iteration and not all(map(_are_numbers, sums_and_counts)):
        raise ValueError("its progress is no dict of sums and counts")
    best = state.get("best")
    if best is not None and not (
        isinstance(best, list | tuple) and len(best) == 2 and isinstance(best[0], int | float) and _is_count(best[1])
    ):
        raise ValueError(f"its best is {str(best)[:80]!r}, not an accuracy and an epoch")
    if not isinstance(state.get("max_accuracy", 0.0), int | float):
        raise ValueError(f"its max_accuracy is {str(state['max_accuracy'])[:80]!r}")


def _check_optimizer(saved: object, optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        raise ValueError("its optimizer has no state")
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError("its optimizer has no param_groups")
    if not all(isinstance(group.get("lr", 0.0), int | float) for group in groups):
        raise ValueError("the learning rates of its param_groups are no numbers")
    ours = [group["params"] for group in optimizer.param_groups]
    theirs = [group.get("params") for group in groups]
    theirs = [indices if isinstance(indices, list) else [] for indices in theirs]
    if list(map(len, ours)) != list(map(len, theirs)):
        raise ValueError(
            f"it has other parameter groups ({list(map(len, theirs))} parameters each, here {list(map(len, ours))})"
        )
    expected = _state_names(optimizer)
    for params, indices in zip(ours, theirs, strict=True):
        for param, index in zip(params, indices, strict=True):
            if not isinstance(index, int):
                raise ValueError(f"it numbers a parameter {str(index)[:80]!r}")
            if index in saved["state"]:
                _check_moments(saved["state"][index], param, index, expected)
    if unknown := saved["state"].keys() - {index for indices in theirs for index in indices}:
        raise ValueError(f"it has the state of parameters that are in no group, such as {str(unknown.pop())[:80]!r}")


def _state_names(optimizer: torch.optim.Optimizer) -> set[str]:
    """What an optimizer of this kind keeps for each parameter, found by a step of one on a single number."""
    param = torch.nn.Parameter(torch.zeros(1))
    param.grad = torch.zeros(1)
    trial = type(optimizer)([param], lr=0.0)
    trial.step()
    return set(trial.state[param])


def _check_moments(values: object, param: torch.Tensor, index: int, expected: set[str]) -> None:
    if not isinstance(values, dict) or not expected <= values.keys():
        raise ValueError(f"the state of parameter {index} lacks {sorted(expected)}")
    for name in sorted(expected):
        value = values[name]
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) and value.is_floating_point() else None
        if shape != tuple(param.shape) and not (name == "step" and (shape == () or isinstance(value, int | float))):
            what = type(value).__name__ if shape is None else f"of shape {shape}"
            raise ValueError(f"{name} of parameter {index} is {what}; the parameter has shape {tuple(param.shape)}")
