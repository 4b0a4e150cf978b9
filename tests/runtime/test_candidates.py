"""Candidates: the ladder fits every grid, measured fields follow the map, mistakes are named."""

from __future__ import annotations

import json

import numpy as np
import pytest

from svdit.plans.errors import SvditError
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Stripe, Tiles, Union
from svdit.plans.tiles import Tiling
from svdit.runtime.candidates import (
    MAX_DENSITY,
    check_candidates,
    default_candidates,
    is_measured,
    read_candidates,
    resolve,
)

TILING = Tiling(Geometry((4, 4, 6), 0, "none", 1, 1, 64), (1, 2, 3))
"""4 frames of 2 x 2 tiles."""


@pytest.mark.parametrize(
    ("grid", "tile"),
    [
        ((1, 1, 1), (1, 1, 1)),
        ((4, 6, 6), (1, 2, 3)),
        ((16, 24, 24), (1, 8, 16)),
        ((33, 45, 80), (1, 8, 16)),
        ((3, 2, 1), (1, 2, 1)),
    ],
)
def test_ladder_fits_any_grid(grid, tile):
    tiling = Tiling(Geometry(grid, 0, "none", 1, 1, 64), tile)
    specs = default_candidates(tiling)
    assert next(iter(specs)) == "skip"
    assert check_candidates(specs, tiling) == specs
    masks = [tiling.mask(resolve(s, tiling, np.zeros(0))) for s in specs.values() if not is_measured(s)]
    assert len({m.tobytes() for m in masks}) == len(masks)
    assert all(tiling.density(m) <= MAX_DENSITY for m in masks)


def test_columns_take_what_other_frames_look_at():
    mass = np.zeros((16, 16))
    mass[:, [0, 4, 8, 12]] = 1.0  # looked at by everybody
    mass[np.arange(16), np.arange(16)] = 50.0  # each by itself alone, inside the band
    mass[8:, 5] = 3.0  # by two frames outside its own
    found = resolve({"kind": "stripe", "columns": {"top": 2}, "frames": 0}, TILING, mass[None])
    assert found == Stripe(columns=[[0, 1], [5, 6]], frames=0)
    # with a band of one frame, tile 5 is seen by frames 3 only, tile 0 by frames 2 and 3
    assert resolve({"kind": "stripe", "columns": {"top": 1}, "frames": 1}, TILING, mass[None]) == Stripe([[5, 6]], 1)
    inside = resolve(
        {"kind": "union", "members": [{"kind": "diagonal"}, {"kind": "stripe", "columns": {"top": 1}}]},
        TILING,
        mass[None],
    )
    assert isinstance(inside, Union) and inside.members[1] == Stripe([[5, 6]], 0)


def test_pairs_take_the_heaviest_and_one_a_row():
    random = np.random.default_rng(0)
    mass = random.random((16, 16))
    mass[3] *= 1e-3
    found = resolve({"kind": "tiles", "rows": {"top": 0.25}}, TILING, mass[None])
    assert isinstance(found, Tiles)
    mask = found.video_mask(TILING.tile_grid)
    assert mask[3].sum() == 1 and mask[3, mass[3].argmax()]
    others = np.delete(mask, 3, 0)
    assert others.sum() == 64 and np.delete(mass, 3, 0)[others].min() > np.delete(mass, 3, 0)[~others].max()


def test_the_same_share_of_every_row():
    mass = np.random.default_rng(5).random((16, 16))
    mask = resolve({"kind": "tiles", "rows": {"block": 0.3}}, TILING, mass[None]).video_mask(TILING.tile_grid)
    assert mask.sum(1).tolist() == [4] * 16
    for row in range(16):
        assert mass[row, mask[row]].min() > mass[row, ~mask[row]].max()


def test_vertical_slash_finds_the_lines_that_are_there():
    """Two diagonals and one column stand out; the seven lines that 40 % buy hold them before any other."""
    mass = np.random.default_rng(6).random((16, 16)) * 0.01
    mass[:, 5] += 1.0
    query, key = np.indices((16, 16))
    mass[key - query == 0] += 1.0
    mass[key - query == -4] += 1.0
    mask = resolve({"kind": "tiles", "rows": {"vertical_slash": 0.4}}, TILING, mass[None]).video_mask(TILING.tile_grid)
    assert mask[:, 5].all() and mask[key - query == 0].all() and mask[key - query == -4].all()
    assert 0.3 < mask.mean() <= 0.4


def test_file_is_read(tmp_path):
    specs = {
        "skip": {"kind": "skip"},
        "a": {"kind": "diagonal", "frames": 1},
        "b": {"kind": "stripe", "columns": {"top": 3}},
    }
    (tmp_path / "c.json").write_text(json.dumps(specs))
    assert read_candidates(tmp_path / "c.json", TILING) == specs


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ({}, "candidates: got {}; expected an object of candidate patterns by name, at least one"),
        ([], r"candidates: got \[\]"),
        ({"a": {"kind": "circle"}}, r'candidates: \$\.a\.kind: got "circle"; expected one of full, skip'),
        ({"a": {"kind": "diagonal", "frame": 1}}, r"\$\.a\.frame: got an unknown key"),
        ({"a": {"kind": "full"}}, r'\$\.a: got "full"; expected a sparse pattern'),
        ({"a": {"kind": "skip"}}, 'expected the name "skip" for the kind skip'),
        ({"skip": {"kind": "diagonal"}}, "skip: got kind 'diagonal'; expected the name"),
        ({"a b": {"kind": "diagonal"}}, "the name"),
        (
            {"a": {"kind": "stripe", "columns": {"top": 0}}},
            r"\$\.a\.columns\.top: got 0; expected an integer from 1 to 16",
        ),
        ({"a": {"kind": "stripe", "columns": {"top": 17}}}, r"\$\.a\.columns\.top: got 17"),
        ({"a": {"kind": "stripe", "columns": {"best": 1}}}, r"\$\.a\.columns\.best: got an unknown key"),
        ({"a": {"kind": "stripe", "columns": [[0, 17]]}}, r"patterns\.a.*columns"),
        (
            {"a": {"kind": "tiles", "rows": {"top": 1.0}}},
            r"\$\.a\.rows\.top: got 1.0; expected a number above 0 and below 1",
        ),
        (
            {"a": {"kind": "union", "members": [{"kind": "stripe", "columns": {"top": 99}}]}},
            r"\$\.a\.members\[0\]\.columns\.top: got 99",
        ),
        ({"a": 3}, r"\$\.a: got 3; expected an object with a"),
    ],
)
def test_mistakes_are_named(obj, message):
    with pytest.raises(SvditError, match=message):
        check_candidates(obj, TILING)


def test_a_part_of_the_trajectory_has_its_own_map():
    random = np.random.default_rng(1)
    maps = random.random((3, 16, 16))
    for part in range(3):
        found = resolve({"kind": "tiles", "rows": {"top": 0.25, "part": part}}, TILING, maps)
        assert found == resolve({"kind": "tiles", "rows": {"top": 0.25}}, TILING, maps[part][None])
    with pytest.raises(SvditError, match=r"rows\.part: got 3; expected an integer from 0 to 2"):
        check_candidates({"late": {"kind": "tiles", "rows": {"top": 0.25, "part": 3}}}, TILING)
