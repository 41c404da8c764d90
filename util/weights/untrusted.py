"""Files that may be anything: read as data and never as code, with a message that says what else a file is; and what
they hold, checked before it is used: anything may stand under any key.
"""

import argparse
import math
import mmap
import os
import re
import zipfile
from pathlib import Path

import torch

from util.errors import UserError, shown
from util.log import log
from util.weights.convert import MOST_TENSORS, TOO_MANY, read_safetensors

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
_MOST_PICKLED = 4 * 2**20  # bytes of names and plain values in a zip file: the largest checkpoints here have a tenth
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9\x20j\xa8P\x19."  # how torch.save began its files before it wrote zips


def read(path: Path, whole: bool = True) -> object:
    """File of torch.save or safetensors -> what it holds, on the CPU. Nothing in the file is run. Without `whole`,
    tensors stay on the disk where the format allows it, and no checksum is compared: for who asks for options alone.

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
        _check_zip(path, whole)
    elif what := _what_it_is(head):
        raise UserError(f"{path} is no checkpoint but {what}")
    try:
        _refuse_memory_for_the_asking(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=not whole and head.startswith(_ZIP))
    except UserError:
        raise
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


def _refuse_memory_for_the_asking(path: Path) -> None:
    """Raise UserError where a pickle names bytearray: torch allows it, and a few bytes can ask for terabytes of it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"\nbytearray\n") >= 0:
            raise UserError(f"{path} was refused, and nothing of it was run: it refers to bytearray, and only tensors "
                            "and plain values are taken. Save the state_dict() of the model alone")  # fmt: skip


def _check_zip(path: Path, checksums: bool) -> None:
    """Raise UserError unless `path` is a whole, undamaged zip file that torch.save wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            names = [record.filename for record in records]
            if what := _what_zip_it_is(names):
                raise UserError(f"{path} is no checkpoint but {what}")
            # torch.save writes a record for each tensor, and all else, views of tensors too, into the pickle
            pickled = max(record.file_size for record in records if record.filename.endswith("/data.pkl"))
            if len(records) > MOST_TENSORS or pickled > _MOST_PICKLED:
                raise UserError(f"{path} holds {len(records):,} tensors and {pickled:,} bytes of names: {TOO_MANY}")
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise UserError(f"{path} is compressed, which torch never does: save it again by torch.save")
            for record in records:
                if checksums and record.CRC:  # 0: torch was told not to compute it
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


# what a file holds


def check_weights(weights: dict, name: str | Path, n_bytes: int) -> None:
    """Raise UserError, naming a key, unless all values are ordinary tensors of finite numbers.

    `n_bytes`: of the file. A tensor may repeat its numbers (stride 0), so that a few bytes stand for terabytes: what
    all stand for must be of the file's order.
    """
    total, largest = 0, (0, "")
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            what = f"{shown(value)} and no tensor" if isinstance(key, str) else "a name that is no text"
            raise UserError(f"{name} is no checkpoint of this project: {shown(key)} among its weights is {what}")
        ordinary = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
        known = not value.is_floating_point() or value.dtype in _FLOATS
        if not ordinary or value.is_nested or value.is_quantized or value.device.type != "cpu" or not known:
            raise UserError(
                f"{name}: {shown(key)} is another kind of tensor ({value.layout}, {value.dtype}, {value.device}): "
                "save it as an ordinary one of float32"
            )
        size = math.prod(value.shape) * value.element_size()
        total, largest = total + size, max(largest, (size, key))
    if total > 4 * n_bytes + 2**20:
        raise UserError(
            f"{name} ({n_bytes:,} bytes) stands for {total:,} bytes of weights, most of them in {shown(largest[1])}, "
            "which repeats what is stored: save it by .contiguous()"
        )
    for key, value in weights.items():
        # one pass and no copy: NaN is the least and the greatest of all that it is among
        if value.is_floating_point() and value.numel():
            least, greatest = (float(end) for end in torch.aminmax(value.detach()))
            most = torch.finfo(torch.float32).max
            if not -most <= least <= greatest <= most:
                what = "NaN" if math.isnan(least) else "Inf, or what becomes that in float32"
                raise UserError(f"{name}: {shown(key)} holds {what}: the run that wrote it had gone wrong before. Take "
                                "an earlier checkpoint, or another file")  # fmt: skip


def options_of(state: dict) -> dict[str, object]:
    """Checkpoint -> the options that it was trained with: numbers, text and flat lists; {} where it tells none.

    `input_size` is left out where it is no side and no (height, width) in pixels.
    """
    args = state.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, dict):
        return {}
    plain = {name: value for name, value in args.items() if isinstance(name, str) and _is_plain(value)}
    size = args.get("input_size")
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    if size is not None and (len(sides) != 2 or not all(is_count(side) and side > 0 for side in sides)):
        log.warning(f"args of the checkpoint: input_size {shown(size)} is no size in pixels, and is not used")
        plain.pop("input_size", None)
    return plain


def _is_plain(value: object) -> bool:
    """Lists within lists are nobody's option, and may be a thousand deep, or hold themselves."""
    return all(map(_is_scalar, value)) if isinstance(value, list | tuple) else _is_scalar(value)


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, float | str) or (isinstance(value, int) and abs(value) < 2**63)


def is_count(value: object) -> bool:
    """Whether it is a whole number from 0, and none that a machine cannot count to."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
