"""Images of any number of channels, of uint8, uint16 or float32: read as they are stored, and how they are normalised.

The types are taken to 0..1 by 255, 65535 and 1; mean and deviation are in these units. Letters: C channels, H, W.
"""

import argparse
import copy
import io
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.cli import DataOptions
from util.data import decode
from util.dist import Dist, on_main
from util.errors import UserError
from util.log import log

TOP = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1}
TYPES = "uint8, uint16 or float32"
NPY, TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
N_MEASURED = 1000  # images that mean and deviation are measured on, at most


class WrongKind(ValueError):
    """A file of another kind than the run's, which --skip_bad_images does not pass over. Reads on from "FILE has"."""


@dataclass(frozen=True)
class Bands:
    """The channels of a run's images. `mean` and `std` [C]: None until `settle` has measured them.

    `pixel_type`: rgb for RGB of 8 bits, whatever the files (see `decode.to_rgb`); else the files' values are taken as
    they are stored, and it is the name of the first one's type, once `settle` has seen it.
    """

    in_chans: int = 3
    mean: tuple[float, ...] | None = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] | None = IMAGENET_DEFAULT_STD
    pixel_type: str = "rgb"

    @property
    def endings(self) -> tuple[str, ...]:
        """Of files that are images."""
        return IMG_EXTENSIONS if self.pixel_type == "rgb" else (*IMG_EXTENSIONS, ".npy")

    def read(self, data: torch.Tensor) -> torch.Tensor:
        """File content [n_bytes] uint8 -> pixels [C, H, W] as they are stored, in memory as [H, W, C].

        Raises WrongKind for another number of channels, ValueError or what libraries raise for what cannot be decoded,
        and for NaN and infinite values.
        """
        raw = data.numpy().tobytes()
        if raw.startswith(NPY):
            return self._arranged(_read_npy(raw))
        if raw.startswith(TIFF) and not self._ordinary(raw):
            return self._arranged(_read_tiff(raw))
        if self.in_chans == 3:
            return decode.decode(data)
        return self.of_image(decode.open_image(raw))

    def of_image(self, image: Image.Image) -> torch.Tensor:
        """PIL image -> pixels [C, H, W]. For 3 channels see `decode.to_rgb`; colours become grey where C is 1.

        Raises WrongKind for another number of channels, ValueError for values that have no rule.
        """
        if self.in_chans == 3:
            return _planes(np.array(decode.to_rgb(image)))
        if (values := decode.deep_grey(image)) is not None:
            if image.mode != "F":
                values = np.rint(65535 * values).astype(np.uint16)
        elif self.in_chans == 1:
            values = np.array(image.convert("L") if image.mode in ("1", "L") else decode.to_rgb(image).convert("L"))
        else:
            values = np.array(image.convert({"P": "RGB", "PA": "RGBA"}.get(image.mode, image.mode)))
        return self._arranged(values if values.ndim == 3 else values[:, :, None], axes=(2,))

    def _ordinary(self, raw: bytes) -> bool:
        """Whether Pillow gives all channels and bits of a TIFF, and it is no stack of pages."""
        try:
            image = decode.open_image(raw)
        except ValueError:
            return False
        bits, samples = max(np.atleast_1d(image.tag_v2.get(258, 1))), image.tag_v2.get(277, 1)
        if samples == 1:
            return bits <= 32 and getattr(image, "n_frames", 1) == 1
        alpha = image.tag_v2.get(338, ())  # what samples beyond the colours are: 0 is none of the two kinds of alpha
        colours = self.in_chans in (1, 3) or (image.mode == "RGBA" and alpha == (2,))
        return bits <= 8 and colours and 0 not in alpha

    def _arranged(self, values: np.ndarray, axes: tuple[int, ...] = (2, 0)) -> torch.Tensor:
        """[H, W, C], [C, H, W] or [H, W] -> [C, H, W]. The channels are the first of `axes` that is C long."""
        shape = " x ".join(map(str, values.shape))
        while values.ndim > 3 and values.shape[0] == 1:
            values = values[0]
        if values.ndim == 2:
            values, axes = values[:, :, None], (2,)
        if values.ndim != 3 or not values.size:
            raise ValueError(f"shape {shape}: an image has height, width and channels, or channels, height and width")
        found = [values.shape[axis] for axis in axes]
        if self.in_chans not in found:
            what = f"{min(found)} channels" if min(found) > 1 else "1 channel"
            raise WrongKind(f"{what} (shape {shape}), but --in_chans is {self.in_chans}: pass the files' number")
        if axes[found.index(self.in_chans)] == 0:
            values = values.transpose(1, 2, 0)
        if values.dtype.kind == "f" and (wrong := values.size - np.count_nonzero(np.isfinite(values))):
            raise ValueError(f"{wrong} of {values.size} values are NaN or infinite")
        return decode.check_sides(_planes(values))

    @property
    def dtype(self) -> torch.dtype:
        """Of the first image's pixels, as far as it is known; of the others as a rule."""
        return getattr(torch, self.pixel_type, torch.uint8)

    def statistics(self) -> str:
        """Mean and deviation in words."""
        mean, std = (" ".join(f"{value:.7g}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean}, std {std}"

    def note(self, args: argparse.Namespace) -> None:
        """Write into a run's options what its checkpoints are to tell."""
        args.mean, args.std, args.pixel_type = list(self.mean), list(self.std), self.pixel_type


RGB = Bands()


def of_model(model: torch.nn.Module, mean: list[float] | None = None, std: list[float] | None = None) -> Bands:
    """Those that a model from a checkpoint was trained with (see util/weights/build.py). Raises UserError where they
    are not known, unless `mean` and `std` are given, and where these contradict the checkpoint.
    """
    told = dict(getattr(model, "bands", {}))
    for name, given in (("mean", mean), ("std", std)):
        known, channels = told.get(name, getattr(RGB, name)), told.get("in_chans", 3)
        if given is None and known is None:
            raise UserError(
                f"the checkpoint does not tell the {name} of its {channels} channels: give --mean and --std"
            )
        if known is None and len(given) == channels:
            told[name] = tuple(given)
        elif given is not None and tuple(given) != known:
            what = "it does not tell them, but" if known is None else f"its own are {' '.join(map(str, known))}, and"
            raise UserError(f"--{name} does not fit the checkpoint: {what} it takes {channels} channels")
    return Bands(**told)


def _planes(values: np.ndarray) -> torch.Tensor:
    """[H, W, C] of any byte order and strides -> [C, H, W]."""
    # a copy: torch warns of memory that it may not write to
    return torch.from_numpy(np.array(values, values.dtype.newbyteorder("="), order="C")).permute(2, 0, 1)


def _check(shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Before anything is decoded."""
    if dtype.newbyteorder("=") not in (np.uint8, np.uint16, np.float32):
        raise ValueError(f"values of {dtype}: save them as {TYPES}")
    if (n := math.prod(shape)) > 3 * decode.pixel_limit():
        raise decode.too_many(f"{' x '.join(map(str, shape))} values, as many as of {n // 3}")


def _read_npy(raw: bytes) -> np.ndarray:
    file = io.BytesIO(raw)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if (read_header := readers.get(np.lib.format.read_magic(file))) is None:
        raise ValueError(f"a header of another version: save an array of {TYPES} by numpy.save")
    shape, fortran, dtype = read_header(file)
    _check(shape, dtype)
    n_bytes = math.prod(shape) * dtype.itemsize
    if len(raw) - file.tell() < n_bytes:
        raise ValueError(f"{len(raw) - file.tell()} bytes of values, not {n_bytes}: it is cut off")
    values = np.frombuffer(raw, dtype, math.prod(shape), file.tell())
    return values.reshape(shape, order="F" if fortran else "C")


def _read_tiff(raw: bytes) -> np.ndarray:
    try:
        import tifffile
    except ImportError as error:
        raise WrongKind(f"channels or bits that Pillow cannot read: pip install tifffile ({error})") from error
    with tifffile.TiffFile(io.BytesIO(raw)) as file:
        series = file.series[0]
        _check(series.shape, series.dtype)
        if math.prod(tile := series.keyframe.tile or ()) > 3 * decode.pixel_limit():
            raise decode.too_many(f"tiles of {' x '.join(map(str, tile))}")  # decoded whole, however small the image
        return series.asarray(maxworkers=1)


def collate(samples: list[tuple]) -> list[torch.Tensor]:
    """Samples, whose first part is pixels -> a batch; where their types differ, of float32 in units of 0..1."""
    if len({pixels.dtype for pixels, *_ in samples}) > 1:
        samples = [(pixels.float() / TOP[pixels.dtype], *more) for pixels, *more in samples]
    return default_collate(samples)


# what a run is told, and what it finds


def chosen(options: DataOptions | argparse.Namespace, transform: object = None) -> Bands:
    """What --in_chans, --mean and --std say. Raises UserError where they, or the `transform`, do not fit together."""
    channels, mean, std = options.in_chans, options.mean, options.std
    if (mean is None) != (std is None):
        raise UserError("--mean and --std go together: give both, or neither")
    for name, values in (("mean", mean or ()), ("std", std or ())):
        if mean is not None and len(values) != channels:
            raise UserError(f"--{name} has {len(values)} numbers, but --in_chans is {channels}: give one a channel")
    pixel_type = options.pixel_type or ("rgb" if channels == 3 else "stored")
    if pixel_type == "rgb" and channels != 3:
        raise UserError(f"--pixel_type rgb has 3 channels, but --in_chans is {channels}: pass --pixel_type stored")
    if pixel_type == "rgb" and mean is None:
        return RGB
    bands = Bands(channels, tuple(mean) if mean else None, tuple(std) if std else None, pixel_type)
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
    a stream the first ones). Raises UserError, on all ranks, where images, or the recipe, are of another kind.
    """
    if bands.pixel_type != "rgb":
        for dataset in datasets:
            dataset.bands = bands
        bands = on_main(env, lambda: _with_statistics(bands, datasets[0]))
        if (bands.in_chans, bands.pixel_type) != (3, "uint8"):
            check_eight_bits(datasets[0].transform, decoder, f"{bands.in_chans} channels of {bands.pixel_type}")
        log.info(f"{bands.in_chans} channels of {bands.pixel_type}: {bands.statistics()}")
    for dataset in datasets:
        dataset.bands = bands
    return bands


def _with_statistics(bands: Bands, dataset) -> Bands:
    images = _pixels(dataset)
    first = next(images)
    bands = replace(bands, pixel_type=str(first.dtype).removeprefix("torch."))
    if bands.mean is not None:
        return bands
    if bands.in_chans == 3 and first.dtype == torch.uint8:
        return replace(bands, mean=RGB.mean, std=RGB.std)
    mean, std = measure(itertools.chain([first], images))
    if constant := [i for i, value in enumerate(std) if value == 0]:
        log.warning(f"channels {constant} have one value in all measured images: their std is taken as 1")
    log.info(f"mean and std are measured on {min(N_MEASURED, len(dataset))} training images")
    return replace(bands, mean=mean, std=tuple(value or 1.0 for value in std))


def _pixels(dataset) -> Iterable[torch.Tensor]:
    """Whole images [C, H, W], up to N_MEASURED of them; of broken ones no note is taken."""
    view = copy.copy(dataset)
    view.transform = _untouched
    if hasattr(view, "iterate"):
        items = itertools.islice(view.iterate(0), N_MEASURED)
    else:
        view.bad, n = torch.zeros_like(dataset.bad), min(N_MEASURED, len(dataset))
        items = (view[i * len(dataset) // n] for i in range(n))
    return (pixels for pixels, *_ in items)


def _untouched(pixels: torch.Tensor) -> tuple[torch.Tensor, bool]:
    return pixels, False


def measure(images: Iterable[torch.Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Images [C, H, W] -> mean and (population) standard deviation of each channel over all their pixels, in units of
    0..1, to 7 digits.
    """
    count, mean, squares = 0, 0.0, 0.0
    for pixels in images:
        values = pixels.double().flatten(1) / TOP[pixels.dtype]
        n, own = values.shape[1], values.mean(dim=1)
        # image by image (Chan et al. 1979): sums of squares would lose the digits of values far from 0
        step = own - mean
        squares = squares + (values - own[:, None]).square().sum(dim=1) + step.square() * (count * n / (count + n))
        count, mean = count + n, mean + step * (n / (count + n))
    return tuple(tuple(float(f"{value:.7g}") for value in row.tolist()) for row in (mean, (squares / count).sqrt()))
