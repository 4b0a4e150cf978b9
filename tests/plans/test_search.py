"""The paper's rule against tables worked out by hand, and the plan that comes out of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from svdit.plans.errors import SvditError
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, MultiDiagonal, Skip, Stripe
from svdit.plans.schema import Plan, dumps, loads
from svdit.plans.search import (
    Measurement,
    Rule,
    choose,
    loss_table,
    losses,
    mean_density,
    plan_from,
    relative_error,
    rule_for_density,
)
from svdit.plans.stages import merge
from svdit.plans.tiles import Tiling

GEOMETRY = Geometry((4, 4, 4), 0, "none", 2, 3, 64)
TILE = (1, 2, 2)


def measured(steps: int = 6, seed: int = 0) -> Measurement:
    """Errors that fall with density and differ between heads, layers and steps."""
    tiling = Tiling(GEOMETRY, TILE)
    patterns = (
        Skip(),
        Diagonal(),
        MultiDiagonal(rows=0, cols=0),
        tuple(tuple(Stripe(columns=[[4 * h, 4 * h + 2]]) for h in range(3)) for _ in range(2)),
    )
    density = np.array(
        [
            [[tiling.density(tiling.mask(p[i][h] if isinstance(p, tuple) else p)) for p in patterns] for h in range(3)]
            for i in range(2)
        ]
    )
    random = np.random.default_rng(seed)
    power = random.random((steps, 2, 3)) + 0.5
    error = random.random((steps, 2, 3, 4)) ** 3 * (1 - density) * power[..., None]
    error[..., 0] = power
    return Measurement(("skip", "band", "place", "stripe"), patterns, error, power, 1 - density)


def plan_of(data: Measurement, rule: Rule, max_stages: int, provenance: dict | None = None) -> Plan:
    return plan_from(
        data, model="m", geometry=GEOMETRY, tile=TILE, rule=rule, max_stages=max_stages, provenance=provenance or {}
    )


def test_rule_by_hand():
    # Three modes with sparsity 1, .75 and .5; lam = .5: penalties 0, .125 and .25.
    error = np.array([[2.0, 0.3, 0.01], [0.1, 0.05, 0.0], [1.0, 0.875, 0.8], [9.0, 9.0, 9.0], [1.0, 2.0, 2.0]])
    loss = losses(error, np.array([1.0, 0.75, 0.5]), 0.5)
    np.testing.assert_allclose(
        loss,
        [[2.0, 0.425, 0.26], [0.1, 0.175, 0.25], [1.0, 1.0, 1.05], [9.0, 9.125, 9.25], [1.0, 2.125, 2.25]],
        rtol=0,
        atol=1e-12,
    )
    # smallest loss; ties to the first mode; full (3) only where every loss exceeds eps; equal to eps is not more.
    assert choose(loss, 1.0).tolist() == [2, 0, 0, 3, 0]
    assert choose(loss, 0.2).tolist() == [3, 0, 3, 3, 3]


def test_penalty_rewards_sparse_modes():
    sparse, dense = losses(np.zeros(2), np.array([0.9, 0.1]), 0.5)
    assert sparse < dense


def test_relative_error_by_hand():
    error, power = np.array([[[[1.0], [3.0]]]]), np.array([[[2.0, 6.0]]])
    assert relative_error(error, power, "layer").ravel().tolist() == [0.25, 0.75]
    assert relative_error(error, power, "head").ravel().tolist() == [0.5, 0.5]
    assert relative_error(error, np.zeros_like(power), "layer").ravel().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("normaliser", ["layer", "head"])
def test_plan_without_merging_is_the_rule_at_every_step(normaliser):
    data, rule = measured(), Rule(0.5, 0.6, 2.0, normaliser, dense_steps=0.0)
    plan = plan_of(data, rule, 6)
    for step in range(6):
        stage = plan.stages[plan.stage_of(step, 6)]
        for layer in range(2):
            for head in range(3):
                scale = data.power[step, layer].mean() if normaliser == "layer" else data.power[step, layer, head]
                best, name = min(
                    (
                        2.0 * data.error[step, layer, head, m] / scale + 0.5 * (1 - data.sparsity[layer, head, m]),
                        data.name(m, layer, head),
                    )
                    for m in range(4)
                )
                assert stage.layers[layer][head] == ("full" if best > 0.6 else name)


def test_plan_round_trips_and_records_its_errors():
    data, rule = measured(), Rule(0.5, 0.6, 2.0, dense_steps=0.0)
    plan = plan_of(data, rule, 2, {"prompts": ["a"], "seed": 3})
    assert dumps(loads(dumps(plan))) == dumps(plan)
    assert plan.provenance["prompts"] == ["a"] and plan.provenance["method"] == "sparse-vdit"
    assert len(plan.stages) <= 2
    assert set(plan.patterns) == {n for s in plan.stages for row in s.layers for n in row} - {"full", "skip"}
    relative = relative_error(data.error, data.power)
    for (start, stop), stage, errors in zip(
        plan.provenance["stage_steps"], plan.stages, plan.provenance["relative_errors"], strict=True
    ):
        for layer in range(2):
            for head in range(3):
                name = stage.layers[layer][head]
                modes = [m for m in range(4) if data.name(m, layer, head) == name]
                expected = relative[start:stop, layer, head, modes[0]].mean() if modes else 0.0
                assert errors[layer][head] == pytest.approx(expected, rel=1e-3)


def test_plan_density_is_that_of_its_masks():
    data = measured()
    plan = plan_of(data, Rule(0.5, 0.6, 2.0, dense_steps=0.0), 3)
    tiling = plan.tiling()
    per_step = [
        np.mean(
            [
                [tiling.density(tiling.mask(plan.pattern(n))) for n in row]
                for row in plan.stages[plan.stage_of(step, 6)].layers
            ]
        )
        for step in range(6)
    ]
    assert plan.provenance["density"] == pytest.approx(np.mean(per_step), abs=1e-6)


@pytest.mark.parametrize(("share", "dense"), [(0.0, 0), (0.2, 2), (0.5, 3), (0.51, 4), (1.0, 6)])
@pytest.mark.parametrize("max_stages", [1, 2, 6])
def test_dense_steps_are_full_in_every_head(share, dense, max_stages):
    """The steps with step / 6 < share; a stage that holds one of them is full, so one stage is full altogether."""
    data = measured()
    plan = plan_of(data, Rule(0.5, 0.6, 2.0, dense_steps=share), max_stages)
    full = [
        {name for row in plan.stages[plan.stage_of(step, 6)].layers for name in row} == {"full"} for step in range(6)
    ]
    assert full[:dense] == [True] * dense
    if dense and max_stages == 1:
        assert full == [True] * 6
    if max_stages == 6:
        assert full[dense:] == [False] * (6 - dense)
    assert plan.provenance["dense_steps"] == share


def test_density_counts_dense_steps():
    data = measured()
    rule = rule_for_density(data, 0.6, 6, 1.0, dense_steps=0.3)  # steps 0 and 1 of 6: a third of everything
    assert rule.dense_steps == 0.3
    assert 1 / 3 < mean_density(data, merge(loss_table(data, rule), 6)) <= 0.6
    with pytest.raises(SvditError, match=r"density: got 0.3; expected at least 0\.\d+ with these candidates"):
        rule_for_density(data, 0.3, 6, dense_steps=0.3)


def test_larger_eps_and_lam_never_make_a_plan_denser():
    data = measured()

    def density(lam: float, eps: float) -> float:
        return mean_density(data, merge(loss_table(data, Rule(lam, eps, dense_steps=0.0)), 3))

    by_eps = [density(0.5, eps) for eps in (0.0, 0.2, 0.4, 0.8, 1.6, 50.0)]
    assert by_eps[0] == 1.0 and by_eps == sorted(by_eps, reverse=True)
    by_lam = [density(lam, 1e9) for lam in (0.0, 0.1, 0.5, 2.0, 50.0)]
    assert by_lam == sorted(by_lam, reverse=True) and by_lam[0] > by_lam[-1]


@pytest.mark.parametrize("target", [0.1, 0.25, 0.4, 0.9])
def test_rule_for_density_is_the_densest_that_fits(target):
    data = measured()
    rule = rule_for_density(data, target, 6, 1.0, dense_steps=0.0)
    kept = mean_density(data, merge(loss_table(data, rule), 6))
    cheaper = Rule(rule.lam * 0.999, rule.eps * 0.999, 1.0, dense_steps=0.0)
    looser = mean_density(data, merge(loss_table(data, cheaper), 6))
    assert rule.lam == rule.eps
    assert kept <= target < looser


def test_rule_for_density_minimises_error_for_its_density():
    """Every other choice of modes with the same or lower density has at least as much error (enumerated)."""
    data = measured(steps=1)
    table = relative_error(data.error, data.power)[0].reshape(6, 4)
    kept = np.concatenate([(1 - data.sparsity).reshape(6, 4), np.ones((6, 1))], 1)
    table = np.concatenate([table, np.zeros((6, 1))], 1)
    rule = rule_for_density(data, 0.4, 1, dense_steps=0.0)
    choice = merge(loss_table(data, rule), 1)[0].choice.ravel()
    density, error = kept[np.arange(6), choice].sum(), table[np.arange(6), choice].sum()
    grid = np.stack(np.meshgrid(*[np.arange(5)] * 6, indexing="ij"), -1).reshape(-1, 6)
    densities = kept[np.arange(6), grid].sum(1)
    assert table[np.arange(6), grid].sum(1)[densities <= density + 1e-12].min() == pytest.approx(error, rel=1e-9)


def test_a_pattern_that_keeps_all_of_a_head_is_written_as_full():
    """Measured columns may cover every key outside a band."""
    data = measured()
    patterns, sparsity, error = list(data.patterns), data.sparsity.copy(), data.error.copy()
    patterns[3] = ((Stripe(columns=[[0, 16]]),) * 3,) * 2
    sparsity[..., 3], error[..., 3] = 0.0, 0.0
    found = plan_of(replace(data, patterns=tuple(patterns), sparsity=sparsity, error=error), Rule(0.0, 1e9), 1)
    assert {name for row in found.stages[0].layers for name in row} == {"full"} and not found.patterns


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lam": -1.0}, "lam: got -1.0; expected a finite number >= 0"),
        ({"eps": float("nan")}, "eps: got nan"),
        ({"error_scale": float("inf")}, "error_scale: got inf"),
        ({"dense_steps": 1.5}, r"dense_steps: got 1.5; expected a share of the steps in \[0, 1\]"),
        ({"dense_steps": float("nan")}, "dense_steps: got nan"),
        ({"normaliser": "tokens"}, "normaliser: got 'tokens'; expected layer or head"),
    ],
)
def test_rule_refuses(arguments, message):
    with pytest.raises(SvditError, match=message):
        Rule(**arguments)


def test_rule_for_density_refuses_what_no_candidate_reaches():
    data = measured()
    dense = Measurement(data.modes[1:], data.patterns[1:], data.error[..., 1:], data.power, data.sparsity[..., 1:])
    with pytest.raises(SvditError, match=r"density: got 0.01; expected at least 0\.\d+ with these candidates"):
        rule_for_density(dense, 0.01, 3, dense_steps=0.0)
    with pytest.raises(SvditError, match=r"density: got 0; expected a number in \(0, 1\]"):
        rule_for_density(data, 0, 3)
