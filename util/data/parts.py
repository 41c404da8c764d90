"""One loader over all parts of an evaluation, so that its workers start once."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset

from util.data.datasets import Images
from util.data.loader import DeviceLoader
from util.data.robustness import Part
from util.data.workers import worker_options
from util.dist import Dist
from util.errors import UserError


def parts_loader(
    parts: Sequence[Part], batch_size: int, env: Dist, skip_bad: bool, num_workers: int, pin_mem: bool,
    timeout_seconds: float,
) -> tuple[DeviceLoader, list[int]]:  # fmt: skip
    """This process's batches of all parts, of (images, numbers within the part), and how many each part has.

    An image that can't be decoded raises UserError with its name; with `skip_bad` its number i comes as -1 - i.
    """
    batches = PartBatches(parts, batch_size, env.rank, env.world_size)
    options = worker_options(num_workers if len(batches) else 0, pin_mem, env.device, timeout_seconds)
    loader = DataLoader(PartImages(parts, skip_bad), batch_sampler=batches, **options)
    return DeviceLoader(loader, env.device), [batches.of(part) for part in range(len(parts))]


class PartImages(Dataset):
    """All parts' images behind one another, for one loader. Item (part, i): (uint8 [H, W, 3], False, i).

    A file that can't be decoded raises UserError with its name; with `skip_bad` it comes as black with -1 - i.
    """

    def __init__(self, parts: Sequence[Part], skip_bad: bool) -> None:
        self.images, self.skip_bad = [Images(part.files, part.transform) for part in parts], skip_bad

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, bool, int]:
        part, i = key
        try:
            return *self.images[part][i][:2], i
        except UserError:
            if not self.skip_bad:
                raise
        return torch.zeros(*self.images[part].transform.size, 3, dtype=torch.uint8), False, -1 - i


class PartBatches:
    """The batches of one of `world_size` processes: keys of PartImages. Each is of one part, and the same images
    whatever the number of processes, so that logits are the same to the last bit: every `world_size`-th is its own.
    """

    def __init__(self, parts: Sequence[Part], batch_size: int, rank: int, world_size: int) -> None:
        starts = [(p, i) for p, part in enumerate(parts) for i in range(0, len(part.files), batch_size)]
        self.batch_size, self.lengths = batch_size, [len(part.files) for part in parts]
        self.starts = starts[rank::world_size]

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for part, start in self.starts:
            yield [(part, i) for i in range(start, min(start + self.batch_size, self.lengths[part]))]

    def of(self, part: int) -> int:
        """How many are of this part."""
        return sum(p == part for p, _ in self.starts)
