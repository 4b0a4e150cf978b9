"""Masks of other methods against their token-level definitions, and their choice rules by hand."""

from __future__ import annotations

import numpy as np
import pytest

from svdit.plans.baselines import METHODS, UNMEASURED, candidates, choice, sparse_density, unmeasured_plan
from svdit.plans.errors import SvditError
from svdit.plans.flops import mean_density
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, MultiDiagonal, pattern_from_json
from svdit.plans.search import Measurement
from svdit.plans.tiles import Tiling

GEOMETRY = Geometry((6, 8, 8), 0, "none", 2, 3, 64)
TILE = (2, 4, 4)


def tile_share(tiling: Tiling, keeps: np.ndarray) -> np.ndarray:
    """[nV, nV] kept share of token pairs, from a token mask [V, V] in raster order."""
    member = np.zeros((tiling.num_video_tiles, len(keeps)))
    member[np.repeat(np.arange(len(member)), tiling.sizes), tiling.order] = 1
    member /= member.sum(1, keepdims=True)
    return member @ keeps @ member.T


@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_bands_against_tokens(kind):
    """The mask is that of some half-width b, at least half of each tile pair; the next wider one keeps too much."""
    tiling, density = Tiling(GEOMETRY, TILE), 0.4
    mask = pattern_from_json(candidates("svg", tiling, density)[kind]).video_mask(tiling.tile_grid)
    raster = np.arange(384)
    place = raster if kind == "spatial" else raster % 64 * 6 + raster // 64
    away = np.abs(place[:, None] - place)
    by_width = [tile_share(tiling, away < b) >= 0.5 - 1e-12 for b in range(1, 385)]
    fitting = [m for m in by_width if tiling.density(m) <= density]
    assert np.array_equal(mask, fitting[-1]) and 0.2 < tiling.density(mask) <= density


def test_sta_windows_are_those_of_the_plan_format():
    """Cells of 6 x 8 x 8 on 30 x 48 x 80 with tiles of a third of a cell: a clamped diagonal in cells, exactly."""
    tiling = Tiling(Geometry((30, 48, 80), 0, "none", 1, 1, 64), (6, 8, 2))
    found = candidates("sta", tiling, 0.19)
    assert 1 <= len(found) <= 5
    for name, spec in found.items():
        cells = [int(x) for x in name.split("-")[1:]]
        rows, cols = ((n - 1) // 2 if n < full else None for n, full in zip(cells[1:], (6, 10), strict=True))
        cell = (1, 1, 4)
        exact = (
            MultiDiagonal(rows=rows, cols=cols, cell=cell, clamp=True)
            if cells[0] == 5
            else Diagonal(frames=(cells[0] - 1) // 2, rows=rows, cols=cols, cell=cell, clamp=True)
        )
        expected = exact.video_mask(tiling.tile_grid)
        assert np.array_equal(pattern_from_json(spec).video_mask(tiling.tile_grid), expected), name
        assert expected.mean() <= 0.19


def test_psa_candidates_spread_over_densities():
    tiling = Tiling(Geometry((18, 24, 32), 0, "none", 1, 1, 64), (3, 4, 8))
    found = candidates("psa", tiling, 0.5)
    kept = [tiling.density(tiling.mask(pattern_from_json(spec))) for spec in found.values()]
    assert 20 <= len(found) <= 100 and kept == sorted(kept)
    assert kept[0] < 0.1 and kept[-1] > 0.5 and len({str(spec) for spec in found.values()}) == len(found)


def test_density_of_the_sparse_steps():
    assert sparse_density(0.5, 5, 25) == pytest.approx(0.375)
    assert sparse_density(0.3, 0, 25) == 0.3
    with pytest.raises(SvditError, match=r"density: got 0\.2; expected more than the 0.2 of the dense steps"):
        sparse_density(0.2, 5, 25)
    with pytest.raises(SvditError, match="density: got 0; expected a number above 0"):
        sparse_density(0, 0, 25)


@pytest.mark.parametrize("method", UNMEASURED)
def test_plans_without_a_choice(method):
    plan = unmeasured_plan(method, "m", GEOMETRY, TILE, 0.5, 2, 10)
    assert [stage.until for stage in plan.stages] == [0.2, 1.0]
    assert {n for row in plan.stages[0].layers for n in row} == {"full"}
    assert 0.35 < mean_density(plan) <= 0.5
    assert plan.provenance["density"] == pytest.approx(mean_density(plan), rel=1e-5)


def measured(error, kept) -> Measurement:
    """error [S, L, H, M], kept [M]."""
    error = np.asarray(error, dtype=float)
    patterns = tuple(Diagonal(frames=i) for i in range(error.shape[-1]))
    names = tuple(f"d{i}" for i in range(error.shape[-1]))
    sparsity = np.broadcast_to(1 - np.array(kept), error.shape[1:]).copy()
    return Measurement(names, patterns, error, np.ones(error.shape[:3]), sparsity)


def test_least_error_rule():
    """Step 0 is dense and does not count; then the sums over steps 1 and 2 decide."""
    error = [[[[0.0, 9.0], [9.0, 0.0]]], [[[0.5, 0.1], [0.1, 0.4]]], [[[0.2, 0.3], [0.3, 0.1]]]]
    dense, sparse = choice("svg", measured(error, [0.3, 0.3]), 1, 0.3)
    assert (dense.start, dense.stop, sparse.start, sparse.stop) == (0, 1, 1, 3)
    assert (dense.choice == 2).all()
    assert sparse.choice.tolist() == [[1, 0]]


def test_psa_takes_the_sparsest_within_one_bound():
    """Bound 0.3 keeps 0.25 + 0.25; bound 0.1 would keep 0.25 + 0.5; bound 0.05 more still."""
    error = [[[[0.1, 0.05, 0.01], [0.3, 0.1, 0.02]]]]
    data = measured(error, [0.25, 0.5, 0.75])
    assert choice("psa", data, 0, 0.25)[0].choice.tolist() == [[0, 0]]
    assert choice("psa", data, 0, 0.375)[0].choice.tolist() == [[0, 1]]
    assert choice("psa", data, 0, 0.37)[0].choice.tolist() == [[0, 0]]
    assert choice("psa", data, 0, 0.5)[0].choice.tolist() == [[0, 1]]
    assert choice("psa", data, 0, 1.0)[0].choice.tolist() == [[3, 3]]
    with pytest.raises(SvditError, match=r"density: got 0\.1; expected one that the sparsest candidates reach"):
        choice("psa", data, 0, 0.1)


def test_unknown_method():
    with pytest.raises(SvditError, match="method: got \"radial\"; expected one of " + ", ".join(METHODS)):
        candidates("radial", Tiling(GEOMETRY, TILE), 0.5)
