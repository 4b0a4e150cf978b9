"""Pooled attention maps against sums over tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from svdit.plans.geometry import Geometry
from svdit.plans.maps import coarser, kept_parts, map_bins, pooled
from svdit.plans.patterns import Diagonal
from svdit.plans.tiles import Tiling

CASES = {
    "border tiles": (Geometry((5, 7, 9), 0, "none", 1, 2, 64), (2, 3, 4), 12),
    "text before": (Geometry((4, 6, 6), 150, "before", 1, 2, 64), (1, 2, 3), 12),
    "text after": (Geometry((4, 6, 6), 150, "after", 1, 2, 64), (1, 2, 3), 8),
    "more frames than bins": (Geometry((9, 4, 4), 0, "none", 1, 2, 64), (1, 2, 2), 4),
}


def token_map(tokens: int, seed: int = 0) -> np.ndarray:
    """float64 [2, N, N], rows sum to 1."""
    mass = np.random.default_rng(seed).random((2, tokens, tokens)) ** 4
    return mass / mass.sum(-1, keepdims=True)


def tile_map(mass: np.ndarray, tiling: Tiling) -> np.ndarray:
    edges = tiling.tile_offsets[:-1]
    rows = np.add.reduceat(mass, edges, axis=1) / tiling.sizes[:, None]
    return np.add.reduceat(rows, edges, axis=2)


@pytest.mark.parametrize("case", CASES)
def test_pooling_is_the_mean_over_the_query_tokens_of_a_bin(case):
    geometry, tile, side = CASES[case]
    tiling = Tiling(geometry, tile)
    bins, mass = map_bins(tiling, side), token_map(geometry.tokens)
    found = pooled(tile_map(mass, tiling), tiling.sizes, bins)
    edges = [*tiling.tile_offsets[bins], geometry.tokens]
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        for j, (c, d) in enumerate(itertools.pairwise(edges)):
            np.testing.assert_allclose(found[:, i, j], mass[:, a:b, c:d].sum(2).mean(1), rtol=1e-12)
    np.testing.assert_allclose(found.sum(-1), 1.0)


@pytest.mark.parametrize("case", CASES)
def test_bins_divide_frames_or_hold_whole_ones(case):
    geometry, tile, side = CASES[case]
    tiling = Tiling(geometry, tile)
    bins = map_bins(tiling, side)
    assert len(bins) - tiling.num_text_tiles <= side
    plane = tiling.tile_grid[1] * tiling.tile_grid[2]
    video = bins[np.isin(bins, np.arange(tiling.num_tiles)[tiling.video_slice])] - tiling.first_video_tile
    runs = np.diff(video)
    assert len(set(runs)) == 1 and (plane % runs[0] == 0 or runs[0] % plane == 0)
    text = set(range(tiling.num_tiles)) - set(range(tiling.num_tiles)[tiling.video_slice])
    assert text <= set(bins.tolist())


def test_small_grids_are_kept_whole():
    tiling = Tiling(Geometry((16, 24, 24), 0, "none", 8, 4, 64), (4, 4, 4))
    np.testing.assert_array_equal(map_bins(tiling), np.arange(144))


def test_a_large_grid_keeps_several_bins_a_frame():
    tiling = Tiling(Geometry((33, 45, 80), 256, "after", 60, 24, 128), (1, 8, 16))
    bins = map_bins(tiling)
    assert len(bins) == 33 * 3 + 2 and set(np.diff(bins[:99])) == {10}


def test_rows_that_were_not_measured_do_not_count():
    tiling = Tiling(Geometry((4, 4, 4), 0, "none", 1, 2, 64), (1, 2, 2))
    bins = map_bins(tiling, 4)
    mass = tile_map(token_map(64), tiling)
    mass[:, [1, 4, 5, 6, 7]] = 0.0
    found = pooled(mass, tiling.sizes, bins)
    np.testing.assert_allclose(found[:, 0], np.add.reduceat(mass[:, [0, 2, 3]].mean(1), bins, axis=-1))
    assert not found[:, 1].any() and found[:, 2].all()


@pytest.mark.parametrize("case", CASES)
def test_kept_parts_count_token_pairs(case):
    geometry, tile, side = CASES[case]
    tiling = Tiling(geometry, tile)
    bins, mask = map_bins(tiling, side), tiling.mask(Diagonal(frames=1, rows=0))
    tokens = mask.repeat(tiling.sizes, 0).repeat(tiling.sizes, 1)
    found = kept_parts(mask, tiling, bins)
    edges = [*tiling.tile_offsets[bins], geometry.tokens]
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        for j, (c, d) in enumerate(itertools.pairwise(edges)):
            assert found[i, j] == pytest.approx(tokens[a:b, c:d].mean())


@pytest.mark.parametrize("position", ["before", "after"])
def test_coarser_maps_are_those_of_the_tiles(position):
    """Stored bins of 15 of 30 tiles a frame, then one bin a frame: the same as pooling the tiles at once."""
    tiling = Tiling(Geometry((73, 6, 5), 150, position, 1, 1, 64), (1, 1, 1))
    mass = np.random.default_rng(0).random((1, tiling.num_tiles, tiling.num_tiles))
    mass /= mass.sum(-1, keepdims=True)
    bins = map_bins(tiling)
    assert len(bins) == 73 + 2
    found, few = coarser(pooled(mass, tiling.sizes, bins), tiling, 40)
    assert len(few) == 37 + 2
    np.testing.assert_allclose(found, pooled(mass, tiling.sizes, few))
