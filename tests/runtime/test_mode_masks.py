"""Packed masks of candidates against the masks that the tiling makes."""

from __future__ import annotations

import numpy as np
import pytest

from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, MultiDiagonal, Skip, Stripe
from svdit.plans.tiles import Tiling
from svdit.runtime.mode_masks import ModeMasks


@pytest.mark.parametrize("text", [0, 130])
def test_rows_masks_and_sparsity_are_the_tilings(text):
    tiling = Tiling(Geometry((3, 5, 7), text, "after" if text else "none", 2, 2, 64), (2, 2, 4))
    columns = [[Stripe(columns=[[n, n + 1]]) for n in (2 * layer, 2 * layer + 1)] for layer in range(2)]
    shared = (Skip(), Diagonal(frames=1, rows=0), MultiDiagonal(rows=0, cols=0))
    masks = ModeMasks((*shared, tuple(tuple(row) for row in columns)), tiling)
    assert len(masks.bits) == 3 + 4, "a pattern of every head is kept once"
    tiles = np.array([0, 3, tiling.num_tiles - 1])
    for layer in range(2):
        rows = masks.rows(layer, tiles)
        assert rows.shape == (2, 4, 3, tiling.num_tiles) and rows.dtype == bool
        for head in range(2):
            for mode, pattern in enumerate((*shared, columns[layer][head])):
                mask = tiling.mask(pattern)
                np.testing.assert_array_equal(rows[head, mode], mask[tiles])
                np.testing.assert_array_equal(masks.mask(layer, head, mode), mask)
                assert masks.sparsity[layer, head, mode] == pytest.approx(1 - tiling.density(mask))
    assert masks.mask(1, 0, 4).all(), "the mode after the last is full"
