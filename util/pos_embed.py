"""Position embeddings: the fixed 2-D sin-cos table, and moving a trained table to another grid.

Letters: D width, L patches (L = h * w), T prefix tokens (the class token).
"""

import math
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import nn

from util.errors import UserError
from util.log import log


def get_2d_sincos_pos_embed(embed_dim: int, grid_size: int | tuple[int, int], cls_token: bool = False) -> np.ndarray:
    """(D, h, w) -> [L, D], or [1 + L, D] with a zero row first for the class token; float32.

    The first D/2 channels encode the column, the last D/2 the row. `grid_size` is in patches, one number for a square.
    Raises ValueError when D is not divisible by 4. Source: paper, appendix A.1 (sine-cosine positions).
    """
    height, width = (grid_size, grid_size) if np.ndim(grid_size) == 0 else grid_size
    table = get_2d_sincos_pos_embed_from_grid(embed_dim, np.meshgrid(np.arange(width), np.arange(height)))
    if cls_token:
        table = np.concatenate([np.zeros((1, embed_dim)), table])
    return table.astype(np.float32)


def get_2d_sincos_pos_embed_from_grid(embed_dim: int, grid: ArrayLike) -> np.ndarray:
    """(D, columns and rows [2, ...]) -> [M, D], float64, of M positions. Raises ValueError as the table of a grid."""
    if embed_dim % 4:
        raise ValueError(f"embed_dim {embed_dim} must be divisible by 4: sine and cosine, for row and column")
    columns, rows = (get_1d_sincos_pos_embed_from_grid(embed_dim // 2, grid[axis]) for axis in (0, 1))
    return np.concatenate([columns, rows], axis=1)


def get_1d_sincos_pos_embed_from_grid(embed_dim: int, pos: ArrayLike) -> np.ndarray:
    """(D, positions of any shape, M in all) -> [M, D], float64: sines, then cosines, of position / 10000^(2i / D) for
    i = 0 .. D/2 - 1.

    Raises ValueError when D is odd. Source: Vaswani et al. 2017, section 3.5, where sines and cosines alternate.
    """
    if embed_dim % 2:
        raise ValueError(f"embed_dim {embed_dim} must be even: half of it sines, half cosines")
    frequencies = 10000.0 ** (-np.arange(embed_dim // 2) / (embed_dim / 2))
    angles = np.outer(pos, frequencies)  # flattens the positions
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def interpolate_pos_embed(
    model: nn.Module, state_dict: dict[str, torch.Tensor], source_grid: tuple[int, int] | None = None
) -> None:
    """[1, T + L, D] -> [1, T + L', D]: resize `state_dict['pos_embed']` in place to the grid of `model`.

    Bicubic, prefix tokens unchanged. `source_grid` is (height, width) in patches; None infers it: a square where the
    number of patches is one, else the model's own grid: `patch_embed.grid_size`, or a square where there is no such
    attribute. Raises UserError where neither fits. What has no such shape stays as it is: whoever loads it names the
    shape.
    """
    old, n_new = state_dict.get("pos_embed"), int(model.patch_embed.num_patches)
    target_grid = tuple(getattr(model.patch_embed, "grid_size", None) or [math.isqrt(n_new)] * 2)
    n_prefix = model.pos_embed.shape[1] - n_new
    if old is None or old.ndim != 3 or old.shape[0] != 1 or old.shape[1] <= n_prefix:
        return
    n_old = old.shape[1] - n_prefix
    if math.prod(target_grid) != n_new:
        if n_old == n_new:
            return
        raise UserError(f"the model has {n_new} patches, no square, and no patch_embed.grid_size: say their grid there")
    expected = "the grid it was trained with, by its own arguments"
    if source_grid is None:
        side = math.isqrt(n_old)
        source_grid = (side, side) if side * side == n_old else target_grid
        expected = "a square or the model's grid"
    if source_grid[0] * source_grid[1] != n_old:
        raise UserError(
            f"the checkpoint has positions for {n_old} patches, which do not make {expected} ({source_grid[0]} x "
            f"{source_grid[1]}): build the model with the --input_size that the checkpoint was trained with"
        )
    if tuple(source_grid) == target_grid:
        return
    prefix, patches = old[:, :n_prefix], old[:, n_prefix:]
    grid = patches.reshape(1, *source_grid, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=target_grid, mode="bicubic", align_corners=False)
    state_dict["pos_embed"] = torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)


def resample(model: nn.Module, img_size: int | tuple[int, int], patch_size: int) -> None:
    """Change a model in place to images of `img_size` (a side, or height and width) and patches of `patch_size` pixels.

    All positions by `interpolate_pos_embed`, the fixed ones too: so they stay in the range that the model was trained
    on, which sines and cosines computed for a larger grid would leave. The kernel of the patch projection by timm's
    `resample_patch_embed` (Beyer et al. 2023, FlexiViT, section 3.4).
    """
    embed, height_width = model.patch_embed, (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if (height_width, patch_size) == (tuple(embed.img_size), embed.patch_size[0]):
        return
    before, source_grid = f"{embed.img_size} pixels in patches of {embed.patch_size[0]}", tuple(embed.grid_size)
    embed.set_input_size(img_size=height_width, patch_size=patch_size)
    for name in ("pos_embed", "decoder_pos_embed"):
        if (old := getattr(model, name, None)) is not None:
            weights = {"pos_embed": old.detach()}
            new_shape = SimpleNamespace(patch_embed=embed, pos_embed=torch.empty(1, 1 + embed.num_patches, 1))
            interpolate_pos_embed(new_shape, weights, source_grid)
            setattr(model, name, nn.Parameter(weights["pos_embed"], requires_grad=old.requires_grad))
    log.info(f"resampled from {before} to {height_width} pixels in patches of {patch_size}")
