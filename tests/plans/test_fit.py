"""Plans on other grids and step counts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from svdit.plans.cli import main
from svdit.plans.errors import SvditError
from svdit.plans.fit import MEASURED_PLACES, carried
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, MultiDiagonal, Stripe, Tiles, Union
from svdit.plans.schema import Plan, Stage, read_plan, write_plan

PATTERNS = {
    "band": Diagonal(frames=1),
    "wide": MultiDiagonal(rows=1, cols=None),
    "first": Stripe(columns=((0, 16),), frames=0),
    "some": Stripe(columns=((5, 6),), frames=0),
    "both": Union((Diagonal(frames=1), MultiDiagonal(rows=0, cols=0))),
    "any": Tiles(tuple(((q, q + 1),) for q in range(128))),
}
STAGES = (
    Stage(0.25, (("full", "band", "wide"), ("first", "skip", "full"))),
    Stage(1.0, (("some", "band", "wide"), ("first", "both", "any"))),
)


def plan(grid=(8, 8, 8)) -> Plan:
    return Plan("m", Geometry(grid, 0, "none", 2, 3, 64), (1, 2, 2), PATTERNS, STAGES, {"method": "m", "steps": 8})


def at(grid):
    return Geometry(grid, 0, "none", 2, 3, 64)


def test_the_same_grid_changes_nothing():
    fitted, doubts = carried(plan())
    assert (fitted.patterns, fitted.stages, doubts) == (plan().patterns, plan().stages, [])


def test_windows_keep_their_share():
    """8 -> 24 frames: 3 of 8 becomes 9 of 24; rows 4 -> 12 tiles: 3 of 4 becomes 9 of 12; whole axes stay whole."""
    fitted, _ = carried(plan(), at((24, 24, 8)))
    assert fitted.patterns["band"] == Diagonal(frames=4)
    assert fitted.patterns["wide"] == MultiDiagonal(rows=4, cols=None)
    assert fitted.patterns["both"] == Union((Diagonal(frames=4), MultiDiagonal(rows=1, cols=0)))
    before, after = plan().tiling(), fitted.tiling()
    for name in ("band", "wide"):
        old, new = before.density(before.mask(PATTERNS[name])), after.density(after.mask(fitted.patterns[name]))
        assert new == pytest.approx(old, rel=0.05)


def test_listed_tiles_stay_at_their_place():
    """Twice the height and width: tile (0, 1, 1) becomes the four tiles (0, 2..3, 2..3); a frame stays a frame."""
    fitted, _ = carried(plan(), at((8, 16, 16)))
    assert fitted.patterns["some"].columns == ((18, 20), (26, 28))
    assert fitted.patterns["first"].columns == ((0, 64),)
    old = PATTERNS["any"].video_mask((8, 4, 4)).reshape(8, 4, 4, 8, 4, 4)
    new = fitted.patterns["any"].video_mask((8, 8, 8)).reshape(8, 8, 8, 8, 8, 8)
    np.testing.assert_array_equal(new, old.repeat(2, 1).repeat(2, 2).repeat(2, 4).repeat(2, 5))


def test_which_heads_to_measure_again():
    _, doubts = carried(plan(), at((8, 16, 16)))
    found = {(d.stage, d.layer, d.head): d.reason for d in doubts}
    assert found[(1, 0, 0)] == MEASURED_PLACES and found[(1, 1, 2)] == MEASURED_PLACES
    assert (0, 0, 0) not in found and (0, 0, 1) not in found, "full and whole-frame bands are as they were"
    assert (1, 1, 0) not in found, "a stripe of whole frames"


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 50])
def test_other_step_counts_choose_the_same(steps):
    fitted, doubts = carried(plan(), steps=steps)
    assert doubts == []
    for step in range(steps):
        own = plan().stages[plan().stage_of(step, steps)].layers
        assert fitted.stages[fitted.stage_of(step, steps)].layers == own
        assert all(round(stage.until * steps) == stage.until * steps for stage in fitted.stages)


def test_another_model_is_refused():
    with pytest.raises(SvditError, match=r"geometry.heads: got 4; expected 3 as in the plan"):
        carried(plan(), Geometry((8, 8, 8), 0, "none", 2, 4, 64))


def test_command(tmp_path):
    write_plan(tmp_path / "a.plan.json", plan())
    arguments = ["fit", str(tmp_path / "a.plan.json"), "-o", str(tmp_path / "b.plan.json")]
    done = CliRunner().invoke(main, [*arguments, "--geometry", "8", "16", "16", "--json", str(tmp_path / "f.json")])
    assert done.exit_code == 0, done.output
    assert "heads should be measured again: l0h0" in done.output
    assert read_plan(tmp_path / "b.plan.json").geometry.grid == (8, 16, 16)
    again = json.loads((tmp_path / "f.json").read_text())["again"]
    assert {"stage": 1, "layer": 0, "head": 0, "pattern": "some", "reason": MEASURED_PLACES} in again
    nothing = CliRunner().invoke(main, arguments)
    assert nothing.exit_code == 2 and "fit: got nothing to change" in nothing.stderr
    both = CliRunner().invoke(main, [*arguments, "--geometry", "8", "16", "16", "--frames", "9"])
    assert both.exit_code == 2 and "--geometry: got also a size of the video" in both.stderr


def test_command_lists_the_most_frequent_patterns(tmp_path):
    """20 measured patterns, one of them in three heads: 12 lines, that one first."""
    patterns = {f"p{i}": Stripe(columns=((i, i + 1),)) for i in range(20)}
    row = tuple(f"p{i}" for i in (*range(20), 7, 7))
    many = Plan("m", Geometry((8, 8, 8), 0, "none", 1, 22, 64), (1, 2, 2), patterns, (Stage(1.0, (row,)),))
    write_plan(tmp_path / "a.plan.json", many)
    size = ["--geometry", "8", "16", "16", "-o", str(tmp_path / "b.plan.json")]
    lines = CliRunner().invoke(main, ["fit", str(tmp_path / "a.plan.json"), *size]).output.splitlines()
    assert lines[2] == f"  p7: {MEASURED_PLACES} (3 times)" and lines[3].endswith("(1 time)")
    assert len(lines) == 2 + 12 + 1 and lines[-1] == "  ... and 8 more patterns (--json has all)"


def test_command_with_a_video_size(tmp_path):
    """The tiny model's own geometry, twice as high and wide in pixels."""
    from svdit.plans import registry

    adapter = registry.adapter("tiny")
    folder = adapter.packaged_checkpoint()
    geometry = adapter.geometry(folder)
    _, height, width = adapter.reference_video(folder)
    row = ("d",) * geometry.heads
    original = Plan("tiny", geometry, (4, 4, 4), {"d": Diagonal()}, (Stage(1.0, (row,) * geometry.layers),))
    write_plan(tmp_path / "a.plan.json", original)
    size = ["--height", str(2 * height), "--width", str(2 * width), "-o", str(tmp_path / "b.plan.json")]
    done = CliRunner().invoke(main, ["fit", str(tmp_path / "a.plan.json"), *size])
    assert done.exit_code == 0, done.output
    t, h, w = geometry.grid
    assert read_plan(tmp_path / "b.plan.json").geometry.grid == (t, 2 * h, 2 * w)
