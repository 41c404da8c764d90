"""From files to pixels: what torchvision decodes must be what Pillow decodes."""

import io

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from util import decode as decoding
from util.decode import decode

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
# mode as Pillow reads it, the file, and whether torchvision may decode it
FILES = {
    "jpeg": ("RGB", stored(PHOTO, "jpeg", quality=90), True),
    "jpeg 4:4:4": ("RGB", stored(PHOTO, "jpeg", quality=97, subsampling=0), True),
    "jpeg progressive": ("RGB", stored(PHOTO, "jpeg", progressive=True), True),
    "jpeg grey": ("L", stored(GREY, "jpeg"), True),
    "jpeg cmyk": ("CMYK", stored(PHOTO.convert("CMYK"), "jpeg"), False),
    "jpeg one pixel": ("RGB", stored(PHOTO.resize((1, 1)), "jpeg"), True),
    "png": ("RGB", stored(PHOTO, "png"), False),
    "png grey": ("L", stored(GREY, "png"), False),
    "png 1 bit": ("1", stored(GREY.convert("1"), "png"), False),
    "png palette": ("P", stored(PHOTO.convert("P"), "png"), False),
    "png palette of 2 bits": ("P", stored(PHOTO.quantize(4), "png", bits=2), False),
    "png transparent palette": ("P", stored(transparent_palette(), "png"), False),
    "png transparent colour": ("RGB", stored(PHOTO, "png", transparency=PHOTO.getpixel((5, 5))), False),
    "png alpha": ("RGBA", stored(with_alpha(PHOTO), "png"), False),
    "png grey alpha": ("LA", stored(with_alpha(GREY), "png"), False),
    "png animated": ("RGB", stored(PHOTO, "png", save_all=True, append_images=FRAMES), False),
    "webp": ("RGB", stored(PHOTO, "webp", quality=80), True),
    "webp lossless": ("RGB", stored(PHOTO, "webp", lossless=True), True),
    "webp alpha": ("RGBA", stored(with_alpha(PHOTO), "webp", lossless=True), True),
    "webp animated": ("RGB", stored(PHOTO, "webp", save_all=True, append_images=FRAMES), False),
    "gif": ("P", stored(PHOTO, "gif"), False),
    "gif animated": ("P", stored(PHOTO, "gif", save_all=True, append_images=FRAMES), False),
    "bmp": ("RGB", stored(PHOTO, "bmp"), False),
    "tiff": ("RGB", stored(PHOTO, "tiff"), False),
    "ppm": ("RGB", stored(PHOTO, "ppm"), False),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_becomes_rgb_as_pillow_converts_it(name):
    mode, data, _ = FILES[name]
    assert Image.open(io.BytesIO(data)).mode == mode  # the file is what the test claims
    expected = by_pillow(data)
    assert expected.std() > 20 or expected.size == 3
    assert np.array_equal(pixels(data), expected)


@pytest.mark.parametrize("name", FILES)
def test_torchvision_decodes_what_it_can(name, monkeypatch):
    _, data, fast = FILES[name]
    calls = []
    monkeypatch.setattr(decoding, "_decode_with_pillow", lambda data: calls.append(data) or torch.zeros(3, 1, 1))
    decode(torch.from_numpy(np.frombuffer(data, np.uint8).copy()))
    assert len(calls) == (0 if fast else 1)


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


@pytest.mark.parametrize(
    "kind", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(5000), "icc_profile": bytes(70_000)}]
)
def test_size_is_read_from_the_header_of_a_jpeg(kind):
    assert decoding._jpeg_pixels(memoryview(stored(PHOTO, "jpeg", **kind))) == PHOTO.width * PHOTO.height
    for n in range(0, 600, 7):
        assert decoding._jpeg_pixels(memoryview(stored(PHOTO, "jpeg", **kind)[:n])) in (0, PHOTO.width * PHOTO.height)


def test_a_header_that_promises_gigabytes_is_refused_before_decoding(monkeypatch):
    data = bytearray(stored(PHOTO, "jpeg"))
    frame = data.index(b"\xff\xc0")  # marker, length, precision, height, width
    data[frame + 5 : frame + 9] = (60_000).to_bytes(2, "big") * 2
    monkeypatch.setattr(decoding, "decode_image", lambda *args, **kwargs: pytest.fail("decoded"))
    with pytest.raises(Image.DecompressionBombError):
        pixels(bytes(data))
