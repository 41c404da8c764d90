"""--decode cuda: loader workers read files and draw crops, the GPU decodes, crops and resizes JPEGs (nvJPEG)."""

from typing import NamedTuple

import torch
import torchvision.io
from PIL.Image import DecompressionBombError
from torch.utils.data import Dataset, default_collate

from util import rng
from util.data.datasets import Images
from util.data.decode import JPEG, jpeg_frame
from util.data.measure import check_eight_bits
from util.errors import UserError
from util.log import log
from util.transforms import Box, RandomCrop, crop_and_resize

END_OF_JPEG = b"\xff\xd9"

# (bytes of a JPEG, its crop) or (pixels [h, w, 3], None); to be mirrored; label; key in the dataset
Item = tuple[torch.Tensor, Box | None, bool, int, tuple[int, int]]


class EncodedBatch(NamedTuple):
    """A batch on the host: JPEGs with their crops, and pixels where `boxes` has None."""

    jpegs: torch.Tensor  # all their bytes; a tensor each would take a file descriptor each on the way from the worker
    sizes: list[int]  # of each JPEG, in bytes
    pixels: torch.Tensor  # uint8 [n, h, w, 3]
    boxes: list[Box | None]
    mirror: torch.Tensor  # [N] bool
    labels: torch.Tensor  # [N]
    keys: list[tuple[int, int]]


class EncodedImages(Dataset):
    """The same draws for the same keys as `images`, with JPEGs left encoded; all other files arrive as pixels."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.transform: RandomCrop = images.transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        try:
            data, label = self.images.source.read(index)
            size = _jpeg_size(data)
        except OSError:  # `images` names the file or replaces it
            size = None
        if size is None:
            pixels, mirror, label = self.images[key]
            check_eight_bits(None, "cuda" if pixels.dtype != torch.uint8 else "cpu", f"images of {pixels.dtype}")
            return pixels, None, mirror, label, key
        rng.seed_sample(self.images.seed, epoch, index)
        box, mirror = self.transform.draw(*size)
        return data, box, mirror, label, key

    @staticmethod
    def collate(items: list[Item]) -> EncodedBatch:
        """What a worker sends."""
        jpegs = [data for data, box, *_ in items if box is not None]
        pixels = [data for data, box, *_ in items if box is None]
        _, boxes, mirror, labels, keys = zip(*items, strict=True)
        none = torch.empty(0, dtype=torch.uint8)
        return EncodedBatch(
            torch.cat(jpegs) if jpegs else none,
            [len(jpeg) for jpeg in jpegs],
            torch.stack(pixels) if pixels else none,
            list(boxes),
            torch.tensor(mirror),
            torch.tensor(labels),
            list(keys),
        )

    def decode(self, batch: EncodedBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """EncodedBatch -> uint8 [N, h, w, 3], to be mirrored [N], labels [N], on the device.

        Where the GPU cannot decode a JPEG or resize its crop, this batch is left to `images`, which names or replaces
        a broken file.
        """
        mirror, labels = batch.mirror, batch.labels
        try:
            pixels = self._decode(batch, device)
        except RuntimeError as error:
            log.warning(f"a batch is decoded on the CPU, since the GPU cannot: {str(error).splitlines()[0]}")
            pixels, mirror, labels = default_collate([self.images[key] for key in batch.keys])
        return tuple(_to_device(part, device) for part in (pixels, mirror, labels))

    def _decode(self, batch: EncodedBatch, device: torch.device) -> torch.Tensor:
        decoded = iter(_decode_jpegs(list(batch.jpegs.split(batch.sizes)), device) if batch.sizes else [])
        ready = iter(_to_device(batch.pixels, device))
        return torch.stack(
            [
                next(ready) if box is None else crop_and_resize(next(decoded), box, self.transform.size)
                for box in batch.boxes
            ]
        )


def check_gpu_decode(transform: RandomCrop, device: torch.device) -> None:
    """Raise UserError where JPEGs can't be decoded on `device` for this transform."""
    if device.type != "cuda":
        raise UserError(f"--decode cuda needs a CUDA GPU, but the device is {device.type}: pass --decode cpu")
    if transform.policy is not None:
        raise UserError(
            "--decode cuda crops and flips alone, but --aa, --color_jitter and --augment jitter work on the CPU: "
            "pass --decode cpu, or --aa '' without --color_jitter, or another --augment"
        )
    if not hasattr(torchvision.io, "decode_jpeg"):  # deprecated since 0.29
        raise UserError("--decode cuda needs torchvision's decoder, which this version has no more: pass --decode cpu")


def _jpeg_size(data: torch.Tensor) -> tuple[int, int] | None:
    """(height, width) of a JPEG that the GPU decodes, from its header; None for every other file.

    One that is cut short, without the end's mark, would be half a picture there; on the CPU it is an error.
    """
    raw = data.numpy().tobytes()
    if not raw.startswith(JPEG) or END_OF_JPEG not in raw[-1024:]:  # the mark, and what some cameras write behind it
        return None
    try:
        frame = jpeg_frame(raw)
    except (ValueError, DecompressionBombError):  # decoding it on the CPU will say
        return None
    # baseline, extended or progressive by Huffman's code; where bytes are to be skipped, nvJPEG may read another size
    known = frame and frame.clean and frame.marker <= 0xC2 and frame.precision == 8 and frame.components in (1, 3)
    return (frame.height, frame.width) if known else None


def _decode_jpegs(jpegs: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    if device.type == "cuda":
        # nvJPEG works on a stream of its own, and would write at once into memory that crops of the batch before are
        # still to be read from (torchvision's pull request 9606)
        torch.cuda.current_stream(device).synchronize()
    return torchvision.io.decode_jpeg(jpegs, mode=torchvision.io.ImageReadMode.RGB, device=device)


def _to_device(part: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and part.device.type == "cpu":
        part = part.pin_memory()  # else the host would wait for the copy
    return part.to(device, non_blocking=True)
