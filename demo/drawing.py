"""What the page draws: models that it offers, masks, pictures and animations. Nothing here knows of gradio or visitors.

Letters: L patches of a model, in image order; `removed` is a list of L booleans, True where a patch is hidden.
"""

import base64
import functools
import io
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

from models_mae import MaskedAutoencoderViT
from util.data.bands import of_model
from util.errors import UserError
from util.look.visualize import from_images, mask_noise, reconstruct, removed_patches, seeded_noise, strategy_noise
from util.step import autocast_dtype
from util.weights import checkpoint
from util.weights.build import find, open_model
from util.weights.untrusted import options_of

IMAGENET = "ImageNet's 1.3 million photographs"
RELEASED = {
    "ViT-L, pixels + GAN": "mae_visualize_vit_large_ganloss",
    "ViT-L, pixels": "mae_visualize_vit_large",
    "ViT-H, pixels": "mae_visualize_vit_huge",
    "ViT-B, pixels": "mae_visualize_vit_base",
    "ViT-B, normalised pixels": "mae_pretrain_vit_base_full",
}
SETS = {  # the folders that the demo writes -> (in words, what their pictures are)
    "emoji": ('OpenMoji\'s emoji (<a href="https://openmoji.org" target="_blank">OpenMoji</a>, CC BY-SA 4.0)', "emoji"),
    "digits": ("scikit-learn's handwritten digits", "digits"),
}
CAPTIONS = {
    "original": "Original",
    "masked": "What it sees",
    "reconstructed": "What it predicts",
    "pasted": "Both together",
}
SHARP = 256  # pixels: pictures of less are shown enlarged, each pixel a square
GIF_SIDE = 256
LARGE = 10_000_000  # parameters


@dataclass(frozen=True)
class Opened:
    """A model in eval mode, what it was trained on (in words, as HTML), and which of the examples are of that kind."""

    model: torch.nn.Module
    trained_on: str
    kind: str


_loading: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # of each source
# one thread for all visitors: each further one would keep memory and threads of its own for the model's arithmetic
_computing = ThreadPoolExecutor(1)


@functools.lru_cache(maxsize=3)
def _opened(source: str) -> Opened:
    model = open_model(source)
    if not isinstance(model, MaskedAutoencoderViT):
        raise UserError(f"{source} is a classifier, with no decoder to draw by: give a checkpoint of main_pretrain.py")
    if (channels := of_model(model).in_chans) not in (1, 3):
        raise UserError(
            f"{source} takes images of {channels} channels, and this page has pictures, of 1 or 3: draw in Python by "
            "reconstruct and sheet, as docs/README.md has it"
        )
    if source in RELEASED.values():
        return Opened(model, IMAGENET, "photographs")
    data = options_of(checkpoint.load(find(source))).get("data_path")
    name = Path(data).name if isinstance(data, str) else ""
    words, kind = SETS.get(name, (f"the folder <q>{escape(name[:60])}</q>" if name.isprintable() and name else "", ""))
    return Opened(model, words, kind)


def opened(source: str) -> Opened:
    """A checkpoint's model, loaded once for everybody; nobody changes it. While one is fetched, which may take minutes,
    others can be had. Raises UserError.
    """
    with _loading[source]:
        return _opened(source)


def random_mask(model: torch.nn.Module, percent: int, seed: int) -> list[bool]:
    """Which patches are removed: `percent` of them, at least one and not all; by the strategy that the model was
    trained with, if it has masks of that share.
    """
    length = model.patch_embed.num_patches
    ratio = min(max(percent / 100, 1 / length), 1 - 1 / length)
    try:
        noise = strategy_noise(model, 1, ratio, seed)
    except UserError:
        noise = seeded_noise(1, length, seed)
    return removed_patches(noise, ratio)[0].tolist()


def fitted_mask(removed: list[bool], grid: tuple[int, int], model: torch.nn.Module) -> list[bool]:
    """A mask on `grid` (rows, columns) -> the nearest one on the model's own; where only one patch is removed, or left,
    and no centre falls into it, the patch that has its centre is.
    """
    rows, columns = model.patch_embed.grid_size
    fitted = [
        removed[int((row + 0.5) / rows * grid[0]) * grid[1] + int((column + 0.5) / columns * grid[1])]
        for row in range(rows)
        for column in range(columns)
    ]
    if (all(fitted) or not any(fitted)) and (not fitted[0]) in removed:
        row, column = divmod(removed.index(not fitted[0]), grid[1])
        place = int((row + 0.5) / grid[0] * rows) * columns + int((column + 0.5) / grid[1] * columns)
        fitted[place] = not fitted[0]
    return fitted


@dataclass(frozen=True)
class Drawing:
    """Pictures of one reconstruction, and its loss. In `predicted`, visible patches are nearly transparent."""

    original: Image.Image
    masked: Image.Image
    predicted: Image.Image
    pasted: Image.Image
    loss: float
    statistics: str


