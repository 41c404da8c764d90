"""Randomness as a pure function of seed and purpose: the same keys repeat, other keys have nothing in common."""

import itertools
import random

import numpy as np
import pytest
import torch

from util import rng


def draws() -> tuple[float, float, float]:
    """One number from each generator that augmentation draws from."""
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def after(seed_function, *keys: int) -> tuple[float, float, float]:
    draws()  # what was drawn before plays no part
    seed_function(*keys)
    return draws()


SEEDERS = [(rng.seed_sample, 3), (rng.seed_step, 3), (rng.seed_init, 1)]


@pytest.mark.parametrize("n_images", [0, 1, 2, 1000])
def test_image_order_is_a_permutation(n_images):
    assert sorted(rng.image_order(0, 0, n_images)) == list(range(n_images))


def test_image_order_repeats_for_the_same_seed_and_epoch_whatever_was_drawn():
    first = rng.image_order(3, 5, 100)
    torch.manual_seed(123)
    assert rng.image_order(3, 5, 100) == first


def test_image_order_leaves_the_generators_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    rng.image_order(0, 0, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_image_order_differs_by_epoch_and_seed():
    orders = [rng.image_order(seed, epoch, 100) for seed in range(5) for epoch in range(5)]
    assert len(set(map(tuple, orders))) == 25
    # two random permutations agree in one place on average, of 100; ten is a chance of 1e-7
    for one, other in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


@pytest.mark.parametrize(("seed_function", "n_keys"), SEEDERS)
def test_the_same_keys_repeat_the_draws_of_every_generator(seed_function, n_keys):
    keys = (7, 8, 9)[:n_keys]
    assert after(seed_function, *keys) == after(seed_function, *keys)


@pytest.mark.parametrize(("seed_function", "n_keys"), SEEDERS)
def test_every_key_changes_the_draws_of_every_generator(seed_function, n_keys):
    first = after(seed_function, *[7] * n_keys)
    for position in range(n_keys):
        keys = [7] * n_keys
        keys[position] = 8
        assert not set(first) & set(after(seed_function, *keys))


def test_keys_are_not_interchangeable():
    """(seed 1, epoch 2) is not (seed 2, epoch 1), nor (epoch 1, image 23) what (epoch 12, image 3) is."""
    seen = {after(rng.seed_sample, *keys) for keys in itertools.permutations((1, 2, 3))}
    seen |= {after(rng.seed_sample, 0, 1, 23), after(rng.seed_sample, 0, 12, 3)}
    assert len(seen) == 8


def test_purposes_with_equal_numbers_never_share_draws():
    assert not set(after(rng.seed_sample, 1, 2, 3)) & set(after(rng.seed_step, 1, 2, 3))
    assert not set(after(rng.seed_sample, 0, 0, 0)) & set(after(rng.seed_init, 0))


def test_draws_of_neighbouring_keys_are_unrelated():
    # 40 x 40 neighbours in epoch and index
    grid = np.array([[after(rng.seed_sample, 0, epoch, index) for index in range(40)] for epoch in range(40)])
    for generator in range(3):
        values = grid[:, :, generator]
        allowed = 5 / np.sqrt(values.size)  # five standard errors of a correlation
        assert abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < allowed
        assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < allowed
        assert abs(values.mean() - 0.5) < 5 / np.sqrt(12 * values.size)
    # nor do the three generators follow each other
    assert np.abs(np.corrcoef(grid.reshape(-1, 3).T) - np.eye(3)).max() < allowed
