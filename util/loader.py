"""From a dataset to batches on the device: loader workers send uint8, the device mirrors and normalises."""

import functools
from collections.abc import Iterator

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, Dataset

from util.datasets import TrainSampler
from util.dist import Dist, available_cores
from util.log import log


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


class DeviceLoader:
    """Iterates over (images [N, 3, H, W] normalised, labels [N]) on the device, from a DataLoader of uint8 batches.

    On CUDA a batch is copied on a stream of its own: the host runs ahead of the device, so the copy happens while an
    earlier batch is computed with.
    """

    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        for batch in self.loader:
            with torch.cuda.stream(copies):  # does nothing without a stream
                pixels, mirror, labels = (part.to(self.device, non_blocking=True) for part in batch)
            if copies is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_stream(copies)
                for part in (pixels, mirror, labels):
                    part.record_stream(current)  # its memory is not reused before the step is done with it
            yield normalise(pixels, mirror), labels


def train_loader(dataset: Dataset, sampler: TrainSampler, num_workers: int, pin_mem: bool) -> DeviceLoader:
    """Batches in the order of the sampler."""
    device = sampler.env.device
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_mem and device.type == "cuda",
        persistent_workers=num_workers > 0,
    )
    return DeviceLoader(loader, device)


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
