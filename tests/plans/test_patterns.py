"""Masks against the token-level formula of tests/reference.py, on odd grids; pattern objects themselves."""

from __future__ import annotations

import json

import numpy as np
import pytest

from svdit.plans.errors import SvditError
from svdit.plans.patterns import (
    Diagonal,
    Full,
    MultiDiagonal,
    Skip,
    Stripe,
    Tiles,
    Union,
    pattern_from_json,
)
from svdit.plans.schema import loads
from tests.cases import BY_NAME
from tests.plans.random_plans import random_plan
from tests.reference import token_mask, video_mask


def on_tokens(plan, name):
    """The tile mask of a pattern, repeated to tokens: bool [N, N]."""
    tiling = plan.tiling()
    return tiling.mask(plan.pattern(name)).repeat(tiling.sizes, 0).repeat(tiling.sizes, 1)


@pytest.mark.parametrize("seed", range(60))
def test_mask_and_density_equal_brute_force(seed):
    data = random_plan(seed)
    plan = loads(json.dumps(data))
    for name in ("full", "skip", *data["patterns"]):
        truth = token_mask(data, name)
        wrong = int((on_tokens(plan, name) != truth).sum())
        assert wrong == 0, f"{wrong} token pairs of {data['patterns'].get(name, name)} on {data['geometry']}"
        tiling = plan.tiling()
        assert tiling.density(tiling.mask(plan.pattern(name))) == pytest.approx(truth.mean(), abs=1e-12)


def test_every_kind_is_in_the_sweep_and_masks_are_not_trivial():
    kinds, partial = set(), 0
    for seed in range(60):
        data = random_plan(seed)
        for name, pattern in data["patterns"].items():
            kinds.add(pattern["kind"])
            partial += 0.02 < video_mask(data, name).mean() < 0.98
    assert kinds == {"diagonal", "multi_diagonal", "stripe", "tiles", "union"}
    assert partial > 100


@pytest.mark.parametrize("case", [c for c in BY_NAME.values() if c.name.startswith(("pattern-", "nothing-"))], ids=str)
def test_golden_masks_equal_brute_force(case):
    for name in case.plan["patterns"]:
        assert np.array_equal(on_tokens(case.parsed, name), token_mask(case.plan, name))


GRID = (3, 2, 2)
"""12 video tiles, numbered (t * 2 + h) * 2 + w."""
BY_HAND = [
    (Diagonal(), 0, [0, 1, 2, 3]),
    (Diagonal(frames=1), 0, [0, 1, 2, 3, 4, 5, 6, 7]),
    (Diagonal(rows=0, cols=0), 5, [5]),
    (Diagonal(offset=1), 0, [4, 5, 6, 7]),
    (Diagonal(offset=1), 4, [0, 1, 2, 3, 8, 9, 10, 11]),
    (Diagonal(offset=2), 4, []),
    (Diagonal(frames=0, cell=(2, 1, 1)), 0, [0, 1, 2, 3, 4, 5, 6, 7]),
    (Diagonal(frames=0, cell=(2, 1, 1)), 8, [8, 9, 10, 11]),
    (Diagonal(frames=1, rows=0, cols=0, clamp=True), 0, [0, 4, 8]),
    (Diagonal(frames=0, rows=0, cols=0, clamp=True), 11, [11]),
    (MultiDiagonal(rows=0, cols=0), 5, [1, 5, 9]),
    (MultiDiagonal(rows=0, cols=0, stride=2), 0, [0, 8]),
    (MultiDiagonal(rows=0, cols=0, stride=2, offset=1), 0, [4]),
    (MultiDiagonal(rows=0, cols=None), 0, [0, 1, 4, 5, 8, 9]),
    (Stripe(((1, 3), (11, 12))), 5, [1, 2, 4, 5, 6, 7, 11]),
    (Stripe((), frames=1), 0, [0, 1, 2, 3, 4, 5, 6, 7]),
    (Union((Diagonal(rows=0, cols=0), Stripe(((11, 12),), frames=0))), 0, [0, 1, 2, 3, 11]),
    (Tiles((((0, 2), (1, 4)), *[()] * 11)), 0, [0, 1, 2, 3]),
    (Tiles((((0, 2), (1, 4)), *[()] * 11)), 1, []),
    (Full(), 7, list(range(12))),
    (Skip(), 7, []),
]


