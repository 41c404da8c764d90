"""From an image file's bytes to pixels, uint8 RGB: with torchvision where that gives what Pillow gives, else Pillow."""

import io
import math
import warnings

import numpy as np
import torch
from PIL import Image

try:
    from torchvision.io import ImageReadMode, decode_image
except ImportError:  # deprecated in torchvision 0.29: a later one may have it no more
    decode_image = None

# Pillow warns that a palette's transparency gets lost in RGB, which is what the recipe wants
warnings.filterwarnings("ignore", message="Palette images with Transparency", category=UserWarning)
warnings.filterwarnings("ignore", message="The image decoding", category=DeprecationWarning)

JPEG = b"\xff\xd8\xff"


def decode(data: torch.Tensor) -> torch.Tensor:
    """File content [n_bytes] uint8 -> pixels [3, H, W] uint8, in memory as [H, W, 3].

    As Pillow's convert("RGB"), but 16-bit grey is scaled to 8 bits (Pillow clips it to white). EXIF orientation is
    ignored, as in the original recipe. Raises what Pillow raises where neither library can decode.
    """
    head = data[:12].numpy().tobytes()
    is_jpeg, is_webp = head.startswith(JPEG), head[:4] + head[8:12] == b"RIFFWEBP"
    # not PNG: torchvision 0.29 dies of damaged ones (a segmentation fault), and is little faster on photographs
    if decode_image and (is_jpeg or is_webp):
        pixels = _decode_fast(data, is_jpeg)
        if pixels is not None:
            return pixels
    return _decode_with_pillow(data)


def _decode_fast(data: torch.Tensor, is_jpeg: bool) -> torch.Tensor | None:
    """None where Pillow has to decide: damaged files, CMYK, animations."""
    if is_jpeg and _jpeg_pixels(memoryview(data.numpy())) > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        return None  # a few bytes may promise gigabytes, which torchvision would fill; Pillow raises
    try:
        pixels = decode_image(data, mode=ImageReadMode.UNCHANGED)
    except (RuntimeError, ValueError):
        return None
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or (is_jpeg and len(pixels) == 4):
        return None
    if len(pixels) < 3:  # grey; its transparency is dropped
        return pixels[:1].expand(3, -1, -1)
    return pixels[:3]


def _jpeg_pixels(data: memoryview) -> int:
    """Width times height, from the frame header; 0 where there is none."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # precision, height, width follow the length
            height, width = data[place + 5] << 8 | data[place + 6], data[place + 7] << 8 | data[place + 8]
            return height * width
        # 0xFF may be repeated before a marker
        place += 1 if marker == 0xFF else 2 + (data[place + 2] << 8 | data[place + 3])
    return 0


def _decode_with_pillow(data: torch.Tensor) -> torch.Tensor:
    image = Image.open(io.BytesIO(data.numpy()))
    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.clip(np.round(wide / 257), 0, 255).astype(np.uint8))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
