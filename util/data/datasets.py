"""Images: files on disk, decoded, transformed, in an order set by (seed, epoch)."""

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from util import rng
from util.data.bands import RGB, Bands, WrongKind
from util.data.decode import decode, pixel_limit
from util.dist import Dist
from util.errors import UserError, printable
from util.log import log


class PackedFiles(Sequence):
    """[(path, label), ...] -> the same, in arrays. Paths are relative to `folder`, where they are not absolute.

    A list's objects change with each look at them, since Python counts references inside: a loader worker that was
    forked would copy page after page, to 250 MB of its own for ImageNet's 1.28 million files.
    """

    def __init__(self, files: Sequence[tuple[str, int]]) -> None:
        self._pack([([os.fsencode(path) for path, _ in files], [label for _, label in files])], "")

    @classmethod
    def of_batches(cls, batches: Iterable[tuple[list[bytes], Sequence[int]]], folder: str) -> "PackedFiles":
        """The same from [(paths, labels), ...], of which one at a time is in memory."""
        packed = cls.__new__(cls)
        packed._pack(batches, folder)
        return packed

    def _pack(self, batches: Iterable[tuple[list[bytes], Sequence[int]]], folder: str) -> None:
        self.folder, content, labels, lengths = folder, bytearray(), bytearray(), bytearray()  # which grow in place
        for paths, numbers in batches:
            content += b"".join(paths)
            labels += np.array(numbers, np.int64).data
            lengths += np.fromiter(map(len, paths), np.int32, len(paths)).data
        self.paths, self.labels = np.frombuffer(content, np.uint8), np.frombuffer(labels, np.int64)
        self.ends = np.zeros(len(self) + 1, np.int64)
        np.cumsum(np.frombuffer(lengths, np.int32), out=self.ends[1:])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[torch.Tensor, int]:
        """The file's content [n_bytes] uint8, and its label."""
        path, label = self[index]
        return torch.from_numpy(np.fromfile(path, np.uint8)), label

    def name(self, index: int) -> str:
        """Where the image is, for messages."""
        return printable(self[index][0])

    def digest(self) -> str:
        """Of all paths, from the folder on that holds them all, and labels, in their order."""
        least = min(map(min, self._parts()), default=b"")
        common = os.path.commonprefix([least, max(map(max, self._parts()), default=b"")]).rfind(os.sep.encode()) + 1
        digest = hashlib.sha256()
        for number, paths in enumerate(self._parts()):
            digest.update(b"\0" * (number > 0) + b"\0".join([path[common:] for path in paths]))
        digest.update(self.labels.data)
        return digest.hexdigest()[:16]

    def _parts(self, n: int = 1 << 16) -> Iterator[list[bytes]]:
        """All paths, `n` at a time: of millions, objects take several times the memory of the arrays."""
        for first in range(0, len(self), n):
            ends = self.ends[first : first + n + 1]
            content, ends = self.paths[ends[0] : ends[-1]].tobytes(), (ends - ends[0]).tolist()
            yield [content[a:b] for a, b in itertools.pairwise(ends)]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        path = self.paths[self.ends[index] : self.ends[index + 1]].tobytes()
        return os.path.join(self.folder, os.fsdecode(path)), int(self.labels[index])


class BadImageError(UserError):
    """A file that cannot be decoded."""


