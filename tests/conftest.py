"""Fixtures: recorded arrays and recipes for the numerical tests, from tests/golden; signals as they were."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

# a shell that starts the tests in its background has them ignore Ctrl-C, which some of them send
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden"

# the models of most tests are so small that threads cost more than they bring
torch.set_num_threads(1)


class Golden(dict):
    """Name -> tensor, of one recorded file; `config` is its configuration, `group` the names below a prefix."""

    def __init__(self, name: str) -> None:
        arrays = dict(np.load(GOLDEN / f"{name}.npz"))
        self.config = json.loads(str(arrays.pop("config", "{}")))
        super().__init__({key: torch.from_numpy(array) for key, array in arrays.items()})

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix + "/"): value for key, value in self.items() if key.startswith(prefix + "/")}


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Name of a file in tests/golden, without .npz -> its content."""
    return Golden


@pytest.fixture(scope="session")
def recipe() -> dict:
    """What the original does with full-size models: shapes, decay, learning rates, initial statistics."""
    return json.loads((GOLDEN / "recipe.json").read_text())


@pytest.fixture(autouse=True)
def signals_as_before():
    """A script on its way out obeys no signals, and some tests run scripts in this process."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
