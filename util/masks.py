"""Which patches are kept: K from the mask ratio, and the noise that chooses them. A new mask strategy is added here.

Letters: N batch, h x w grid of patches, L = h * w, K kept patches. A strategy is a function
(n, (h, w), mask_ratio, device) -> noise [N, L]; of each image the K patches of least noise are kept, in order of noise.
"""

import functools
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


LEAST_BLOCK, ASPECT = 16, 0.3  # patches of a rectangle, and its least height / width; the greatest is 1 / ASPECT
N_BLOCKS = 96  # rectangles drawn; at a ratio of 0.75 some 5 are used


def block(n: int, grid: tuple[int, int], mask_ratio: float, device: torch.device) -> torch.Tensor:
    """(N, (h, w), ratio, device) -> noise [N, L]: whole rectangles are removed, one after the other, until the share is
    reached (BEiT, Bao et al. 2021, algorithm 1; table 1f of the paper).

    A rectangle has from 16 patches to all that are to be removed (uniform), height / width log-uniform in [0.3, 1/0.3],
    and lies anywhere in the grid; where it does not fit, the next is taken. To make the count exact, the last one
    loses rows or columns from one of its sides. Raises UserError where no rectangle fits the grid.
    """
    height, width = grid
    n_removed = height * width - kept_patches(height * width, mask_ratio)
    least = min(LEAST_BLOCK, max(n_removed, 1))  # a small grid has no room for more
    if not _fits(grid, least):
        raise UserError(
            f"a grid of {height} x {width} patches is too narrow for --mask block, whose rectangles have {least} "
            f"patches and are at most {1 / ASPECT:.1f} times as long as wide: choose --mask random"
        )
    area, aspect, top, left = torch.rand(4, n, N_BLOCKS, 1, device=device)
    area = least + area * (n_removed - least)
    h, w = _sides(area, ASPECT ** (2 * aspect - 1))
    top, left = (top * (height - h + 1)).floor(), (left * (width - w + 1)).floor()
    row = torch.arange(height, device=device).repeat_interleave(width)
    column = torch.arange(width, device=device).repeat(height)
    inside = (row >= top) & (row < top + h) & (column >= left) & (column < left + w) & (h <= height) & (w <= width)
    # [N, L]: the number of the rectangle that removes a patch, N_BLOCKS where none does
    order = torch.where(inside, torch.arange(N_BLOCKS, device=device)[:, None], N_BLOCKS).amin(dim=1)
    # within a rectangle row by row or column by column, from either end: the last one stays a block when it is cut
    places = torch.stack([row * width + column, column * height + row])
    places = torch.cat([places, height * width - 1 - places])[torch.randint(4, (n,), device=device)]
    return 1 - (order + (places + 1) / (height * width)) / (N_BLOCKS + 1)  # the first of the first is removed first


def _sides(area: torch.Tensor, aspect: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches and height / width -> whole sides (height, width)."""
    return (area * aspect).sqrt().round(), (area / aspect).sqrt().round()


@functools.cache
def _fits(grid: tuple[int, int], area: int) -> bool:
    """Whether a rectangle of that many patches, of any aspect that is drawn, lies within the grid."""
    h, w = _sides(torch.tensor(float(area)), ASPECT ** torch.linspace(-1, 1, 1001))
    return bool(((h <= grid[0]) & (w <= grid[1])).any())


def grid(n: int, grid: tuple[int, int], mask_ratio: float, device: torch.device) -> torch.Tensor:
    """(N, (h, w), 0.75, device) -> noise [N, L]: of every 2 x 2 patches the upper left one is kept, in every image, so
    nothing is drawn (table 1f of the paper, which does not state which one). Raises UserError for other ratios, and
    for a grid of odd sides.
    """
    height, width = grid
    if abs(mask_ratio - 0.75) > 1e-6 or height % 2 or width % 2:
        raise UserError(
            f"--mask grid keeps one of every 2 x 2 patches, but mask_ratio is {mask_ratio} and the grid {height} x "
            f"{width}: choose --mask_ratio 0.75 and an even number of patches on both sides, or --mask random"
        )
    row, column = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    removed = ((row % 2 + column % 2) > 0).flatten()
    place = torch.arange(height * width, device=device) / (height * width)
    return ((removed + place) / 2).expand(n, -1)  # in each set in image order


MASKS: dict[str, Callable[[int, tuple[int, int], float, torch.device], torch.Tensor]] = {
    "random": random,
    "block": block,
    "grid": grid,
}
