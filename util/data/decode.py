"""From an image file's bytes to pixels, uint8 RGB: one rule for all values, and nothing decoded beyond the limits.

JPEG, of which decoding is most of a loader's work, goes to the fastest decoder that is here; all of them give Pillow's
bits. Pillow decodes the rest, and decides about damaged files.
"""

import functools
import io
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from util.errors import UserError, printable
from util.log import log

# Pillow warns that a palette's transparency gets lost in RGB, which is what the recipe wants; of images over half the
# limit; and torchvision, in each call, that its decoders will go
warnings.filterwarnings("ignore", message="Palette images with Transparency", category=UserWarning)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="The image decoding", category=DeprecationWarning)
# of TIFFs of many bands, which are read otherwise (util/data/bands.py), and of damage that is told anyway
for _library in ("PIL.TiffImagePlugin", "tifffile"):
    logging.getLogger(_library).addHandler(logging.NullHandler())

JPEG = b"\xff\xd8\xff"
_OF_BANDS = (b"\x93NUM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # see util/data/bands.py
# whatever a file is called. Pillow opens others by running programs, or keeps no limits there
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "AVIF")
MAX_SCANS = 100  # of a JPEG; each goes over the whole image. libtiff's limit, and ten times what encoders make
MAX_SEGMENTS = 10_000  # of a JPEG
READS = 20_000, 1 / 500  # of a file by Pillow, and more a byte of it; it reads some headers byte by byte


# both give the same bits at the same rate (BENCHMARKS.md). simplejpeg belongs to no version of torch and is silent;
# torchvision's decoders are deprecated since 0.29, and print libjpeg's warnings
try:
    import simplejpeg

    JPEG_DECODER = "simplejpeg"
except ImportError:
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        JPEG_DECODER = "torchvision"
    except ImportError:
        JPEG_DECODER = "Pillow"


def _decode_jpeg(data: torch.Tensor) -> torch.Tensor | None:
    """Of 1 or 3 channels -> pixels; None where Pillow has to decide, which takes some damage that others don't."""
    try:
        if JPEG_DECODER == "simplejpeg":
            return torch.from_numpy(simplejpeg.decode_jpeg(data.numpy(), "RGB")).permute(2, 0, 1)
        return decode_jpeg(data, mode=ImageReadMode.RGB) if JPEG_DECODER == "torchvision" else None
    except Exception:  # decoders raise whatever they like
        return None


def decode(data: torch.Tensor) -> torch.Tensor:
    """File content [n_bytes] uint8 -> pixels [3, H, W] uint8, in memory as [H, W, 3].

    Values: see `to_rgb`. EXIF orientation is ignored, as in the original recipe. Raises DecompressionBombError for more
    pixels than `pixel_limit()`, ValueError for values that have no rule and for what is hardly more than a line, which
    would take gigabytes once its shorter side is resized, and what Pillow raises for damaged files.
    """
    raw = data.numpy().tobytes()
    if raw.startswith(JPEG):
        frame = jpeg_frame(raw)
        if frame and frame.components in (1, 3) and (pixels := _decode_jpeg(data)) is not None:
            return check_sides(pixels)
    return check_sides(torch.from_numpy(np.array(to_rgb(open_image(raw)))).permute(2, 0, 1))


