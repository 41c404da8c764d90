"""From files to pixels: whoever decodes, it must be what Pillow decodes; and what may not be decoded."""

import importlib.util
import io
import random
import struct
import sys
import time
import zlib

import numpy as np
import pytest
import skimage.data
import torch
from helpers import project_log
from PIL import Image

from util.data import decode as decoding
from util.data.decode import decode, jpeg_frame, to_rgb
from util.errors import UserError

PHOTO = Image.fromarray(skimage.data.astronaut()).resize((60, 40))
GREY = PHOTO.convert("L")


def stored(image: Image.Image, kind: str, **options) -> bytes:
    """The image as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    """[H, W, 3], decoded by the project."""
    result = decode(torch.from_numpy(np.frombuffer(data, np.uint8).copy()))
    assert result.dtype == torch.uint8 and result.shape[0] == 3
    return result.permute(1, 2, 0).numpy()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def transparent_palette() -> Image.Image:
    image = PHOTO.convert("P", palette=Image.Palette.ADAPTIVE)
    image.info["transparency"] = 3
    return image


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


FRAMES = [PHOTO, Image.new("RGB", PHOTO.size)]
# mode as Pillow reads it, the file
FILES = {
    "jpeg": ("RGB", stored(PHOTO, "jpeg", quality=90)),
    "jpeg 4:4:4": ("RGB", stored(PHOTO, "jpeg", quality=97, subsampling=0)),
    "jpeg progressive": ("RGB", stored(PHOTO, "jpeg", progressive=True)),
    "jpeg grey": ("L", stored(GREY, "jpeg")),
    "jpeg cmyk": ("CMYK", stored(PHOTO.convert("CMYK"), "jpeg")),
    "jpeg of RGB": ("RGB", stored(PHOTO, "jpeg", keep_rgb=True)),
    "jpeg 4:2:2, odd sides": ("RGB", stored(PHOTO.resize((61, 37)), "jpeg", subsampling=1)),
    "jpeg one pixel": ("RGB", stored(PHOTO.resize((1, 1)), "jpeg")),
    "png": ("RGB", stored(PHOTO, "png")),
    "png grey": ("L", stored(GREY, "png")),
    "png 1 bit": ("1", stored(GREY.convert("1"), "png")),
    "png palette": ("P", stored(PHOTO.convert("P"), "png")),
    "png palette of 2 bits": ("P", stored(PHOTO.quantize(4), "png", bits=2)),
    "png transparent palette": ("P", stored(transparent_palette(), "png")),
    "png transparent colour": ("RGB", stored(PHOTO, "png", transparency=PHOTO.getpixel((5, 5)))),
    "png alpha": ("RGBA", stored(with_alpha(PHOTO), "png")),
    "png grey alpha": ("LA", stored(with_alpha(GREY), "png")),
    "png animated": ("RGB", stored(PHOTO, "png", save_all=True, append_images=FRAMES)),
    "webp": ("RGB", stored(PHOTO, "webp", quality=80)),
    "webp lossless": ("RGB", stored(PHOTO, "webp", lossless=True)),
    "webp alpha": ("RGBA", stored(with_alpha(PHOTO), "webp", lossless=True)),
    "webp animated": ("RGB", stored(PHOTO, "webp", save_all=True, append_images=FRAMES)),
    "gif": ("P", stored(PHOTO, "gif")),
    "gif animated": ("P", stored(PHOTO, "gif", save_all=True, append_images=FRAMES)),
    "bmp": ("RGB", stored(PHOTO, "bmp")),
    "tiff": ("RGB", stored(PHOTO, "tiff")),
    "ppm": ("RGB", stored(PHOTO, "ppm")),
}


@pytest.fixture(params=["simplejpeg", "torchvision", "Pillow"])
def decoder(request, monkeypatch):
    """The module as it is where this decoder of JPEGs is the first that is installed."""
    for package in {"simplejpeg": [], "torchvision": ["simplejpeg"], "Pillow": ["simplejpeg", "torchvision.io"]}[
        request.param
    ]:
        monkeypatch.setitem(sys.modules, package, None)
    if request.param != "Pillow":
        pytest.importorskip(request.param)
    spec = importlib.util.find_spec("util.data.decode")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.JPEG_DECODER == request.param
    return module


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_becomes_rgb_as_pillow_converts_it(name, decoder):
    mode, data = FILES[name]
    assert Image.open(io.BytesIO(data)).mode == mode  # the file is what the test claims
    expected = by_pillow(data)
    assert expected.std() > 20 or expected.size == 3
    result = decoder.decode(torch.from_numpy(np.frombuffer(data, np.uint8).copy()))
    assert result.dtype == torch.uint8 and np.array_equal(result.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("name", FILES)
def test_jpegs_do_not_need_pillow(name, decoder, monkeypatch):
    calls = []
    monkeypatch.setattr(decoder, "to_rgb", lambda image: calls.append(image) or image.convert("RGB"))
    decoder.decode(torch.from_numpy(np.frombuffer(FILES[name][1], np.uint8).copy()))
    fast = name.startswith("jpeg") and name != "jpeg cmyk" and decoder.JPEG_DECODER != "Pillow"
    assert len(calls) == (0 if fast else 1)


def test_what_a_decoder_prints_is_not_for_the_user(capfd):
    """A slightly damaged file is decoded without a word, as Pillow does."""
    pytest.importorskip("simplejpeg")
    data = stored(PHOTO, "jpeg")
    place = data.index(b"\xff\xdb")
    assert np.array_equal(pixels(data[:place] + b"\0\1" + data[place:]), pixels(data))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket", "retina"])
def test_photographs_as_jpeg_decode_identically(name):
    data = stored(Image.fromarray(getattr(skimage.data, name)()), "jpeg", quality=92)
    assert np.array_equal(pixels(data), by_pillow(data))


# pixel values 0 to 65535; Pillow's convert("RGB") turns all above 255 white
RAMP = np.linspace(0, 65535, 64 * 8).astype(np.uint16).reshape(8, 64)
WIDE = {
    "grey.png": stored(Image.fromarray(RAMP), "png"),
    "grey.tiff": stored(Image.fromarray(RAMP), "tiff"),
    "big-endian.tiff": stored(Image.frombytes("I;16B", (64, 8), RAMP.astype(">u2").tobytes()), "tiff"),
    "grey.pgm": b"P5 64 8 65535\n" + RAMP.astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", WIDE)
def test_16_bit_grey_is_scaled_not_clipped(name):
    image = pixels(WIDE[name])
    assert image.shape == (8, 64, 3)
    assert (image == image[:, :, :1]).all()
    assert np.abs(image[:, :, 0] - RAMP / 257).max() <= 0.5 + 1e-6
    assert np.unique(image).size == 256


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it by 90 degrees
    turned = pixels(stored(PHOTO, "jpeg", exif=exif, quality=95))
    assert turned.shape == (40, 60, 3)
    assert np.array_equal(turned, pixels(stored(PHOTO, "jpeg", quality=95)))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_truncated_file_is_refused_as_pillow_refuses_it(kind, share):
    data = stored(PHOTO, kind)
    with pytest.raises(Exception, match=r"(?i)truncated|identify|cut off|not enough|decod") as error:
        pixels(data[: int(len(data) * share)])
    assert isinstance(error.value, OSError | SyntaxError | ValueError)


# one rule from a file's values to pixels


def tiff(array: np.ndarray, tags: dict[int, int], data: bytes | None = None) -> bytes:
    """An uncompressed grey TIFF with these tags beside its size."""
    data = array.tobytes() if data is None else data
    bits = 8 * array.itemsize
    tags = {256: array.shape[1], 257: array.shape[0], 258: bits, 259: 1, 262: 1, 273: 200, 277: 1, 278: array.shape[0],
            279: len(data)} | tags  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + data


UNIT = np.linspace(0, 1, 64 * 8, dtype=np.float32).reshape(8, 64)
TWELVE = np.linspace(0, 4095, 64 * 8).astype(np.uint16).reshape(8, 64)
PACKED = np.stack([TWELVE[:, ::2] >> 4, (TWELVE[:, ::2] & 15) << 4 | TWELVE[:, 1::2] >> 8, TWELVE[:, 1::2] & 255], 2)
SCALED = {
    "float tiff": (stored(Image.fromarray(UNIT), "tiff"), UNIT),
    "float pfm": (b"Pf\n64 8\n-1.0\n" + UNIT[::-1].astype("<f4").tobytes(), UNIT),
    "12-bit tiff": (tiff(TWELVE, {258: 12}, PACKED.astype(np.uint8).tobytes()), TWELVE / 4095),
    "10-bit pgm": (b"P5 64 8 1023\n" + (RAMP // 64).astype(">u2").tobytes(), (RAMP // 64) / 1023),
    "16-bit plain pgm": (b"P2 64 8 65535\n" + " ".join(map(str, RAMP.flatten())).encode(), RAMP / 65535),
    "white is 0": (tiff(RAMP, {262: 0}), 1 - RAMP / 65535),
    "white is 0, 8 bits": (tiff((RAMP // 257).astype(np.uint8), {262: 0}), 1 - (RAMP // 257) / 255),
    "white is 0, float": (tiff(UNIT, {262: 0, 339: 3}), 1 - UNIT),
}


@pytest.mark.parametrize("name", SCALED)
def test_values_of_a_known_range_are_scaled_from_black_to_white(name):
    data, values = SCALED[name]
    decoding._tell.cache_clear()
    with project_log() as lines:
        image = pixels(data)
        pixels(data)
    assert len(lines) == (name != "white is 0, 8 bits") and all(" become 0 to 255" in line for line in lines)
    assert (image == image[:, :, :1]).all()
    assert np.abs(image[:, :, 0] - 255 * values).max() <= 0.5 + 1e-3
    assert np.array_equal(np.asarray(to_rgb(Image.open(io.BytesIO(data)))), image)


def a_nan() -> np.ndarray:
    array = UNIT.copy()
    array[3, 3] = np.nan
    return array


REFUSED = {
    "float 0..255": (stored(Image.fromarray(255 * UNIT), "tiff"), "mode F, float values from 0 to 255"),
    "z-scores": (stored(Image.fromarray(4 * UNIT - 2), "tiff"), "mode F, float values from -2 to 2"),
    "a NaN": (stored(Image.fromarray(a_nan()), "tiff"), "mode F, float values from nan to nan"),
    "int32": (stored(Image.fromarray((255 * UNIT).astype(np.int32)), "tiff"), "mode I of signed values"),
    "int32 compressed": (
        stored(Image.fromarray((255 * UNIT).astype(np.int32)), "tiff", compression="tiff_lzw"),
        "mode I of signed values",
    ),
    "int16": (tiff(RAMP.view(np.int16), {339: 2}), "mode I of signed values"),
    "int8": (tiff((RAMP // 257).astype(np.uint8), {339: 2}), "mode L of signed values"),
    "uint32": (tiff(RAMP.astype(np.uint32), {339: 1}), "mode I, values of 32 bits or signed"),
    "lab": (stored(Image.new("LAB", (8, 8), (128, 3, 5)), "tiff"), "mode LAB, CIE colours"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_of_no_known_range_are_refused_with_a_remedy(name):
    data, words = REFUSED[name]
    for read in (pixels, lambda data: to_rgb(Image.open(io.BytesIO(data)))):
        with pytest.raises(ValueError, match=f"^{words}: save it with unsigned values of 8 or 16 bits, or as float32"):
            read(data)


# nothing is decoded beyond the limits


def with_frame(width: int, height: int, before: bytes = b"", **options) -> bytes:
    """A JPEG whose frame header promises that size, with bytes before it that libjpeg skips."""
    data = bytearray(stored(PHOTO, "jpeg", **options))
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))  # marker, length, precision, height, width
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data[:frame]) + before + bytes(data[frame:])


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def webp(side: int, lossless: bool) -> bytes:
    data = bytearray(stored(PHOTO, "webp", lossless=lossless))
    if lossless:  # 14 bits each, less one
        data[21:25] = struct.pack("<I", (side - 1) | (side - 1) << 14)
    else:
        data[26:30] = struct.pack("<HH", side, side)
    return bytes(data)


def gif(side: int, of: str) -> bytes:
    data = bytearray(stored(GREY, "gif"))
    place = 6 if of == "screen" else data.index(b"\x2c", 13 + 768) + 5
    data[place : place + 4] = struct.pack("<HH", side, side)
    return bytes(data)


def bmp(side: int) -> bytes:
    data = bytearray(stored(PHOTO, "bmp"))
    data[18:26] = struct.pack("<ii", side, side)
    return bytes(data)


STRAY = (b"", b"\0\x12\x34", b"\xff\xd0", b"\xff\x01", b"\xff" * 9, b"\xff\0\xff\0", bytes(3000), b"\xff\xe5\0\0")
BOMBS = {
    **{f"jpeg behind {stray[:4]}": with_frame(60_000, 60_000, stray) for stray in STRAY},
    "jpeg, progressive": with_frame(65_500, 65_500, b"\0\0", progressive=True),
    "jpeg, cmyk": with_frame(40_000, 40_000, b"\xff\xd3").replace(b"\x9c\x40\x9c\x40\x03", b"\x9c\x40\x9c\x40\x04"),
    "webp": webp(16383, lossless=False),
    "webp, lossless": webp(16383, lossless=True),
    "png": png(100_000, 100_000),
    "gif's screen": gif(60_000, "screen"),
    "gif's image": gif(60_000, "image"),
    "bmp": bmp(50_000),
    "ppm": b"P6 50000 50000 255\n" + bytes(100),
    "plain ppm": b"P3 50000 50000 255\n1 2 3",
    "tiff": tiff(RAMP, {256: 60_000, 257: 60_000}),
    "tiff's tile": tiff(RAMP, {259: 8, 322: 40_000, 323: 40_000, 324: 200, 325: 100}),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_that_promises_gigabytes_is_refused_before_decoding(name, decoder, monkeypatch):
    monkeypatch.setattr(decoder, "_decode_jpeg", lambda data: pytest.fail("decoded"))
    monkeypatch.setattr(decoder, "to_rgb", lambda image: pytest.fail("decoded"))
    with pytest.raises(Image.DecompressionBombError, match="over the limit of 178956970: cut it into tiles, or raise"):
        decoder.decode(torch.from_numpy(np.frombuffer(BOMBS[name], np.uint8).copy()))


def many_scans(n: int, progressive: bool) -> bytes:
    data = stored(PHOTO, "jpeg", progressive=progressive)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * n + b"\xff\xd9"


PIECES = {
    "scans": lambda: many_scans(2000, True),
    "scans of a baseline jpeg": lambda: many_scans(2000, False),
    "jpeg's comments": lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * 2_500_000 + stored(PHOTO, "jpeg")[2:],
    "ppm's comment": lambda: b"P6\n#" + b"x" * 10_000_000 + b"\n4 4\n255\n" + bytes(48),
    "ppm's comments": lambda: b"P6\n" + b"#x\n" * 3_000_000 + b"4 4\n255\n" + bytes(48),
    "ppm's spaces": lambda: b"P5" + b" " * 10_000_000 + b"4 4\n255\n" + bytes(48),
    "png's texts": lambda: png(4, 4, chunk(b"tEXt", b"a\0b") * 500_000),
    "gif's comment": lambda: stored(GREY, "gif").replace(
        b"\x2c\0\0\0\0", b"\x21\xfe" + (b"\xff" + bytes(255)) * 20_000 + b"\0\x2c\0\0\0\0", 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PIECES)
def test_a_file_in_too_many_pieces_is_refused_in_seconds(name):
    data = PIECES[name]()
    start = time.process_time()
    with pytest.raises(ValueError, match="more than 10000 segments or 100 scans|too many pieces"):
        pixels(data)
    assert time.process_time() - start < 3


def test_comments_of_a_plain_ppm_take_no_minutes():
    start = time.process_time()
    assert pixels(b"P3\n4 4\n255\n" + b"#x\n" * 1_000_000 + b"1 " * 48).tolist() == [[[1] * 3] * 4] * 4
    assert time.process_time() - start < 3


def test_scans_of_pictures_that_are_packed_inside_or_behind_do_not_count():
    """A thumbnail, or a film that a telephone writes behind the picture, holds a mark by chance in each 64 kB."""
    data = stored(PHOTO, "jpeg", exif=b"Exif\0\0" + b"\xff\xda" * 200)
    assert np.array_equal(pixels(data + b"\xff\xda" * 2000), by_pillow(data))


def test_a_frame_is_where_libjpeg_finds_it():
    """Over mangled headers: what libjpeg reads is what was judged."""
    simplejpeg = pytest.importorskip("simplejpeg")
    draw, read = random.Random(0), 0
    whole = [stored(PHOTO, "jpeg"), stored(PHOTO, "jpeg", progressive=True), stored(GREY, "jpeg"),
             stored(PHOTO, "jpeg", exif=b"Exif\0\0" + bytes(500), icc_profile=bytes(70_000))]  # fmt: skip
    for _ in range(3000):
        data = bytearray(draw.choice(whole))
        for _ in range(draw.randint(1, 3)):
            place = draw.randint(2, min(len(data), 700))
            mark = bytes([0xFF, draw.choice((0, 1, 0xC0, 0xC4, 0xD0, 0xD8, 0xD9, 0xDA, 0xDB, 0xE1, 0xFE, 0xFF))])
            data[place : place + draw.choice((0, 0, 1))] = draw.choice((mark, b"\xff" * 3, draw.randbytes(3), bytes(9)))
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(bytes(data), strict=False)
        except (ValueError, KeyError):  # of a subsampling that it has no name for
            continue
        read += 1
        try:
            frame = jpeg_frame(bytes(data))
            assert (frame.height, frame.width) == (height, width)
        except Image.DecompressionBombError:
            assert height * width > decoding.pixel_limit()
    assert read > 300


@pytest.mark.parametrize(("told", "limit"), [("4e3", 4000), ("2400", 2400), ("1e9", 1e9)])
def test_the_limit_can_be_raised_and_lowered_in_the_environment(told, limit, monkeypatch):
    monkeypatch.setenv("MAE_MAX_PIXELS", told)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    decoding._obey_environment.cache_clear()
    try:
        assert decoding.pixel_limit() == limit
        for kind in ("jpeg", "png"):
            assert pixels(stored(Image.new("RGB", (60, 40)), kind)).shape == (40, 60, 3)  # 2400
            large = stored(Image.new("RGB", (70, 60)), kind)
            if limit > 4200:
                assert pixels(large).shape == (60, 70, 3)
            else:
                with pytest.raises(Image.DecompressionBombError, match=f"over the limit of {limit}:"):
                    pixels(large)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # Pillow's word for none
        assert pixels(stored(PHOTO, "jpeg")).shape == (40, 60, 3)
    finally:
        decoding._obey_environment.cache_clear()


@pytest.mark.parametrize("told", ["many", "0", "1", "-4e8", "nan", "inf", "1e400", "\x1b[2J"])
def test_a_limit_that_is_no_number_is_refused(told, monkeypatch):
    monkeypatch.setenv("MAE_MAX_PIXELS", told)
    decoding._obey_environment.cache_clear()
    try:
        with pytest.raises(UserError, match=r"^MAE_MAX_PIXELS=[^\x1b]* is no number of pixels: set one such as 4e8$"):
            pixels(stored(PHOTO, "jpeg"))
    finally:
        decoding._obey_environment.cache_clear()


def test_programs_are_not_run_for_a_file():
    """Pillow gives PostScript to Ghostscript."""
    with pytest.raises(ValueError, match="^cannot identify it as one of JPEG, PNG, WEBP, GIF, BMP, PPM, TIFF, AVIF$"):
        pixels(stored(PHOTO, "eps"))
