"""Raster order to tile order and back: index arithmetic only.

`Tiling.order` lists the raster index of each tile-order position, `Tiling.inverse` undoes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def permute_tokens(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows of x [B, N, ...] in the given order: position i of the result is x[:, order[i]]."""
    return x.index_select(1, order)
