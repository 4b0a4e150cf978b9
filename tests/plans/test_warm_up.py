"""Budget mode has no rule about first steps: where it keeps them dense, the error model made it."""

from __future__ import annotations

import numpy as np
import pytest

from svdit.plans.budget import Target, budget_plan
from svdit.plans.dynamics import step_weights
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, Skip
from svdit.plans.search import Measurement

STEPS = 10
GEOMETRY = Geometry((4, 2, 2), 0, "none", 1, 2, 64)


def plan(weights: np.ndarray):
    """All steps alike: a band of half the pairs with an error of 0.05, and skip with 1."""
    error = np.broadcast_to([1.0, 0.05], (STEPS, 1, 2, 2)).copy()
    sparsity = np.broadcast_to([1.0, 0.375], (1, 2, 2))
    data = Measurement(("skip", "band"), (Skip(), Diagonal(frames=1)), error, np.ones((STEPS, 1, 2)), sparsity)
    return budget_plan(
        data,
        Target("density", 0.8),
        weights,
        None,
        model="m",
        geometry=GEOMETRY,
        tile=(1, 2, 2),
        normaliser="layer",
        max_stages=2,
        provenance={},
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_the_heavy_steps_are_the_full_ones(reverse):
    noise = np.linspace(1, 0, STEPS + 1)
    weights = step_weights(1 - noise, noise)
    found = plan(weights[::-1] if reverse else weights)
    kept = [{name for row in stage.layers for name in row} for stage in found.stages]
    assert kept == ([{"band"}, {"full"}] if reverse else [{"full"}, {"band"}])
    dense = found.provenance["stage_steps"][1 if reverse else 0]
    assert dense[1] - dense[0] == 4, "4 of 10 steps full and 6 at 0.625 keep 0.775; with 5 it would be 0.8125"
