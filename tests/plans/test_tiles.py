"""Tile order, sizes and text tiles against token-by-token counting."""

from __future__ import annotations

import json

import numpy as np
import pytest

from svdit.plans.errors import SvditError
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal
from svdit.plans.schema import loads
from svdit.plans.tiles import Tiling
from tests.plans.random_plans import random_plan
from tests.reference import tile_coordinates, tile_order


@pytest.mark.parametrize("seed", range(30))
def test_order_and_sizes_equal_brute_force(seed):
    data = random_plan(seed)
    tiling = loads(json.dumps(data)).tiling()
    geometry = tiling.geometry
    assert np.array_equal(tiling.order, tile_order(geometry.grid, tiling.tile))
    assert np.array_equal(tiling.order[tiling.inverse], np.arange(geometry.video_tokens))
    tiles, counts = np.unique(tile_coordinates(geometry.grid, tiling.tile), axis=0, return_counts=True)
    assert len(tiles) == tiling.num_video_tiles
    assert np.array_equal(tiling.sizes[tiling.video_slice], counts)
    assert int(tiling.tile_offsets[-1]) == geometry.tokens
    assert tiling.sizes.dtype == tiling.tile_offsets.dtype == np.int32
    assert tiling.order.dtype == tiling.inverse.dtype == np.int64
    assert 1 <= tiling.sizes.min() <= tiling.sizes.max() <= 128


def tiling_with_text(text, position):
    return Tiling(Geometry((2, 3, 4), text, position, 1, 1, 64), (1, 2, 4))


@pytest.mark.parametrize(
    ("text", "position", "sizes", "first_video_tile"),
    [
        (0, "none", [8, 4, 8, 4], 0),
        (5, "after", [8, 4, 8, 4, 5], 0),
        (5, "before", [5, 8, 4, 8, 4], 1),
        (128, "before", [128, 8, 4, 8, 4], 1),
        (300, "after", [8, 4, 8, 4, 128, 128, 44], 0),
        (300, "before", [128, 128, 44, 8, 4, 8, 4], 3),
    ],
)
def test_text_tiles(text, position, sizes, first_video_tile):
    tiling = tiling_with_text(text, position)
    assert tiling.sizes.tolist() == sizes
    assert tiling.first_video_tile == first_video_tile
    assert tiling.text_first == (position == "before")
    assert (tiling.num_tiles, tiling.num_video_tiles) == (len(sizes), 4)


def test_text_rows_and_columns_of_a_mask():
    mask = tiling_with_text(130, "before").mask(Diagonal(rows=0))
    expected = np.eye(6, dtype=bool)
    expected[:2, :] = expected[:, :2] = True
    assert np.array_equal(mask, expected)


def test_tile_order_by_hand():
    """Grid 1 x 3 x 4 in tiles of 1 x 2 x 3: 6, 2, 3 and 1 tokens."""
    tiling = Tiling(Geometry((1, 3, 4), 0, "none", 1, 1, 64), (1, 2, 3))
    assert tiling.order.tolist() == [0, 1, 2, 4, 5, 6, 3, 7, 8, 9, 10, 11]
    assert tiling.tile_offsets.tolist() == [0, 6, 8, 11, 12]


def test_density_of_the_published_shape():
    """HunyuanVideo 720p, own frame and its neighbours: (33 * 3 - 2) of 33 * 33 frame pairs, and the text."""
    tiling = Tiling(Geometry((33, 45, 80), 256, "after", 1, 1, 128), (1, 8, 16))
    video, text = 33 * 45 * 80, 256
    kept = (33 * 3 - 2) * (45 * 80) ** 2 + 2 * video * text + text**2
    assert tiling.num_tiles == 33 * 6 * 5 + 2
    assert tiling.density(tiling.mask(Diagonal(frames=1))) == pytest.approx(kept / (video + text) ** 2, rel=1e-12)


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        ((2, 8, 9), "tile: got 2 x 8 x 9 = 144 tokens; expected at most 128 tokens"),
        ((1, 0, 8), r"tile\[1\]: got 0; expected an integer of at least 1"),
        ((8, 16), "tile: got 2 entries; expected a list of 3 integers"),
        (128, "tile: got 128; expected a list of 3 integers"),
        ((1, 8, 16.0), r"tile\[2\]: got 16.0; expected an integer of at least 1"),
    ],
)
def test_wrong_tiles_are_named(tile, message):
    with pytest.raises(SvditError, match=message):
        Tiling(Geometry((2, 3, 4), 0, "none", 1, 1, 64), tile)