class Images(Dataset):
    """Images from a source: (pixels [H, W, C], to be mirrored, label). `transform`: see util/transforms.py;
    `bands`, how files are read: util/data/bands.py.

    A source has a length, `read(index)` -> (an image file's bytes [n] uint8, its label or -1) and `name(index)`, for
    messages. PackedFiles is one; a list of (path, label) becomes one. Item (epoch, index) is augmented by (seed, epoch,
    index); item `index` draws nothing. What can't be decoded raises UserError with its name; with `skip_bad` the next
    good one takes its place, and `take_bad()` lists it. `classes`: names in label order, where who made it knows them.
    """

    classes: list[str] | None = None

    def __init__(self, source, transform: Callable, seed: int = 0, skip_bad: bool = False, bands: Bands = RGB) -> None:
        self.source = PackedFiles(source) if isinstance(source, list) else source
        self.transform, self.seed, self.skip_bad, self.bands = transform, seed, skip_bad, bands
        pixel_limit()  # a wrong one is told now
        # a flag a file, in memory that loader workers share with the trainer
        self.bad = torch.zeros(len(self.source), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, bool, int]:
        epoch, index = key if isinstance(key, tuple) else (None, key)
        pixels, label = self._load(index)
        if epoch is not None:
            rng.seed_sample(self.seed, epoch, index)
        return *self.transform(pixels), label

    def digest(self) -> str:
        """What tells these images, and their order, from others, wherever they lie."""
        if hasattr(self.source, "digest"):
            return f"{len(self)} images {self.source.digest()}"
        names = [self.source.name(i) for i in range(0, len(self), max(len(self) // 100, 1))]
        return f"{len(self)} images {hashlib.sha256(repr(names).encode()).hexdigest()[:16]}"

    def _load(self, index: int) -> tuple[torch.Tensor, int]:
        for offset in range(len(self)):
            try:
                data, label = self.source.read((index + offset) % len(self))
                return decode(data) if self.bands.pixel_type == "rgb" else self.bands.read(data), label
            except UserError:
                raise
            except WrongKind as error:
                raise UserError(f"{self.source.name((index + offset) % len(self))} has {error}") from error
            except Exception as error:  # decoders raise whatever they like
                if not self.skip_bad:
                    raise BadImageError(
                        f"cannot decode {self.source.name(index)} ({type(error).__name__}: {printable(error)[:300]}): "
                        "mend or remove it, or pass --skip_bad_images"
                    ) from error
                self.bad[(index + offset) % len(self)] = 1
        raise UserError(f"none of the {len(self)} images can be decoded, such as {self.source.name(0)}")

    def take_bad(self) -> list[str]:
        """Paths of the files skipped since the last call."""
        paths = [self.source.name(i) for i in self.bad.nonzero().flatten().tolist()]
        self.bad.zero_()
        return paths


def report_bad(dataset: Images) -> None:
    """Log the files that were skipped in this epoch, if any."""
    paths = dataset.take_bad()
    if paths:
        shown = "\n  ".join(map(printable, paths[:20])) + ("\n  ..." if len(paths) > 20 else "")
        log.warning(f"skipped {len(paths)} images that cannot be decoded:\n  {shown}")


@contextlib.contextmanager
def bad_listed(*datasets: Images | None) -> Iterator[None]:
    """Whatever ends what is inside, a signal or an error too, `report_bad` has its say about each dataset."""
    try:
        yield
    finally:
        for dataset in filter(None, datasets):
            report_bad(dataset)


class TrainSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) keys for one rank; the order comes from (seed, epoch).

    Each optimizer step takes the next batch_size * accum_iter * world_size images of the order, whichever way these
    three make up the product; what does not fill a step at the end is dropped. Raises UserError where nothing does.
    """

    def __init__(self, n_images: int, batch_size: int, accum_iter: int, env: Dist, seed: int) -> None:
        self.n_images, self.batch_size, self.env, self.seed = n_images, batch_size, env, seed
        effective_batch = batch_size * accum_iter * env.world_size
        self.n_batches = n_images // effective_batch * accum_iter
        if self.n_batches == 0:
            raise UserError(
                f"{n_images} training images do not fill one step of {effective_batch} (batch_size {batch_size} x "
                f"accum_iter {accum_iter} x {env.world_size} processes): lower --batch_size"
            )
        self.epoch = self.first = 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch that the next pass over the sampler belongs to, and the batch that it starts at."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the pass starts."""
        return self.n_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = rng.image_order(self.seed, self.epoch, self.n_images)
        for i in range(self.first, self.n_batches):
            first = (i * self.env.world_size + self.env.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[first : first + self.batch_size]]