@pytest.mark.parametrize(("pattern", "query", "kept"), BY_HAND, ids=lambda x: str(x)[:60])
def test_rows_worked_out_by_hand(pattern, query, kept):
    assert np.flatnonzero(pattern.video_mask(GRID)[query]).tolist() == kept


def test_clamp_moves_the_window_of_border_queries():
    """Axis of 6 positions, half-width 1: the window always has 3 positions."""
    mask = Diagonal(frames=1, clamp=True).video_mask((6, 1, 1))
    windows = [np.flatnonzero(row).tolist() for row in mask]
    assert windows == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [3, 4, 5]]


def test_clamp_keeps_an_axis_that_is_not_longer_than_the_window():
    assert Diagonal(frames=1, clamp=True).video_mask((3, 1, 1)).all()
    assert not Diagonal(frames=1).video_mask((3, 1, 1)).all()


def test_clamp_counts_in_cells():
    """8 positions in cells of 2: 4 cells, window of 3 cells."""
    mask = Diagonal(frames=1, cell=(2, 1, 1), clamp=True).video_mask((8, 1, 1))
    windows = [(int(np.flatnonzero(row)[0]), int(np.flatnonzero(row)[-1]) + 1) for row in mask]
    assert windows == [(0, 6)] * 4 + [(2, 8)] * 4


def test_sliding_tile_attention_window_sizes():
    """STA (arXiv 2502.04507) on HunyuanVideo at 768p: 5 x 6 x 10 cells; densities are window over cells."""
    for window in [(5, 3, 3), (1, 6, 10), (3, 3, 5), (5, 1, 10), (5, 6, 1)]:
        frames, rows, cols = (None if w == n else w // 2 for w, n in zip(window, (5, 6, 10), strict=True))
        pattern = (
            MultiDiagonal(rows=rows, cols=cols, cell=(3, 1, 1), clamp=True)
            if frames is None
            else Diagonal(frames, rows, cols, cell=(3, 1, 1), clamp=True)
        )
        mask = pattern.video_mask((15, 6, 10))
        assert mask.sum(axis=1).tolist() == [3 * np.prod(window)] * 900


@pytest.mark.parametrize("seed", range(10))
def test_tiles_form_of_any_mask(seed):
    mask = np.random.default_rng(seed).random((12, 12)) < 0.1 + 0.08 * seed
    pattern = Tiles.from_mask(mask)
    assert np.array_equal(pattern.video_mask(GRID), mask)
    assert pattern_from_json(json.loads(json.dumps(pattern.to_json()))) == pattern


@pytest.mark.parametrize("pattern", [p for p, _, _ in BY_HAND], ids=lambda x: str(x)[:60])
def test_json_form_round_trips(pattern):
    assert pattern_from_json(json.loads(json.dumps(pattern.to_json()))) == pattern


def test_json_form_leaves_defaults_out():
    assert Diagonal().to_json() == {"kind": "diagonal"}
    assert Diagonal(frames=0, rows=None, cell=[1, 1, 1]).to_json() == {"kind": "diagonal"}
    assert MultiDiagonal(cols=None).to_json() == {"kind": "multi_diagonal", "cols": None}
    assert Stripe([]).to_json() == {"kind": "stripe", "columns": []}


def test_numpy_integers_are_integers():
    assert Diagonal(frames=np.int64(2)) == Diagonal(frames=2)
    assert type(Diagonal(frames=np.int64(2)).frames) is int


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Diagonal(frames=True), "frames: got true; expected an integer of at least 0"),
        (lambda: Diagonal(frames=None), "frames: got null; expected an integer"),
        (lambda: Diagonal(rows=-1), "rows: got -1; expected an integer of at least 0; null keeps the whole axis"),
        (lambda: Diagonal(clamp=True, offset=1), "clamp: got true with offset 1; expected no offset beside clamp"),
        (lambda: MultiDiagonal(clamp=True, stride=2), "clamp: got true with stride 2; expected no stride"),
        (lambda: Union(()), "members: got an empty list; expected at least one pattern"),
        (lambda: Union((Skip(),)), r"members\[0\]: got skip; expected a pattern other than skip"),
        (lambda: Union(("d0",)), r'members\[0\]: got "d0"; expected a pattern other than skip'),
        (lambda: Stripe(((3, 3),)), r"columns\[0\]: got \[3, 3\]; expected start below stop"),
    ],
)
def test_wrong_parameters_are_named(make, message):
    with pytest.raises(SvditError, match=message):
        make()