def check_sides(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [C, H, W] as they are; ValueError for what is hardly more than a line."""
    height, width = pixels.shape[1:]
    if max(height, width) > 1000 * min(height, width):
        raise ValueError(f"{width} x {height} pixels: one side is over 1000 times the other")
    return pixels


def open_image(raw: bytes) -> Image.Image:
    """An image file's content -> PIL image, not decoded yet. Raises as `decode`."""
    limit = pixel_limit()
    if raw.startswith(JPEG):
        jpeg_frame(raw)
    if raw[:2] in (b"P1", b"P2", b"P3"):  # in these a comment may stand anywhere, and Pillow takes minutes for many
        raw = re.sub(rb"#[^\r\n]*", b"", raw)
    try:
        image = Image.open(_Bounded(raw), formats=_formats())
    except Image.UnidentifiedImageError as error:  # whose text holds an object's address
        more = "; --in_chans C reads NumPy arrays and TIFF of many bands" if raw[:4] in _OF_BANDS else ""
        raise ValueError(f"cannot identify it as one of {', '.join(FORMATS)}{more}") from error
    except Image.DecompressionBombError as error:
        raise too_many(re.search(r"\d+", str(error)).group()) from error
    if image.format == "TIFF" and (tile := image.tag_v2.get(322, 0) * image.tag_v2.get(323, 0)) > limit:
        raise too_many(f"tiles of {tile}")  # which are decoded whole, however small the image
    return image


def pixel_limit() -> float:
    """The most pixels of an image: the variable MAE_MAX_PIXELS, else twice PIL.Image.MAX_IMAGE_PIXELS."""
    _obey_environment()
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else math.inf


@functools.cache
def _obey_environment() -> None:
    if told := os.environ.get("MAE_MAX_PIXELS"):
        try:
            limit = int(float(told))
        except (ValueError, OverflowError):
            limit = 0
        if limit < 2:
            raise UserError(f"MAE_MAX_PIXELS={printable(told)[:50]} is no number of pixels: set one such as 4e8")
        Image.MAX_IMAGE_PIXELS = limit // 2  # Pillow takes twice as many, in all that it opens


def too_many(what: str) -> Image.DecompressionBombError:
    """The exception for an image of `what` pixels."""
    return Image.DecompressionBombError(
        f"{what} pixels, over the limit of {pixel_limit():.0f}: cut it into tiles, or raise the limit in the "
        "environment, such as MAE_MAX_PIXELS=1e9"
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """PIL image of any mode -> RGB, by the one rule for values.

    8 bits and fewer as Pillow's convert("RGB"): grey is repeated, transparency dropped. Unsigned grey of 16 bits is
    divided by 257, of 12 by 4095 / 255; float32 is in 0 to 1. Other values (signed, 32 bits, float beyond 0 to 1) raise
    ValueError with a remedy: what is black and white there, only who made the file knows.
    """
    values = deep_grey(image)
    if values is None:
        return image.convert("LA").convert("RGB") if image.mode == "La" else image.convert("RGB")
    top = 1 if image.mode == "F" else _top(image)
    if top == 1 and not (values.min() >= 0 and values.max() <= 1):  # nor NaN
        raise ValueError(f"mode F, float values from {values.min():g} to {values.max():g}: {_REMEDY}")
    _tell(f"images of mode {image.mode}: values 0 to {top} become 0 to 255")
    return Image.fromarray(np.rint(255 * values).clip(0, 255).astype(np.uint8)).convert("RGB")


def deep_grey(image: Image.Image) -> np.ndarray | None:
    """PIL image of mode F, or of grey of 12 or 16 bits -> values [H, W] float32, of these in 0..1; None for others.

    Raises ValueError for values that have no rule: see `to_rgb`.
    """
    mode, tags = image.mode, getattr(image, "tag_v2", {})  # TIFF's
    if 2 in np.atleast_1d(tags.get(339, 1)):
        raise ValueError(f"mode {mode} of signed values: {_REMEDY}")
    if mode.startswith("I;16") or (mode == "I" and image.format == "PPM"):
        values = np.asarray(image).astype(np.float32) / _top(image)
    elif mode == "F":
        values = np.asarray(image)
    elif mode in ("I", "LAB"):
        raise ValueError(f"mode {mode}, {'CIE colours' if mode == 'LAB' else 'values of 32 bits or signed'}: {_REMEDY}")
    else:
        return None
    return 1 - values if tags.get(262) == 0 else values  # 0 is white


def _top(image: Image.Image) -> int:
    return 4095 if getattr(image, "tag_v2", {}).get(258) == (12,) else 65535


@functools.cache  # once a process
def _tell(rule: str) -> None:
    worker = torch.utils.data.get_worker_info()
    if worker is None or worker.id == 0:
        log.info(rule)


_REMEDY = "save it with unsigned values of 8 or 16 bits, or as float32 scaled to 0 to 1"


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


class _Bounded(io.BytesIO):
    """A file that can be read a limited number of times."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(raw)
        self.reads_left = READS[0] + int(READS[1] * len(raw))

    def read(self, *args) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise ValueError("it is in too many pieces, such as comments in its header")
        return super().read(*args)


class Frame(NamedTuple):
    """A JPEG's frame header."""

    marker: int  # 0xC0 to 0xCF: baseline, progressive, ...
    precision: int
    height: int
    width: int
    components: int
    clean: bool  # nothing was skipped to find it


def jpeg_frame(raw: bytes) -> Frame | None:
    """A JPEG -> its frame header as libjpeg finds it, or None where libjpeg raises an error for want of one.

    Raises DecompressionBombError for more pixels than may be, ValueError for more scans or segments. A few bytes may
    promise gigabytes or hours, and the decoders would fill them.
    """
    frame, scans, clean = None, 0, True
    for n, (marker, place, skipped) in enumerate(_markers(raw)):
        if n > MAX_SEGMENTS or scans > MAX_SCANS:
            raise ValueError(f"a JPEG of more than {MAX_SEGMENTS} segments or {MAX_SCANS} scans")
        clean = clean and not skipped
        if frame is None and 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(raw) >= place + 8:
            precision, *sides = raw[place + 2 : place + 7]
            height, width = sides[0] << 8 | sides[1], sides[2] << 8 | sides[3]
            if height * width > pixel_limit():
                raise too_many(f"{width} x {height}")
            frame = Frame(marker, precision, height, width, raw[place + 7], clean)
            content = np.frombuffer(raw, np.uint8)  # a tenth of the time of raw.count
            if np.count_nonzero((content[:-1] == 0xFF) & (content[1:] == 0xDA)) <= MAX_SCANS:
                break  # else scans are counted, without those of pictures that are packed inside or behind this one
        scans += marker == 0xDA
        if marker == 0xD9 or (marker == 0xDA and frame is None):
            break
    return frame


_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # those that a length follows


def _markers(raw: bytes) -> Iterator[tuple[int, int, int]]:
    """(Marker, where its segment begins, bytes skipped before it), from behind the first on. libjpeg skips anything."""
    place = 2
    while found := _MARKER.search(raw, place):
        begin = found.end()
        yield found[1][0], begin, found.start() - place
        place = begin + max(raw[begin] << 8 | raw[begin + 1], 2) if len(raw) > begin + 1 else len(raw)
