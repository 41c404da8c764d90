"""Pictures of what a masked autoencoder sees and predicts. All drawing is here.

Letters: N batch, C channels, L patches, P patch side in pixels, H height, W width, K kept patches. Pictures are tensors
in [0, 1]; in masks and in `removed`, 1 or True means removed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.ExifTags import Base
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision.transforms.functional import to_pil_image

from models_mae import kept_patches
from util.data.bands import RGB, Bands
from util.data.decode import to_rgb
from util.data.loader import normalise
from util.errors import UserError, printable

KINDS = ("original", "masked", "reconstructed", "pasted")
# what a model of normalised pixels cannot know, and where the picture takes it from
STATISTICS = {"neighbours": "statistics of neighbours", "answer": "using the answer"}


@dataclass(frozen=True)
class Pictures:
    """Four [N, 3, H, W] pictures of each image, and the loss of the batch.

    `pasted` has the reconstruction where patches were removed, and the kept patches as they are. `statistics` tells
    where the mean and deviation of predicted patches come from: "" (the model predicts plain pixels), "neighbours"
    (visible patches alone) or "answer" (the true patches, which nobody could know).
    """

    original: torch.Tensor
    masked: torch.Tensor
    reconstructed: torch.Tensor
    pasted: torch.Tensor
    loss: float
    statistics: str = ""
    target: str = ""  # where the prediction is neither pixels nor normalised pixels

    def titles(self) -> list[str]:
        """A title for each of the KINDS; those that show predicted patches say whose statistics they have, or of what
        kind of prediction they are made.
        """
        note = STATISTICS.get(self.statistics, self.target)
        note = f"\n({note})" if note else ""
        return [kind + note if kind in ("reconstructed", "pasted") else kind for kind in KINDS]


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    imgs: torch.Tensor,
    mask_ratio: float = 0.75,
    noise: torch.Tensor | None = None,
    statistics: str = "neighbours",
    **colours: Sequence,
) -> Pictures:
    """Normalised images [N, C, H, W] (and mask noise [N, L]) -> Pictures. `model`: see models_mae.py. Raises UserError
    where its target has no pixels.

    A model of normalised pixels predicts each patch up to its mean and deviation. `statistics` says where these come
    from: "neighbours" (see `neighbour_statistics`) or "answer", the true patches. Other models don't need it.
    `colours`: mean, std and bands of `to_pixels` (default: the checkpoint's mean and std, the first three). Raises
    UserError where the images' channels are not the model's.
    """
    if statistics not in STATISTICS:
        raise UserError(f"statistics {statistics!r} is not known: use one of {', '.join(STATISTICS)}")
    channels = model.patch_embed.proj.in_channels
    if imgs.shape[1] != channels:
        raise UserError(f"images of {imgs.shape[1]} channels, but the model takes {channels}: build it with in_chans")
    if "mean" not in colours and "std" not in colours:
        colours |= picture_range(*(getattr(model, "bands", {}).get(name) for name in ("mean", "std")))
    was_training = model.training
    model.eval()
    loss, pred, mask = model(imgs, mask_ratio, *(() if noise is None else (noise,)))
    model.train(was_training)
    pred, target = pred.float(), getattr(model, "decoder_target", None)
    if not model.norm_pix_loss and hasattr(target, "inverse"):
        pred = target.inverse(pred)
    if model.norm_pix_loss:
        patches = model.patchify(imgs).float()
        mean, std = patches.mean(dim=-1), (patches.var(dim=-1) + 1e-6).sqrt()  # as in the loss
        if statistics == "neighbours":
            mean, std = neighbour_statistics(mean, std, mask, model.patch_embed.grid_size)
        pred = pred * std[:, :, None] + mean[:, :, None]
    removed = model.unpatchify(mask[:, :, None].expand_as(pred))[:, :1] > 0

    original, reconstructed = to_pixels(imgs, **colours), to_pixels(model.unpatchify(pred), **colours)
    masked = torch.where(removed, 0.5, original)  # removed patches in grey
    pasted = torch.where(removed, reconstructed, original)
    used = statistics if model.norm_pix_loss else ""
    kind = f"from {target.n_outputs} coefficients" if not used and hasattr(target, "n_outputs") else ""
    return Pictures(original, masked, reconstructed, pasted, loss.item(), used, kind)


def to_pixels(
    imgs: torch.Tensor,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    bands: Sequence[int] | None = None,
) -> torch.Tensor:
    """Normalised images [N, C, H, W] -> pictures [N, 3, H, W]: grey of one channel, of others the three `bands`.

    `mean` and `std` [C] are those of the normalising (default: ImageNet's; where C is not 3, their averages). `bands`
    are channels for red, green and blue (default: the first three). Raises UserError where there are none such.
    """
    channels = imgs.shape[1]
    bands = [min(i, channels - 1) for i in range(3)] if bands is None else list(bands)
    if len(bands) != 3 or not all(0 <= band < channels for band in bands):
        raise UserError(f"bands {bands} of images of {channels} channels: choose three of 0 to {channels - 1}")

    def of_bands(values: Sequence[float] | None, default: Sequence[float]) -> torch.Tensor:
        default = default if channels == 3 else [sum(default) / 3] * channels
        return imgs.new_tensor(default if values is None else values)[bands].view(1, 3, 1, 1)

    return (imgs[:, bands] * of_bands(std, IMAGENET_DEFAULT_STD) + of_bands(mean, IMAGENET_DEFAULT_MEAN)).clamp(0, 1)


def picture_range(mean: Sequence[float] | None, std: Sequence[float] | None) -> dict[str, list[float] | None]:
    """What images were normalised by -> mean and std for `to_pixels`: the same, so that 0 is black and 1 is white, but
    for bands whose values fill another range, as of dim uint16 or of float32: there mean - 2 std is black, mean + 2 std
    white.
    """
    if mean is None or std is None:
        return {"mean": mean, "std": std}
    ranges = [(m - 2 * s, m + 2 * s) for m, s in zip(mean, std, strict=True)]
    fits = [low >= -0.5 and 0.25 <= high <= 1.5 for low, high in ranges]
    return {
        "mean": [m if fit else 0.5 for m, fit in zip(mean, fits, strict=True)],
        "std": [s if fit else 0.25 for s, fit in zip(std, fits, strict=True)],
    }


def neighbour_statistics(
    mean: torch.Tensor, std: torch.Tensor, mask: torch.Tensor, grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean [N, L], std [N, L], mask [N, L], grid (h, w)) -> (mean [N, L], std [N, L]) from kept patches alone.

    A removed patch gets the average of the kept ones, weighted by 1 / distance^3 on the grid (inverse-distance
    weighting, Shepard 1968; of the powers 1 to 20, 3 came closest to the true means of ten photographs of
    scikit-image at mask ratio 0.75). A kept patch keeps its own.
    """
    rows, columns = torch.meshgrid(*(torch.arange(side, device=mask.device) for side in grid), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1).float()
    nearness = torch.cdist(places, places).clamp(min=0.5).pow(-3)  # the clamp keeps a patch's own weight finite
    weights = nearness * (1 - mask)[:, None, :]
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return tuple(torch.where(mask > 0, (weights @ value[:, :, None])[:, :, 0], value) for value in (mean, std))


def seeded_noise(n: int, num_patches: int, seed: int) -> torch.Tensor:
    """(N, L, seed) -> mask noise [N, L] for `forward` and `reconstruct`: the same on every machine."""
    return torch.rand(n, num_patches, generator=torch.Generator().manual_seed(seed))


def strategy_noise(model: nn.Module, n: int, mask_ratio: float, seed: int) -> torch.Tensor:
    """(model, N, ratio, seed) -> mask noise [N, L] as the model draws it in training, by its own strategy: the same on
    every machine. Raises UserError where the strategy has no such ratio.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return model.mask_noise(n, model.patch_embed.grid_size, mask_ratio, torch.device("cpu"))


def removed_patches(noise: torch.Tensor, mask_ratio: float) -> torch.Tensor:
    """Mask noise [N, L] -> which patches `mask_ratio` removes, bool [N, L]: a start for masks chosen by hand."""
    ranks = noise.argsort(dim=1).argsort(dim=1)
    return ranks >= kept_patches(noise.shape[1], mask_ratio)


def mask_noise(removed: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Which patches to remove, bool [N, L] -> (mask_ratio, noise [N, L]): `forward` then removes exactly these.

    Raises UserError where the images of a batch remove different numbers of patches, or one removes none or all.
    """
    counts = removed.sum(dim=1).tolist()
    length = removed.shape[1]
    if len(set(counts)) > 1:
        raise UserError(f"one batch removes as many patches of each image, not {counts}: give the images one by one")
    if counts[0] in (0, length):
        raise UserError(
            f"{counts[0]} of {length} patches are removed: remove at least one, so that there is something to predict, "
            "and keep at least one, so that there is something to see"
        )
    # kept patches lie below all removed ones; within each set, in image order
    noise = (removed.float() + torch.arange(length, device=removed.device) / length) / 2
    return counts[0] / length, noise


def sheet(pictures: Pictures, side: int = 128, gap: int = 6, across: int = 1) -> Image.Image:
    """Pictures -> one image: four titled columns, a row for each image; cells are `side` pixels on their shorter side.

    `across` images share a row.
    """
    columns = [getattr(pictures, kind) for kind in KINDS]
    n, _, height, width = columns[0].shape
    rows = [
        [column[image] for image in range(first, min(first + across, n)) for column in columns]
        for first in range(0, n, across)
    ]
    scale = side / min(height, width)
    return grid_of(rows, pictures.titles() * min(across, n), (round(scale * width), round(scale * height)), gap)


def grid_of(rows: list[list[torch.Tensor]], titles: list[str], cell: tuple[int, int], gap: int = 6) -> Image.Image:
    """Rows of pictures [3, H, W] -> one image, a title above each column; `cell` is (width, height) in pixels."""
    titles, font, width = _fit(titles, cell[0])
    pitch = width + gap
    line = max(16, round(font.size * 4 / 3))
    top = gap + line * max(title.count("\n") + 1 for title in titles)
    size = (len(titles) * pitch + gap, top + len(rows) * (cell[1] + gap))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.multiline_text(
            (gap + column * pitch, gap // 2), title, fill="black", font=font, spacing=max(2, font.size // 6)
        )
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            # enlarged pixels stay visible as squares; a picture that has to shrink is averaged
            larger = cell[1] >= picture.shape[1]
            image = to_pil_image(picture.float().cpu())
            image = image.resize(cell, Image.Resampling.NEAREST if larger else Image.Resampling.BOX)
            canvas.paste(image, (gap + column * pitch, top + row * (cell[1] + gap)))
    return canvas


def _fit(titles: list[str], width: int) -> tuple[list[str], ImageFont.FreeTypeFont, int]:
    """(titles, width of a column in pixels) -> titles in lines that fit it, a legible font, and the width, which is
    larger where a single word does not fit. The font is in proportion to the column, from 9 pixels on.
    """
    sizes = range(max(12, width // 16), 8, -1)
    for size in sizes[:-1]:
        font = ImageFont.load_default(size)
        if max(font.getlength(line) for title in titles for line in title.split("\n")) <= width:
            return titles, font, width
    words = [word for title in titles for word in title.split()]
    fonts = [ImageFont.load_default(size) for size in sizes]
    font = next((font for font in fonts if max(map(font.getlength, words)) <= width), ImageFont.load_default(10))
    width = max(width, math.ceil(max(map(font.getlength, words))))
    wrapped = []
    for title in titles:
        lines = []
        for line in title.split("\n"):
            lines.append("")
            for word in line.split():
                longer = f"{lines[-1]} {word}".strip()
                if font.getlength(longer) <= width:
                    lines[-1] = longer
                else:
                    lines.append(word)
        wrapped.append("\n".join(lines))
    return wrapped, font, width


def from_images(images: list[Image.Image], size: tuple[int, int], bands: Bands = RGB) -> torch.Tensor:
    """PIL images of any kind and size -> normalised [N, C, H, W]: turned as their EXIF says, cropped in the middle to
    the shape of `size` (H, W), resized. Values become pixels as in training (see `to_rgb`); UserError where they can't.

    `bands`: see util/data/bands.py; `bands.of_model` of a model from a checkpoint. Pictures are RGB of 8 bits where
    that has 3 channels, grey of 8 bits for 1; RGBA is for 4.
    """
    fitted = []
    for i, image in enumerate(images):
        try:
            rgb = to_rgb(image) if bands.in_chans == 3 else _as_picture(image, bands.in_chans)
        except ValueError as error:
            raise UserError(f"image {i} ({printable(getattr(image, 'filename', '')) or 'unnamed'}): {error}") from error
        rgb.getexif()[Base.Orientation] = image.getexif().get(Base.Orientation, 1)  # TIFF's would be lost
        fitted.append(ImageOps.fit(ImageOps.exif_transpose(rgb), size[::-1], Image.Resampling.BICUBIC))
    pixels = torch.stack([torch.from_numpy(np.array(image)).view(*size, -1) for image in fitted])
    return normalise(pixels, torch.zeros(len(fitted), dtype=torch.bool), bands)


def _as_picture(image: Image.Image, channels: int) -> Image.Image:
    if channels == 1:
        return to_rgb(image).convert("L")
    if channels == 4 and image.mode == "RGBA":
        return image.copy()
    raise ValueError(
        f"a picture of mode {image.mode}, but the model takes {channels} channels: give it normalised images"
    )


def heat(picture: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(picture [3, H, W], values [h, w] of 0 or more) -> [3, H, W]: the picture under a glow from black over red and
    yellow to white, brightest where `values` are greatest.
    """
    share = nn.functional.interpolate(values[None, None], picture.shape[1:], mode="bilinear")[0] / values.max()
    glow = (3 * share - torch.arange(3, device=share.device)[:, None, None]).clamp(0, 1)
    return 0.35 * picture + 0.65 * glow
