"""Position embeddings: the fixed 2-D sin-cos table, and moving a trained table to another grid.

Letters: D width, L patches (L = h * w), T prefix tokens (the class token).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from util.errors import UserError


def get_2d_sincos_pos_embed(embed_dim: int, grid_size: int | tuple[int, int], cls_token: bool = False) -> np.ndarray:
    """(D, h, w) -> [L, D], or [1 + L, D] with a zero row first for the class token; float32.

    The first D/2 channels encode the column, the last D/2 the row. Each half holds sines then cosines of
    position / 10000^(2i / (D/2)), i = 0 .. D/4 - 1. `grid_size` is in patches, one number for a square.
    Raises ValueError when D is not divisible by 4. Source: paper, appendix A.1 (sine-cosine positions).
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim {embed_dim} must be divisible by 4: sine and cosine, for row and column")
    height, width = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    table = np.concatenate([_sincos(embed_dim // 2, columns), _sincos(embed_dim // 2, rows)], axis=1)
    if cls_token:
        table = np.concatenate([np.zeros((1, embed_dim)), table])
    return table.astype(np.float32)


def _sincos(dim: int, positions: np.ndarray) -> np.ndarray:
    """[h, w] -> [L, dim], float64: sines of all frequencies, then cosines."""
    frequencies = 10000.0 ** (-np.arange(dim // 2) / (dim / 2))
    angles = np.outer(positions.reshape(-1), frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def interpolate_pos_embed(
    model: nn.Module, state_dict: dict[str, torch.Tensor], source_grid: tuple[int, int] | None = None
) -> None:
    """[1, T + L, D] -> [1, T + L', D]: resize `state_dict['pos_embed']` in place to the grid of `model`.

    Bicubic, prefix tokens unchanged. `source_grid` is (height, width) in patches; None infers it: a square where the
    number of patches is one, else the model's own grid. Raises UserError where neither fits. What has no such shape
    stays as it is: whoever loads it names the shape.
    """
    old = state_dict.get("pos_embed")
    target_grid = tuple(model.patch_embed.grid_size)
    n_prefix = model.pos_embed.shape[1] - model.patch_embed.num_patches
    if old is None or old.ndim != 3 or old.shape[0] != 1 or old.shape[1] <= n_prefix:
        return
    n_old = old.shape[1] - n_prefix
    expected = "the grid it was trained with, by its own arguments"
    if source_grid is None:
        side = int(n_old**0.5)
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
