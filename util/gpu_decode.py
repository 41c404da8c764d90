"""--decode cuda: loader workers read files and draw crops, the GPU decodes, crops and resizes JPEGs (nvJPEG)."""

import io

import torch
from PIL import Image
from torch.utils.data import Dataset

from util import rng
from util.datasets import Images
from util.errors import UserError
from util.log import log
from util.transforms import Box, RandomCrop, crop_and_resize

# (bytes of a JPEG, its crop) or (pixels [h, w, 3], None); to be mirrored; label; key in the dataset
Item = tuple[torch.Tensor, Box | None, bool, int, tuple[int, int]]


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
            data, label = self.images.read(index)
            size = _jpeg_size(data)
        except OSError:  # `images` names the file or replaces it
            size = None
        if size is None:
            pixels, mirror, label = self.images[key]
            return pixels, None, mirror, label, key
        rng.seed_sample(self.images.seed, epoch, index)
        box, mirror = self.transform.draw(*size)
        return data, box, mirror, label, key

    def decode(self, items: list[Item], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Items -> uint8 [N, h, w, 3], to be mirrored [N], labels [N], on the device.

        Where the GPU cannot decode a JPEG or resize its crop, this batch is left to `images`, which names or replaces
        a broken file.
        """
        try:
            pixels = self._pixels(items, device)
        except RuntimeError as error:
            log.warning(f"a batch is decoded on the CPU, since the GPU cannot: {str(error).splitlines()[0]}")
            items = [(pixels, None, *rest) for *_, key in items for pixels, *rest in [(*self.images[key], key)]]
            pixels = self._pixels(items, device)
        _, _, mirror, labels, _ = zip(*items, strict=True)
        return torch.stack(pixels), _to_device(mirror, device), _to_device(labels, device)

    def _pixels(self, items: list[Item], device: torch.device) -> list[torch.Tensor]:
        jpegs = [data for data, box, *_ in items if box is not None]
        decoded = iter(_decode_jpegs(jpegs, device) if jpegs else [])
        return [
            data.to(device, non_blocking=True) if box is None
            else crop_and_resize(next(decoded), box, self.transform.size)
            for data, box, *_ in items
        ]  # fmt: skip


def check_gpu_decode(transform: RandomCrop, device: torch.device) -> None:
    """Raise UserError where JPEGs can't be decoded on `device` for this transform."""
    if device.type != "cuda":
        raise UserError(f"--decode cuda needs a CUDA GPU, but the device is {device.type}: pass --decode cpu")
    if transform.policy is not None:
        raise UserError(
            "--decode cuda crops and flips alone, but --aa or --color_jitter work on the CPU: pass --decode cpu, or "
            "--aa '' without --color_jitter"
        )


def _jpeg_size(data: torch.Tensor) -> tuple[int, int] | None:
    """(height, width) of a JPEG that the GPU decodes, from its header; None for every other file."""
    try:
        with Image.open(io.BytesIO(data.numpy()), formats=["JPEG"]) as image:
            return (image.height, image.width) if image.mode in ("RGB", "L") else None
    except Exception:  # whatever is wrong with the file, decoding it on the CPU will say
        return None


def _decode_jpegs(jpegs: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    if device.type == "cuda":
        # nvJPEG works on a stream of its own, and would write at once into memory that crops of the batch before are
        # still to be read from (torchvision's pull request 9606)
        torch.cuda.current_stream(device).synchronize()
    return decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device)


def _to_device(values: tuple, device: torch.device) -> torch.Tensor:
    host = torch.tensor(values)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
