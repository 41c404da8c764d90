"""From a dataset to batches on the device: loader workers send uint8, the device mirrors and normalises."""

import functools
from collections.abc import Callable, Iterator

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, Dataset

from util.datasets import Images, TrainSampler
from util.dist import Dist, available_cores
from util.gpu_decode import EncodedImages, check_gpu_decode
from util.log import log
from util.signals import leave_signals_to_the_trainer


def normalise(pixels: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
    """uint8 [N, H, W, 3] and [N] bool -> [N, 3, H, W] float32 with ImageNet's mean and deviation; some mirrored.

    In memory it stays [N, H, W, 3], of which patches are cheaper to take.
    """
    n, height, width, _ = pixels.shape
    pixels = torch.where(mirror[:, None, None, None], pixels.flip(2), pixels)
    mean, std = (_row(values, width, pixels.device) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    imgs = pixels.view(n, height, width * 3).float().div_(255).sub_(mean).div_(std)
    return imgs.view(n, height, width, 3).permute(0, 3, 1, 2)


@functools.cache  # a copy to the device in each step would make the host wait
def _row(channels: tuple[float, ...], width: int, device: torch.device) -> torch.Tensor:
    """[width * 3]: the channels' values for a row of pixels; broadcasting three values by themselves is slow."""
    return torch.tensor(channels, device=device).repeat(width)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # uint8 [N, H, W, 3], to be mirrored [N], labels [N]


class DeviceLoader:
    """Iterates over (images [N, 3, H, W] normalised, labels [N]) on the device.

    `loader` yields batches on the host, which `to_device` turns into a Batch on the device. On CUDA this happens on a
    stream of its own: the host runs ahead of the device, so while an earlier batch is computed with.
    """

    def __init__(self, loader: DataLoader, device: torch.device, to_device: Callable[..., Batch] | None = None) -> None:
        self.loader, self.device = loader, device
        self.to_device = to_device or _copy_to

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        for host_batch in self.loader:
            with torch.cuda.stream(copies):  # does nothing without a stream
                batch = self.to_device(host_batch, self.device)
            if copies is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_stream(copies)
                for part in batch:
                    part.record_stream(current)  # its memory is not reused before the step is done with it
            pixels, mirror, labels = batch
            yield normalise(pixels, mirror), labels


def _copy_to(batch: list[torch.Tensor], device: torch.device) -> Batch:
    pixels, mirror, labels = (part.to(device, non_blocking=True) for part in batch)
    return pixels, mirror, labels


def train_loader(
    dataset: Images, sampler: TrainSampler, num_workers: int, pin_mem: bool, decode: str = "cpu"
) -> DeviceLoader:
    """Batches in the order of the sampler. `decode`: cpu, or cuda to leave JPEGs to the GPU.

    Raises UserError where the device or the recipe does not allow that.
    """
    device = sampler.env.device
    encoded = None
    if decode == "cuda":
        check_gpu_decode(dataset.transform, device)
        encoded = EncodedImages(dataset)
    loader = DataLoader(
        encoded or dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_the_trainer,
        pin_memory=pin_mem and device.type == "cuda" and encoded is None,  # nvJPEG reads ordinary memory
        persistent_workers=num_workers > 0,
        collate_fn=list if encoded else None,
    )
    return DeviceLoader(loader, device, encoded and encoded.decode)


def eval_loader(
    dataset: Dataset, batch_size: int, env: Dist, sharded: bool, num_workers: int, pin_mem: bool
) -> DeviceLoader:
    """Every image once, in order; with `sharded`, once over all ranks together (their shares may differ by one)."""
    indices = range(env.rank, len(dataset), env.world_size) if sharded else range(len(dataset))
    loader = DataLoader(
        dataset,
        sampler=indices,
        batch_size=batch_size,
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_the_trainer,
        pin_memory=pin_mem and env.device.type == "cuda",
        persistent_workers=num_workers > 0 and len(indices) > 0,
    )
    return DeviceLoader(loader, env.device)


def available_workers(num_workers: int, env: Dist) -> int:
    """`num_workers` per process, capped at this process's share of the machine's cores, with a line saying so."""
    cores = available_cores()
    share = max(cores // env.local_world_size, 1)
    if num_workers > share:
        log.info(f"--num_workers {num_workers} capped at {share}: {cores} cores, {env.local_world_size} processes here")
    return min(num_workers, share)
