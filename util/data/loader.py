"""From a dataset to batches on the device: loader workers send pixels, the device mirrors and normalises."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Dataset, IterableDataset

from util import rng
from util.cli import DataOptions
from util.data import measure
from util.data.bands import RGB, TOP, Bands, collate
from util.data.datasets import Images, TrainSampler, report_bad
from util.data.decode import JPEG_DECODER
from util.data.gpu_decode import EncodedImages, check_gpu_decode
from util.data.readers import Stream, labelled_images
from util.data.workers import available_workers, batches, open_loader, worker_options
from util.dist import Dist, check_ranks_agree
from util.errors import UserError
from util.log import log


def normalise(pixels: torch.Tensor, mirror: torch.Tensor, bands: Bands = RGB) -> torch.Tensor:
    """Pixels [N, H, W, C] and [N] bool -> [N, C, H, W] float32, by the mean and deviation of `bands`; some mirrored.

    In memory it stays [N, H, W, C], of which patches are cheaper to take.
    """
    (n, height, width, n_channels), dtype = pixels.shape, pixels.dtype
    pixels = pixels.view(torch.int16) if dtype == torch.uint16 else pixels  # not all devices can mirror it
    pixels = torch.where(mirror[:, None, None, None], pixels.flip(2), pixels).view(dtype)
    mean, std = (_row(values, width, pixels.device) for values in (bands.mean, bands.std))
    imgs = pixels.view(n, height, width * n_channels).float().div_(TOP[dtype]).sub_(mean).div_(std)
    return imgs.view(n, height, width, n_channels).permute(0, 3, 1, 2)


@functools.cache  # a copy to the device in each step would make the host wait
def _row(channels: tuple[float, ...], width: int, device: torch.device) -> torch.Tensor:
    """[width * C]: the channels' values for a row of pixels; broadcasting three values by themselves is slow."""
    return torch.tensor(channels, device=device).repeat(width)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # pixels [N, H, W, C], to be mirrored [N], labels [N]


class DeviceLoader:
    """Iterates over (images [N, C, H, W] normalised by `bands`, labels [N]) on the device.

    `loader` yields batches on the host, which `to_device` turns into a Batch on the device. On CUDA this happens on a
    stream of its own: the host runs ahead of the device, so while an earlier batch is computed with.
    """

    def __init__(
        self,
        loader: Iterable,
        device: torch.device,
        to_device: Callable[..., Batch] | None = None,
        n_batches: int | None = None,
        bands: Bands = RGB,
    ) -> None:
        self.loader, self.device, self.bands = loader, device, bands
        self.to_device = to_device or _copy_to
        self.n_batches = len(loader) if n_batches is None else n_batches
        self.copies = _copy_stream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for host_batch in batches(self.loader):
            # not torch.cuda.stream(None), which fails where the accelerator is of another kind
            with torch.cuda.stream(self.copies) if self.copies else contextlib.nullcontext():
                batch = self.to_device(host_batch, self.device)
            if self.copies is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_stream(self.copies)
                for part in batch:
                    part.record_stream(current)  # its memory is not reused before the step is done with it
            pixels, mirror, labels = batch
            yield normalise(pixels, mirror, self.bands), labels


@functools.cache  # one for all loaders and passes: memory of a stream is not given to another
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _copy_to(batch: list[torch.Tensor], device: torch.device) -> Batch:
    pixels, mirror, labels = (part.to(device, non_blocking=True) for part in batch)
    return pixels, mirror, labels


def _bands_of(dataset: Dataset | Stream) -> Bands:
    """How its images, or those of the dataset that it is a subset of, are to be normalised."""
    return getattr(getattr(dataset, "dataset", dataset), "bands", RGB)


def train_loader(
    dataset: Images | Stream, sampler: TrainSampler, num_workers: int, pin_mem: bool, decode: str = "cpu",
    timeout_seconds: float = 0,
) -> DeviceLoader:  # fmt: skip
    """The batches that `sampler` says, from images in its order or from a stream in the stream's own.

    `decode`: cpu, or cuda to leave JPEGs to the GPU; UserError where the device or the recipe does not allow that.
    Workers that send nothing for `timeout_seconds` (0: any time) raise FailedError.
    """
    device, bands = sampler.env.device, _bands_of(dataset)
    options = worker_options(num_workers, pin_mem, device, timeout_seconds)
    log.info(f"JPEGs are decoded by {JPEG_DECODER}, the first that is here of simplejpeg, torchvision and Pillow")
    if isinstance(dataset, Stream):
        if decode == "cuda":
            raise UserError(
                "--decode cuda needs files, which this kind of --dataset keeps to itself: pass --decode cpu"
            )
        return DeviceLoader(StreamBatches(dataset, sampler, options), device, bands=bands)
    to_device, to_batch = None, collate
    if decode == "cuda":
        check_gpu_decode(dataset.transform, device)
        dataset = EncodedImages(dataset)
        to_device, to_batch = dataset.decode, dataset.collate
        options["pin_memory"] = False  # nvJPEG reads ordinary memory
    loader = open_loader(dataset, options, to_batch, batch_sampler=sampler, persistent_workers=num_workers > 0)
    return DeviceLoader(loader, device, to_device, bands=bands)


