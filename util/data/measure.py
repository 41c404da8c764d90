"""What a run is told of its images' channels, and what it finds: type, mean, deviation. C: channels, H, W."""

import argparse
import copy
import itertools
from collections.abc import Iterable
from dataclasses import replace

import torch

from util.cli import DataOptions
from util.data.bands import RGB, TOP, Bands, check_units, tell_other_type
from util.dist import Dist, on_main
from util.errors import UserError
from util.log import log
from util.transforms import check_together

# what mean and deviation are measured on: images, at most; and values of them all, of which 16 images may have more.
# The other ranks wait meanwhile, for --dist_timeout at most
N_MEASURED, N_VALUES = 1000, 2**30
PART = 2**22  # values at a time: float64 takes several times the memory of an image


def chosen(options: DataOptions | argparse.Namespace, transform: object = None) -> Bands:
    """What --in_chans, --mean and --std say. Raises UserError where they, or the `transform`, do not fit together."""
    channels, mean, std = options.in_chans, options.mean, options.std
    check_together(mean, std)
    for name, values in (("mean", mean or ()), ("std", std or ())):
        if mean is not None and len(values) != channels:
            raise UserError(f"--{name} has {len(values)} numbers, but --in_chans is {channels}: give one a channel")
    pixel_type = options.pixel_type
    if pixel_type == "auto":
        pixel_type = "rgb" if channels == 3 else "stored"
    if pixel_type == "rgb" and channels != 3:
        raise UserError(f"--pixel_type rgb has 3 channels, but --in_chans is {channels}: pass --pixel_type stored")
    if pixel_type == "rgb" and mean is None:
        return RGB
    bands = Bands(channels, tuple(mean) if mean else None, tuple(std) if std else None, pixel_type)
    check_units(bands)
    if channels != 3:
        check_eight_bits(transform, options.decode, f"{channels} channels")
    return bands


def check_eight_bits(transform: object, decoder: str, found: str) -> None:
    """Raise UserError where a recipe needs 3 channels of uint8, for images that are something else."""
    if getattr(transform, "policy", None) is not None:
        raise UserError(
            f"--aa, --color_jitter and --augment jitter need 3 channels of uint8, not {found}: pass --aa '' without "
            "--color_jitter, or another --augment"
        )
    if decoder == "cuda":
        raise UserError(f"--decode cuda needs 3 channels of uint8, not {found}: pass --decode cpu")


def settle(bands: Bands, env: Dist, decoder: str, *datasets) -> Bands:
    """Give the `datasets` (Images or Streams) their bands, with type, mean and deviation of the first of them.

    ImageNet's for 3 channels of uint8, else measured by rank 0 over all pixels of up to 1,000 images, evenly spaced (of
    a stream the first ones), fewer where they have more than a million values each. Raises UserError, on all ranks,
    where first images, or the recipe, are of another kind.
    """
    if bands.pixel_type != "rgb":
        for dataset in datasets:
            dataset.bands = bands
        bands = on_main(env, lambda: _with_statistics(bands, *datasets))
        if (bands.in_chans, bands.pixel_type) != (3, "uint8"):
            check_eight_bits(datasets[0].transform, decoder, f"{bands.in_chans} channels of {bands.pixel_type}")
        log.info(f"{bands.in_chans} channels of {bands.pixel_type}: {bands.statistics()}")
    for dataset in datasets:
        dataset.bands = bands
    return bands


def _with_statistics(bands: Bands, dataset, *others) -> Bands:
    first = next(_pixels(dataset, 1))
    tell_other_type(bands.pixel_type, first, "images", "--pixel_type or the checkpoint says")
    bands = replace(bands, pixel_type=str(first.dtype).removeprefix("torch."))
    for other in others:  # an epoch later would be late
        for pixels in _pixels(other, 1):
            tell_other_type(bands.pixel_type, pixels, "images to validate on", "those to train on")
    check_units(bands)
    if bands.mean is not None:
        return bands
    if bands.in_chans == 3 and first.dtype == torch.uint8:
        return replace(bands, mean=RGB.mean, std=RGB.std)
    n = min(N_MEASURED, max(N_VALUES // first.numel(), 16))
    mean, std = measure(_pixels(dataset, n))
    # less than float32 resolves: all that rounding leaves
    if constant := [i for i, (m, s) in enumerate(zip(mean, std, strict=True)) if s <= 1e-7 * abs(m)]:
        log.warning(f"channels {constant} have one value in all measured images: their std is taken as 1")
    log.info(f"mean and std are measured on {min(n, len(dataset))} training images")
    return replace(bands, mean=mean, std=tuple(1.0 if i in constant else value for i, value in enumerate(std)))


def _pixels(dataset, n: int) -> Iterable[torch.Tensor]:
    """Whole images [C, H, W], up to `n` of them; of broken ones no note is taken."""
    view = copy.copy(dataset)
    view.transform = _untouched
    if hasattr(view, "iterate"):
        items = itertools.islice(view.iterate(0), n)
    else:
        view.bad, n = torch.zeros_like(dataset.bad), min(n, len(dataset))
        items = (view[i * len(dataset) // n] for i in range(n))
    return (pixels for pixels, *_ in items)


def _untouched(pixels: torch.Tensor) -> tuple[torch.Tensor, bool]:
    return pixels, False


def measure(images: Iterable[torch.Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Images [C, H, W] -> mean and (population) standard deviation of each channel over all their pixels, in units of
    0..1, to 7 digits.
    """
    count, mean, squares = 0, 0.0, 0.0
    parts = (part for pixels in images for part in pixels.split(max(PART // pixels[:, 0].numel(), 1), dim=1))
    for pixels in parts:
        values = pixels.double().flatten(1) / TOP[pixels.dtype]
        n, own = values.shape[1], values.mean(dim=1)
        # part by part (Chan et al. 1979): sums of squares would lose the digits of values far from 0
        step = own - mean
        squares = squares + (values - own[:, None]).square().sum(dim=1) + step.square() * (count * n / (count + n))
        count, mean = count + n, mean + step * (n / (count + n))
    return tuple(tuple(float(f"{value:.7g}") for value in row.tolist()) for row in (mean, (squares / count).sqrt()))
