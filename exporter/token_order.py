"""Video to tokens and back, raster order to tile order and back: index arithmetic only.

`Tiling.order` lists the raster index of each tile-order position, `Tiling.inverse` undoes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Triple = tuple[int, int, int]


def permute_tokens(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows of x [B, N, ...] in the given order: position i of the result is x[:, order[i]]."""
    return x.index_select(1, order)


def patches_of(video: torch.Tensor, grid: Triple, patch: Triple) -> torch.Tensor:
    """[B, C, f, h, w] to patches in raster order [B, V, P], features in Conv3d's order (C, pt, ph, pw)."""
    (t, h, w), (pt, ph, pw) = grid, patch
    batch, channels = video.shape[:2]
    cells = video.reshape(batch, channels, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return cells.reshape(batch, t * h * w, channels * pt * ph * pw)


def video_of(patches: torch.Tensor, grid: Triple, patch: Triple, *, channels_first: bool = True) -> torch.Tensor:
    """Patches in raster order [B, V, P] back to [B, C, f, h, w].

    Features are in the order (C, pt, ph, pw), or (pt, ph, pw, C) unless `channels_first`.
    """
    (t, h, w), (pt, ph, pw) = grid, patch
    batch = patches.shape[0]
    if channels_first:
        cells = patches.reshape(batch, t, h, w, -1, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
    else:
        cells = patches.reshape(batch, t, h, w, pt, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return cells.reshape(batch, -1, t * pt, h * ph, w * pw)
