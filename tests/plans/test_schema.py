"""The plan file: round trips, canonical text, stages, and every malformed plan with its message."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from svdit.plans.errors import SvditError
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, Full, MultiDiagonal, Skip
from svdit.plans.schema import Plan, Stage, dumps, loads, read_plan, template, write_plan
from tests.cases import CASES
from tests.plans.malformed import GOOD, MALFORMED
from tests.plans.random_plans import random_plan


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_plan_is_refused_with_field_got_expected(name):
    text, message = MALFORMED[name]
    with pytest.raises(SvditError) as caught:
        loads(text(), "some.plan.json")
    assert str(caught.value) == f"some.plan.json: {message}"


def test_the_good_plan_is_good():
    plan = loads(json.dumps(GOOD))
    assert plan.geometry == Geometry((3, 4, 6), 5, "after", 2, 3, 64)
    assert plan.stages[1].layers == (("d", "m", "skip"), ("u", "t", "full"))
    assert plan.patterns["m"] == MultiDiagonal(stride=2)


@pytest.mark.parametrize("seed", range(40))
def test_text_round_trips_byte_for_byte(seed):
    plan = loads(json.dumps(random_plan(seed)))
    text = dumps(plan)
    assert loads(text) == plan
    assert dumps(loads(text)) == text
    assert json.loads(text)["provenance"] == plan.provenance


@pytest.mark.parametrize("case", CASES[::7], ids=str)
def test_golden_plans_round_trip(case):
    assert loads(dumps(case.parsed)) == case.parsed


def test_the_file_is_the_text(tmp_path):
    plan = loads(json.dumps(random_plan(3)))
    path = tmp_path / "a.plan.json"
    write_plan(path, plan)
    assert path.read_bytes() == dumps(plan).encode("utf-8")
    assert read_plan(path) == plan
    write_plan(path, read_plan(path))
    assert path.read_bytes() == dumps(plan).encode("utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["a.plan.json"]


def test_canonical_text():
    stage = Stage(1, (("d0", "skip"), ("full", "d0")))
    patterns = {"d0": Diagonal(rows=1, cell=(1, 2, 2))}
    geometry = Geometry((2, 3, 4), 0, "none", 2, 2, 64)
    plan = Plan("tiny", geometry, (1, 2, 2), patterns, (stage,), {"method": "template", "seed": 7})
    assert dumps(plan) == (
        "{\n"
        ' "format": "svdit-plan",\n'
        ' "version": 1,\n'
        ' "model": "tiny",\n'
        ' "geometry": {"grid": [2, 3, 4], "text_tokens": 0, "text_position": "none", "layers": 2, "heads": 2,'
        ' "head_dim": 64},\n'
        ' "tile": [1, 2, 2],\n'
        ' "patterns": {\n'
        '  "d0": {"kind": "diagonal", "rows": 1, "cell": [1, 2, 2]}\n'
        " },\n"
        ' "stages": [\n'
        '  {"until": 1.0, "layers": [\n'
        '   ["d0", "skip"],\n'
        '   ["full", "d0"]\n'
        "  ]}\n"
        " ],\n"
        ' "provenance": {\n'
        '  "method": "template",\n'
        '  "seed": 7\n'
        " }\n"
        "}\n"
    )


def test_a_changed_head_changes_one_line():
    plan = loads(json.dumps(GOOD))
    rows = list(plan.stages[1].layers)
    rows[0] = ("s", *rows[0][1:])
    other = replace(plan, stages=(plan.stages[0], Stage(1.0, tuple(rows))))
    pairs = zip(dumps(plan).splitlines(), dumps(other).splitlines(), strict=True)
    assert [a != b for a, b in pairs].count(True) == 1


def test_provenance_may_be_left_out():
    data = {key: value for key, value in GOOD.items() if key != "provenance"}
    assert loads(json.dumps(data)).provenance == {}


def test_stage_of_takes_the_first_stage_that_ends_later():
    row = (("full",),)
    geometry = Geometry((1, 1, 1), 0, "none", 1, 1, 64)
    plan = Plan("m", geometry, (1, 1, 1), {}, (Stage(0.2, row), Stage(0.5, row), Stage(1.0, row)))
    assert [plan.stage_of(i, 10) for i in range(10)] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert [plan.stage_of(i, 4) for i in range(4)] == [0, 1, 2, 2]
    assert plan.stage_of(0, 1) == 0


@pytest.mark.parametrize("steps", [3, 7, 10, 30, 50, 1000])
def test_decimal_boundaries_fall_on_whole_steps(steps):
    row = (("full",),)
    geometry = Geometry((1, 1, 1), 0, "none", 1, 1, 64)
    for first in range(1, steps):
        plan = Plan("m", geometry, (1, 1, 1), {}, (Stage(first / steps, row), Stage(1.0, row)))
        assert plan.stage_of(first - 1, steps) == 0
        assert plan.stage_of(first, steps) == 1


@pytest.mark.parametrize(
    ("step", "steps", "message"),
    [
        (5, 5, "step: got 5; expected an integer from 0 to 4"),
        (-1, 5, "step: got -1; expected an integer from 0 to 4"),
        (0, 0, "steps: got 0; expected an integer of at least 1"),
        (True, 5, "step: got true; expected an integer"),
    ],
)
def test_wrong_steps_are_named(step, steps, message):
    with pytest.raises(SvditError, match=message):
        loads(json.dumps(GOOD)).stage_of(step, steps)


def test_pattern_by_name():
    plan = loads(json.dumps(GOOD))
    assert plan.pattern("full") == Full()
    assert plan.pattern("skip") == Skip()
    assert plan.pattern("d") == Diagonal(frames=1)
    with pytest.raises(SvditError, match='pattern: got "x"; expected one of full, skip, d, m, s, u, t'):
        plan.pattern("x")


def test_templates():
    geometry = Geometry((3, 4, 6), 0, "none", 2, 3, 64)
    full = template("tiny", geometry, (1, 2, 3))
    assert (full.patterns, full.stages[0].layers) == ({}, (("full",) * 3,) * 2)
    banded = template("tiny", geometry, (1, 2, 3), Diagonal(frames=1))
    assert banded.pattern(banded.stages[0].layers[1][2]) == Diagonal(frames=1)
    assert full.provenance == banded.provenance == {"method": "template"}


def test_plans_built_in_python_are_checked_too():
    good = loads(json.dumps(GOOD))
    with pytest.raises(SvditError, match=r"^stages\[1\].until: got 0.5; expected 1.0 in the last stage"):
        replace(good, stages=(good.stages[0], replace(good.stages[1], until=0.5)))
    with pytest.raises(SvditError, match=r"^patterns.d: got .*; expected a pattern"):
        replace(good, patterns={**good.patterns, "d": {"kind": "diagonal"}})
    with pytest.raises(SvditError, match=r"^provenance.'x': got .*not JSON serializable; expected JSON"):
        replace(good, provenance={"x": np.float32(1)})
    with pytest.raises(SvditError, match=r"^provenance: got the key 1; expected strings as keys"):
        replace(good, provenance={1: 2})
