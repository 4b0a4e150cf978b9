"""Density and FLOPs: against counting, and against the figures published for the dense models."""

from __future__ import annotations

import json

import numpy as np
import pytest

from svdit.plans.flops import flops_of, layer_density, mean_density, stage_shares
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal
from svdit.plans.schema import Plan, Stage, loads, template
from tests.plans.random_plans import random_plan
from tests.reference import token_mask

PUBLISHED = {
    "cogvideox1.5": (Geometry((11, 48, 85), 226, "before", 42, 48, 64), 100, 147.87, 0.001),
    "hunyuan": (Geometry((33, 45, 80), 256, "after", 60, 24, 128), 50, 612.37, 0.02),
    "wan2.1": (Geometry((21, 45, 80), 0, "none", 40, 40, 128), 100, 660.49, 0.02),
}
"""Geometry, denoiser passes of a video, PFLOP stated in Sparse-vDiT (arXiv 2506.03065), how near we come."""


@pytest.mark.parametrize("model", PUBLISHED)
def test_dense_models_cost_what_the_paper_states(model):
    geometry, passes, petaflops, tolerance = PUBLISHED[model]
    flops = flops_of(template(model, geometry, (1, 8, 16)))
    assert flops.dense * passes / 1e15 == pytest.approx(petaflops, rel=tolerance)
    assert (flops.ratio, flops.scope) == (1.0, "model")


def test_ratio_of_a_plan_by_hand():
    """N 144, W 128, 2 layers; half the steps dense, half at density 1/4: 5/8 of the attention is left."""
    geometry = Geometry((4, 6, 6), 0, "none", 2, 2, 64)
    stages = (Stage(0.5, ((("full",) * 2),) * 2), Stage(1.0, ((("d",) * 2),) * 2))
    plan = Plan("tiny", geometry, (1, 8, 16), {"d": Diagonal()}, stages)
    attention, rest = 2 * 4 * 144**2 * 128, 2 * 2 * 144 * 14 * 128**2
    assert mean_density(plan) == pytest.approx(5 / 8)
    assert flops_of(plan).ratio == pytest.approx((attention + rest) / (5 / 8 * attention + rest))
    other = Plan("another", geometry, (1, 8, 16), {"d": Diagonal()}, stages)
    assert flops_of(other).ratio == pytest.approx(8 / 5)
    assert flops_of(other).scope == "attention"


@pytest.mark.parametrize("seed", range(8))
def test_layer_density_equals_counting(seed):
    data = random_plan(seed)
    plan = loads(json.dumps(data))
    counted = [
        [np.mean([token_mask(data, name).mean() for name in row]) for row in stage["layers"]]
        for stage in data["stages"]
    ]
    assert np.allclose(layer_density(plan), counted, rtol=0, atol=1e-12)
    assert mean_density(plan) == pytest.approx(np.mean(counted))  # stages of these plans are equally long


def test_shares_of_steps():
    row = (("full",),)
    geometry = Geometry((1, 1, 1), 0, "none", 1, 1, 64)
    plan = Plan("m", geometry, (1, 1, 1), {}, (Stage(0.25, row), Stage(1.0, row)))
    assert stage_shares(plan).tolist() == [0.25, 0.75]
    assert stage_shares(plan, 2).tolist() == [0.5, 0.5]
    assert stage_shares(plan, 10).tolist() == [0.3, 0.7]


def test_nothing_left_has_no_ratio():
    geometry = Geometry((2, 2, 2), 0, "none", 1, 1, 64)
    plan = Plan("another", geometry, (1, 2, 2), {}, (Stage(1.0, (("skip",),)),))
    assert flops_of(plan).ratio == float("inf")
