"""Randomness as a pure function: every draw is decided by a seed and by what it is drawn for.

The order of images comes from (seed, epoch), an image's augmentation from (seed, epoch, index), a step's masks, mixing
and stochastic depth from (seed, step, rank). No generator state outlives its purpose, so nothing has to be saved, and a
run does not depend on the number of loader workers.
"""

import random
from array import array

import numpy as np
import torch

_ORDER, _SAMPLE, _STEP, _INIT = range(4)  # one stream a purpose, so that equal numbers never meet


def _derive(*keys: int) -> int:
    """Keys -> a seed of 63 bits, without visible relation between neighbouring keys."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))


def image_order(seed: int, epoch: int, n_images: int) -> array:
    """A permutation of 0 .. n_images - 1; no list, whose numbers take five times the memory."""
    generator = torch.Generator().manual_seed(_derive(seed, _ORDER, epoch))
    order = array("q")
    order.frombytes(torch.randperm(n_images, generator=generator).numpy().view(np.uint8))
    return order


def stream_generator(seed: int, epoch: int) -> torch.Generator:
    """What a DataLoader seeds the workers of a stream with, for one epoch."""
    return torch.Generator().manual_seed(_derive(seed, _ORDER, epoch))


def seed_sample(seed: int, epoch: int, index: int) -> None:
    """Seed all CPU generators that transforms draw from (random, numpy, torch) for one image of one epoch."""
    key = _derive(seed, _SAMPLE, epoch, index)
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.default_generator.manual_seed(key)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed all generators, the device's included, for one forward pass: masks, mixing, stochastic depth.

    `step` counts forward passes from the start of the run. Costs no synchronisation with the device.
    """
    _seed_all(_derive(seed, _STEP, step, rank))


def seed_init(seed: int) -> None:
    """Seed all generators for building the model: the same weights on every rank."""
    _seed_all(_derive(seed, _INIT))


def _seed_all(key: int) -> None:
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.manual_seed(key)
