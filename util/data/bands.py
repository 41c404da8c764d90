"""Images of any number of channels, of uint8, uint16 or float32: how files are read. See measure.py for the rest.

The types are taken to 0..1 by 255, 65535 and 1; mean and deviation are in these units. Letters: C channels, H, W.
"""

import argparse
import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.data import decode
from util.errors import UserError
from util.log import log
from util.transforms import check_together

TOP = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1}
TYPES = ("uint8", "uint16", "float32")
_TYPES = "uint8, uint16 or float32"
NPY, TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


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

        Raises WrongKind for another number of channels or type of values, ValueError or what libraries raise for what
        cannot be decoded, and for NaN and infinite values.
        """
        raw = data.numpy().tobytes()
        if raw.startswith(NPY):
            return self._arranged(_read_npy(raw))
        if raw.startswith(TIFF) and not self._ordinary(raw):
            return self._arranged(*_read_tiff(raw))
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
        if samples == 1:  # mode I: signed, or of 32 bits
            return image.mode != "I" and getattr(image, "n_frames", 1) == 1
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


def check_units(bands: Bands) -> None:
    """Raise UserError where mean or deviation of integers, whose range is 0 to 1, are in units of the files' values."""
    if bands.pixel_type in ("stored", "float32"):  # not known yet, or of any range
        return
    top = TOP[bands.dtype]
    for name in ("mean", "std"):
        if wrong := [value for value in getattr(bands, name) or () if abs(value) > 1]:
            raise UserError(
                f"--{name} {wrong[0]:g} is beyond 1, and it is in units of 0..1: divide what is of 0..{top} by {top}"
            )


def tell_other_type(told: str, pixels: torch.Tensor, what: str, teller: str) -> None:
    """Warn where `pixels`, of `what`, are of another type than the one that `teller` has told."""
    found = str(pixels.dtype).removeprefix("torch.")
    if told in TYPES and told != found:
        units = "mean and std are in units of the whole range of either type"
        log.warning(f"{what} are of {found}, not {told} as {teller}: {units}")


def of_model(model: torch.nn.Module, mean: list[float] | None = None, std: list[float] | None = None) -> Bands:
    """Those that a model from a checkpoint was trained with (see util/weights/build.py); ImageNet's mean and deviation
    for 3 channels where it tells none. Raises UserError where they are not known, unless `mean` and `std` are given,
    and where these contradict the checkpoint.
    """
    check_together(mean, std)
    told = dict(getattr(model, "bands", {}))
    channels = told.get("in_chans", 3)
    for name, given in (("mean", mean), ("std", std)):
        known = told.get(name)
        if given is None and known is None and channels == 3:
            told[name] = getattr(RGB, name)
        elif given is None and known is None:
            raise UserError(
                f"the checkpoint does not tell the {name} of its {channels} channels: give --mean and --std"
            )
        elif known is None and len(given) == channels:
            told[name] = tuple(given)
        elif given is not None and tuple(given) != known:
            what = "it does not tell them, but" if known is None else f"its own are {' '.join(map(str, known))}, and"
            raise UserError(f"--{name} does not fit the checkpoint: {what} it takes {channels} channels")
    bands = Bands(**told)
    check_units(bands)
    return bands


def _planes(values: np.ndarray) -> torch.Tensor:
    """[H, W, C] of any byte order and strides -> [C, H, W]."""
    # a copy: torch warns of memory that it may not write to
    return torch.from_numpy(np.array(values, values.dtype.newbyteorder("="), order="C")).permute(2, 0, 1)


def _check(shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Before anything is decoded. Raises WrongKind for numbers of another type, ValueError for what are none."""
    if dtype.hasobject or dtype.kind not in "biufc":
        raise ValueError(f"values of {dtype}, which are no numbers: save an array of {_TYPES}")
    if dtype.newbyteorder("=") not in TYPES:
        raise WrongKind(f"values of {dtype}: save them as {_TYPES}, such as by .astype('float32')")
    if (n := math.prod(shape)) > 3 * decode.pixel_limit():
        raise decode.too_many(f"{' x '.join(map(str, shape))} values, as many as of {n // 3}")


def _read_npy(raw: bytes) -> np.ndarray:
    file = io.BytesIO(raw)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if (read_header := readers.get(np.lib.format.read_magic(file))) is None:
        raise ValueError(f"a header of another version: save an array of {_TYPES} by numpy.save")
    shape, fortran, dtype = read_header(file)
    _check(shape, dtype)
    n_bytes = math.prod(shape) * dtype.itemsize
    if len(raw) - file.tell() < n_bytes:
        raise ValueError(f"{len(raw) - file.tell()} bytes of values, not {n_bytes}: it is cut off")
    values = np.frombuffer(raw, dtype, math.prod(shape), file.tell())
    return values.reshape(shape, order="F" if fortran else "C")


def _read_tiff(raw: bytes) -> tuple[np.ndarray, tuple[int, ...]]:
    """(Values, where their channels may be): last, if the file names that axis, S(amples) or C(hannel); pages before
    columns, if it does not.
    """
    try:
        import tifffile
    except ImportError as error:
        raise WrongKind(f"channels or bits that Pillow cannot read: pip install tifffile ({error})") from error
    with tifffile.TiffFile(io.BytesIO(raw)) as file:
        series = file.series[0]
        if series.dtype is None:
            raise WrongKind(f"values of {series.keyframe.bitspersample} bits: save them as {_TYPES}")
        _check(series.shape, series.dtype)
        if math.prod(tile := series.keyframe.tile or ()) > 3 * decode.pixel_limit():
            raise decode.too_many(f"tiles of {' x '.join(map(str, tile))}")  # decoded whole, however small the image
        try:
            values = series.asarray(maxworkers=1)
        except (ValueError, KeyError) as error:  # of a codec, of a predictor
            if "imagecodecs" not in str(error):
                raise
            raise WrongKind(f"a compression that takes a package: pip install imagecodecs ({error})") from error
    if named := [axis for axis in "SC" if axis in series.axes]:
        return np.moveaxis(values, series.axes.index(named[0]), -1), (2,)
    return values, (0, 2)


def collate(samples: list[tuple]) -> list[torch.Tensor]:
    """Samples, whose first part is pixels -> a batch; where their types differ, of float32 in units of 0..1."""
    if len({pixels.dtype for pixels, *_ in samples}) > 1:
        samples = [(pixels.float() / TOP[pixels.dtype], *more) for pixels, *more in samples]
    return default_collate(samples)
