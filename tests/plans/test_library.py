"""The plans that ship: valid, made by a search, and for the model they name."""
from __future__ import annotations

from pathlib import Path

import pytest

from svdit.plans import registry
from svdit.plans.flops import mean_density
from svdit.plans.schema import dumps, read_plan

LIBRARY = sorted((Path(__file__).parents[2] / "plans/library").glob("*.plan.json"))


def test_there_is_one():
    assert LIBRARY


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.name)
def test_shipped_plan_is_searched_and_fits_its_model(path):
    plan = read_plan(path)
    assert dumps(plan) == path.read_text(encoding="utf-8")
    assert plan.provenance["method"] in ("sparse-vdit", "budget")
    adapter = registry.adapter(plan.model)
    assert plan.geometry == adapter.geometry(adapter.packaged_checkpoint())
    assert mean_density(plan, plan.provenance["steps"]) == pytest.approx(plan.provenance["density"], rel=1e-5)
