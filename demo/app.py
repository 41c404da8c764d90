"""A page to play with reconstructions: python demo/app.py [CHECKPOINT ...]. Ready for a Hugging Face Space: README.md.

Without a checkpoint it takes the one that `make demo` trained, where there is one, and offers released files by name.
"""

import argparse
import functools
import os
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a Space starts this file as it is

import gradio as gr  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision.transforms.functional import to_pil_image  # noqa: E402

from util.build import open_model  # noqa: E402
from util.errors import UserError  # noqa: E402
from util.visualize import (  # noqa: E402
    KINDS,
    from_images,
    mask_noise,
    reconstruct,
    removed_patches,
    seeded_noise,
)

RELEASED = {
    "ViT-L, pixels": "mae_visualize_vit_large",
    "ViT-L, pixels and GAN loss": "mae_visualize_vit_large_ganloss",
    "ViT-B, pixels": "mae_visualize_vit_base",
    "ViT-B, normalised pixels": "mae_pretrain_vit_base_full",
}
SHOWN = 448  # height of a picture in pixels
MAX_MEGABYTES, MAX_MEGAPIXELS = 20, 50
STATISTICS = {"visible neighbours": "neighbours", "true patch (using the answer)": "answer"}
LABELS = {
    "original": "Original",
    "masked": "What the model sees: click to hide or show a patch",
    "reconstructed": "What it predicts",
    "pasted": "Prediction, with what it saw",
}
ABOUT = """# What a masked autoencoder sees
Most of the picture is hidden; the model fills it in from the rest. Drop a picture, or pick an example, and hide what you
like."""
CSS = """
.gradio-container { max-width: 1280px !important; margin: auto; }
#pictures { gap: 12px; }
#pictures img { image-rendering: pixelated; }
#masked img { cursor: crosshair; }
#loss p { font-size: 1.05rem; }
"""


def local_checkpoints(paths: list[str]) -> dict[str, str]:
    """Paths, or else MAE_CHECKPOINT, or else the newest one that the demo trained -> {name to show: path}."""
    if not paths and os.environ.get("MAE_CHECKPOINT"):
        paths = [os.environ["MAE_CHECKPOINT"]]
    if not paths:
        trained = (ROOT / "demo" / "output" / "pretrain").glob("checkpoint-*.pth")
        paths = [str(path) for path in sorted(trained, key=lambda path: path.stat().st_mtime)[-1:]]
    return {f"{Path(path).stem} ({Path(path).resolve().parent.name})": path for path in paths}


_loading = threading.Lock()


@functools.lru_cache(maxsize=2)
def _opened(source: str) -> torch.nn.Module:
    return open_model(source)


def model_of(source: str) -> torch.nn.Module:
    """A checkpoint's model, loaded once for everybody; nobody changes it. A failure becomes a message on the page."""
    try:
        with _loading:
            return _opened(source)
    except UserError as error:
        raise gr.Error(error.message, print_exception=False) from error


def open_upload(path: str | Path) -> Image.Image:
    """An uploaded file -> RGB, at most 1024 pixels wide and high. Raises gr.Error with a friendly message."""
    try:
        image = Image.open(path)
        megapixels = image.width * image.height / 1e6  # the header tells, nothing is decoded yet
        if megapixels > MAX_MEGAPIXELS:
            raise gr.Error(
                f"This picture has {megapixels:.0f} megapixels. Please make it smaller: up to {MAX_MEGAPIXELS}.",
                print_exception=False,
            )
        image.draft("RGB", (1024, 1024))  # a JPEG is decoded at a fraction of its size
        turned = Image.new("RGB", (1, 1)) if image is None else image
        turned.load()
        orientation = turned.getexif()
        image = turned.convert("RGB")
        image.getexif().update(orientation)
        image.thumbnail((1024, 1024))
        return image
    except gr.Error:
        raise
    except Exception as error:  # decoders raise whatever they like
        raise gr.Error(
            "This file cannot be read as a picture. Please try a JPEG, PNG or WebP.", print_exception=False
        ) from error