def eval_loader(
    dataset: Images | Stream, batch_size: int, env: Dist, sharded: bool, num_workers: int, pin_mem: bool,
    timeout_seconds: float = 0,
) -> DeviceLoader:  # fmt: skip
    """Every image once, in order; with `sharded`, once over all ranks together (shares of files differ by one)."""
    options = worker_options(num_workers, pin_mem, env.device, timeout_seconds)
    if isinstance(dataset, Stream):
        loader = open_loader(_Pass(dataset, 0, batch_size), options, collate)
        # a guess, for the progress: a stream need not tell its length, and shares are of whole shards
        n_batches = max(-(-len(dataset) // dataset.world_size // batch_size), 1)
        return DeviceLoader(loader, env.device, n_batches=n_batches, bands=_bands_of(dataset))
    indices = range(env.rank, len(dataset), env.world_size) if sharded else range(len(dataset))
    keep = num_workers > 0 and len(indices) > 0
    loader = open_loader(dataset, options, collate, sampler=indices, batch_size=batch_size, persistent_workers=keep)
    return DeviceLoader(loader, env.device, bands=_bands_of(dataset))


class Labelled(NamedTuple):
    """What a classifier is trained and evaluated on; only the last two where it is just evaluated."""

    train_set: Images | Stream | None
    sampler: TrainSampler | None
    train_loader: DeviceLoader | None
    val_set: Images | Stream
    val_loader: DeviceLoader

    def report_bad(self) -> None:
        """Log the files that were skipped since the last call."""
        for images in (self.train_set, self.val_set):
            if images is not None:
                report_bad(images)


def open_labelled(
    options: DataOptions, transforms: tuple[Callable | None, Callable], *, nb_classes: int, batch_size: int,
    accum_iter: int, env: Dist, seed: int, sharded: bool,
) -> Labelled:  # fmt: skip
    """Images and loaders of a classifier; `transforms` to train and to evaluate, None for the former evaluates only.

    `sharded`: the processes share the evaluation. Raises UserError, on all ranks, where the images do not fit.
    """
    bands = measure.chosen(options, transforms[0])
    train_set, val_set = labelled_images(
        options.data_path, options.dataset, (options.train_split, options.val_split), transforms, nb_classes, env,
        sharded, seed, options.skip_bad_images, options.val_path, bands.endings,
    )  # fmt: skip
    check_ranks_agree(env, {"images": [images and images.digest() for images in (train_set, val_set)]})
    measure.settle(bands, env, options.decode, *filter(None, (train_set, val_set)))
    num_workers = available_workers(options.num_workers, env)
    workers = num_workers, options.pin_mem
    val_loader = eval_loader(val_set, batch_size, env, sharded, *workers, options.loader_timeout)
    if train_set is None:
        return Labelled(None, None, None, val_set, val_loader)
    sampler = TrainSampler(len(train_set), batch_size, accum_iter, env, seed)
    loader = train_loader(train_set, sampler, *workers, options.decode, options.loader_timeout)
    log.info(f"{len(train_set)} images to train, {len(val_set)} to validate, {len(loader)} batches an epoch")
    return Labelled(train_set, sampler, loader, val_set, val_loader)


class _Pass(IterableDataset):
    """One pass over a stream, in lists of `batch_size` samples; a last one of fewer is left out with `drop_last`."""

    def __init__(self, stream: Stream, epoch: int, batch_size: int, drop_last: bool = False) -> None:
        self.stream, self.epoch, self.batch_size, self.drop_last = stream, epoch, batch_size, drop_last

    def __iter__(self) -> Iterator[list[tuple[torch.Tensor, bool, int]]]:
        samples = self.stream.iterate(self.epoch)
        while len(batch := list(itertools.islice(samples, self.batch_size))) > self.drop_last * (self.batch_size - 1):
            yield batch


class StreamBatches:
    """As many batches an epoch of a stream as `sampler` says, from the one on that it says; `options`: of DataLoader.

    The workers are new in each epoch, so that what they draw comes from (seed, epoch) alone.
    """

    def __init__(self, stream: Stream, sampler: TrainSampler, options: dict) -> None:
        self.stream, self.sampler, self.options = stream, sampler, options

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        epoch, first, n_batches = self.sampler.epoch, self.sampler.first, len(self.sampler)
        one_pass = _Pass(self.stream, epoch, self.sampler.batch_size, drop_last=True)
        loader = open_loader(one_pass, self.options, collate, generator=rng.stream_generator(self.sampler.seed, epoch))
        done = 0
        for done, batch in enumerate(itertools.islice(loader, n_batches), 1):
            if done > first or isinstance(batch, Exception):
                yield batch
        if done < n_batches:
            raise UserError(
                f"the dataset ended after {done} of {n_batches} batches: does it hold {len(self.stream)} images, each "
                "with its label, in at least one shard for each worker of each process? Lower --num_workers otherwise"
            )
