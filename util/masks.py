"""Which patches are kept: K from the mask ratio, and the noise that chooses them. A new mask strategy is added here.

Letters: N batch, h x w grid of patches, L = h * w, K kept patches. A strategy is a function
(n, (h, w), mask_ratio, device) -> noise [N, L]; of each image the K patches of least noise are kept, in order of noise.
"""

import math
from collections.abc import Callable

import torch

from util.errors import UserError


def kept_patches(num_patches: int, mask_ratio: float) -> int:
    """(L, ratio) -> K = floor(L * (1 - ratio)), with a slack of 1e-6 patches for rounding: 100 at ratio 0.9 keep 10,
    although 100 * (1 - 0.9) < 10 in floating point.

    Raises UserError where no patch would be kept, or the ratio is not in [0, 1).
    """
    if not 0 <= mask_ratio < 1:
        raise UserError(f"mask_ratio {mask_ratio} is not a share of patches to remove: choose 0 < mask_ratio < 1")
    kept = math.floor(num_patches * (1 - mask_ratio) + 1e-6)
    if kept == 0:
        raise UserError(
            f"mask_ratio {mask_ratio} keeps none of {num_patches} patches, so the encoder would see nothing: "
            f"choose at most {math.floor(10**4 * (1 - 1 / num_patches)) / 10**4}"
        )
    return kept


def check_mask_ratio(num_patches: int, mask_ratio: float) -> None:
    """Raise UserError where the ratio keeps none of the patches, or removes none: the loss would be 0/0."""
    if kept_patches(num_patches, mask_ratio) == num_patches:
        raise UserError(
            f"mask_ratio {mask_ratio} removes none of {num_patches} patches, so there is nothing to predict: "
            f"choose at least {math.ceil(10**4 / num_patches) / 10**4}"
        )


def random(n: int, grid: tuple[int, int], mask_ratio: float, device: torch.device) -> torch.Tensor:
    """(N, (h, w), ratio, device) -> noise [N, L], uniform in [0, 1): every set of K patches is equally likely, so that
    no place is favoured (paper, section 3, "Masking"; the best strategy of its table 1f).
    """
    return torch.rand(n, grid[0] * grid[1], device=device)


MASKS: dict[str, Callable[[int, tuple[int, int], float, torch.device], torch.Tensor]] = {"random": random}