def precision(model: torch.nn.Module) -> torch.autocast:
    """bf16 for large models where the CPU computes in it: ViT-B draws three times as fast, and nobody sees it."""
    large = sum(weight.numel() for weight in model.parameters()) > LARGE
    dtype = autocast_dtype("auto", torch.device("cpu")) if large else None
    return torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)


def draw(model: torch.nn.Module, image: Image.Image, removed: list[bool], statistics: str = "neighbours") -> Drawing:
    """It depends on its arguments alone. Raises UserError where all or no patches are removed."""
    ratio, noise = mask_noise(torch.tensor([removed]))
    imgs = from_images([image], model.patch_embed.img_size, of_model(model))

    def compute():
        with precision(model):
            return reconstruct(model, imgs, ratio, noise, statistics)

    pictures = _computing.submit(compute).result()
    original, masked, reconstructed, pasted = (
        to_pil_image(getattr(pictures, kind)[0]) for kind in ("original", "masked", "reconstructed", "pasted")
    )
    hidden = Image.new("L", model.patch_embed.grid_size[::-1])
    hidden.putdata([255 if gone else 0 for gone in removed])
    hidden = hidden.resize(original.size, Image.Resampling.NEAREST)
    predicted = Image.composite(reconstructed, original, hidden)
    predicted.putalpha(hidden.point(lambda value: max(value, 46)))
    return Drawing(original, masked, predicted, pasted, pictures.loss, pictures.statistics)


def address(image: Image.Image, sharp: bool = True) -> str:
    """Picture -> data URL, so that nothing lies on the server's disk. Small ones are enlarged, each pixel a square."""
    times = max(1, SHARP // min(image.size)) if sharp else 1
    small = times > 1
    if small:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    kind, options = ("png", {}) if small else ("webp", {"quality": 90, "method": 2})
    return _encoded(kind, lambda file: image.save(file, kind, **options))


def _encoded(kind: str, save) -> str:
    file = io.BytesIO()
    save(file)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def thumb(image: Image.Image) -> Image.Image:
    """A small copy, for the examples."""
    small = image.copy()
    small.thumbnail((192, 192))
    return small


def row_of(drawing: Drawing, removed: list[bool], grid: tuple[int, int], first: bool = True) -> str:
    """The four pictures of one model as HTML; the second of the `first` row is painted on."""
    width, height = drawing.original.size
    shown = {"original": drawing.original, "reconstructed": drawing.predicted, "pasted": drawing.pasted}
    sources = {kind: address(picture) for kind, picture in shown.items()}
    sources["masked"] = sources["original"]
    cells = "".join('<i class="h"></i>' if hidden else "<i></i>" for hidden in removed)
    style = f"grid-template: repeat({grid[0]}, 1fr) / repeat({grid[1]}, 1fr)"
    keys = 'tabindex="0" role="application" aria-label="Patches. Arrow keys move, space hides one or shows it again."'
    paint = f'class="cells paint" data-rows="{grid[0]}" data-columns="{grid[1]}" {keys}' if first else 'class="cells"'
    over = {"masked": f'<div {paint} style="{style}">{cells}</div>'}
    figures = []
    for kind, caption in CAPTIONS.items():
        words = f'download="{kind}" title="save" aria-label="Save: {caption}"'
        save = f'<a href="{sources[kind]}" {words}>&#8615;</a>' if kind in shown else ""
        figures.append(
            f"<figure{f' id={kind}' if first else ''}><figcaption><span>{caption}</span>{save}</figcaption>"
            f'<div class="pic" style="aspect-ratio: {width} / {height}">'
            f'<img src="{sources[kind]}" alt="{caption}" draggable="false">{over.get(kind, "")}</div></figure>'
        )
    return f'<div class="pictures{" sharp" if min(width, height) < SHARP // 2 else ""}">{"".join(figures)}</div>'


def animation(frames: list[tuple[Drawing, str]]) -> str:
    """(drawing, caption) of each frame -> data URL of a GIF that shows what is seen and what is made of it."""
    pages = []
    font = ImageFont.load_default(16)
    for drawing, caption in frames:
        width, height = drawing.masked.size
        size = (round(GIF_SIDE * width / height), GIF_SIDE)
        way = Image.Resampling.NEAREST if height < GIF_SIDE else Image.Resampling.LANCZOS
        page = Image.new("RGB", (2 * size[0] + 24, size[1] + 40), "white")
        for place, picture in enumerate((drawing.masked, drawing.pasted)):
            page.paste(picture.resize(size, way), (8 + place * (size[0] + 8), 8))
        ImageDraw.Draw(page).text((8, size[1] + 13), caption, fill="black", font=font)
        pages.append(page.quantize(dither=Image.Dither.NONE))
    durations = [450] * (len(pages) - 1) + [1600]
    return _encoded("gif", lambda file: pages[0].save(
        file, "gif", save_all=True, append_images=pages[1:], duration=durations, loop=0
    ))  # fmt: skip
