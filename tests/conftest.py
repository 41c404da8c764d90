"""Fixtures of the numerical tests: recorded arrays and recipes, from tests/golden."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

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
