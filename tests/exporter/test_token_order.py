"""Tile order and back."""

from __future__ import annotations

import pytest
import torch

from svdit.exporter.token_order import permute_tokens
from svdit.plans.geometry import Geometry
from svdit.plans.tiles import Tiling
from tests.reference import tile_order


@pytest.mark.parametrize("grid,tile", [((3, 5, 7), (2, 2, 3)), ((1, 8, 16), (1, 8, 16)), ((4, 6, 6), (1, 4, 4))])
def test_round_trip_and_order(grid, tile):
    tiling = Tiling(Geometry(grid, 0, "none", 1, 1, 64), tile)
    order, inverse = (torch.from_numpy(x) for x in (tiling.order, tiling.inverse))
    raster = torch.arange(tiling.geometry.tokens).reshape(1, -1, 1).expand(2, -1, 3)
    tiled = permute_tokens(raster, order)
    assert tiled[0, :, 0].tolist() == tile_order(grid, tile).tolist()
    assert torch.equal(permute_tokens(tiled, inverse), raster)
