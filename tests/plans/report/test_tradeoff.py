"""Where plans stand, against sums written out and against every possible plan."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from svdit.plans.budget import mode_ms, weighted_errors
from svdit.plans.cost import CostModel, HeadWork
from svdit.plans.errors import SvditError
from svdit.plans.patterns import Diagonal
from svdit.plans.report.tradeoff import best_places, least_error, rule_places, standing
from svdit.plans.schema import Plan, Stage
from svdit.plans.search import Measurement, Rule, plan_from
from tests.plans.search_states import GEOMETRY, STEPS, TILE, paper_plan, search_state

COST = CostModel("a table", 2, 3, 0.01, 0.02, 0.5, 1.5, "measured", "measured", 0.0)
WEIGHTS = np.array([3.0, 1.0, 2.0, 0.5, 0.25, 0.25])


def stand(plan: Plan, data: Measurement, normaliser: str = "layer"):
    return standing(plan, data, WEIGHTS, normaliser, mode_ms(COST, data, plan.tiling()))


def by_hand(plan: Plan, state, normaliser: str) -> tuple[float, float, float, list[float]]:
    """(weighted error, density, ms a pass, error of each step) of a plan, loop by loop."""
    data, tiling = state.measurement(), plan.tiling()
    by_step, kept, time = [], 0.0, 0.0
    for step in range(STEPS):
        stage = plan.stages[plan.stage_of(step, STEPS)]
        total = 0.0
        for layer, head in itertools.product(range(2), range(3)):
            pattern = plan.pattern(stage.layers[layer][head])
            density = tiling.density(tiling.mask(pattern))
            scale = data.power[step, layer].mean() if normaliser == "layer" else data.power[step, layer, head]
            modes = [data.pattern(mode, layer, head) for mode in range(4)]
            if pattern.kind != "full":
                total += data.error[step, layer, head, modes.index(pattern)] / scale
            kept += density / (STEPS * 6)
            time += (0.02 + 0.5 * density if density else 0.0) / STEPS
        by_step.append(WEIGHTS[step] / WEIGHTS.sum() * total / 6)
    return sum(by_step), kept, 2 * 0.01 + 1.5 + time, by_step


@pytest.mark.parametrize("normaliser", ["layer", "head"])
@pytest.mark.parametrize("lam", [0.05, 0.5, 3.0])
def test_a_plan_stands_where_sums_put_it(lam, normaliser):
    state = search_state()
    plan = paper_plan(state, lam)
    found = stand(plan, state.measurement(), normaliser)
    error, density, latency, by_step = by_hand(plan, state, normaliser)
    assert found.total_error == pytest.approx(error)
    assert found.mean_density == pytest.approx(density) == pytest.approx(plan.provenance["density"], rel=1e-5)
    assert found.latency_ms(COST) == pytest.approx(latency)
    np.testing.assert_allclose(found.by_step, by_step)
    if normaliser == "layer":
        np.testing.assert_allclose(found.relative, plan.provenance["relative_errors"], rtol=1e-3)


def coherence_of(steps: int) -> np.ndarray:
    """[2, S, S]: products of vectors without negative parts, of two videos."""
    sides = np.random.default_rng(9).random((2, steps, 3)) + 0.1
    return sides @ sides.transpose(0, 2, 1)


def test_errors_of_coherent_steps_are_parts_of_the_combined_one():
    """E_p = sum over i, j of C_pij sqrt(E_i E_j): of a video's error step i has the terms with i.

    Of the geometric mean of the videos it has its mean share, its heads shares as their own errors are.
    """
    state, coherence = search_state(), coherence_of(STEPS)
    plan = paper_plan(state, 0.5)
    _, _, _, by_step = by_hand(plan, state, "layer")
    table = mode_ms(COST, state.measurement(), plan.tiling())
    found = standing(plan, state.measurement(), WEIGHTS, "layer", table, coherence)
    terms = coherence * np.sqrt(np.outer(by_step, by_step))
    first, second = terms.sum((1, 2))
    assert found.total_error == pytest.approx((first * second) ** 0.5, rel=1e-5)
    share = terms[0].sum(1) / first / 2 + terms[1].sum(1) / second / 2
    np.testing.assert_allclose(found.by_step, share * (first * second) ** 0.5, rtol=1e-5)
    additive = stand(plan, state.measurement())
    np.testing.assert_allclose(found.relative, additive.relative)
    assert found.error.sum((1, 2)) == pytest.approx([found.by_step[a:b].sum() for a, b in stage_steps(plan)])


def stage_steps(plan: Plan) -> list[tuple[int, int]]:
    ends = [round(stage.until * STEPS) for stage in plan.stages]
    return list(itertools.pairwise([0, *ends]))


@pytest.mark.parametrize(("ends", "steps"), [((0.5, 0.51, 1.0), [3, 1, 2]), ((0.01, 0.02, 1.0), [1, 0, 5])])
def test_every_step_counts_in_its_stage(ends, steps):
    """0.51 of 6 steps holds step 3 as well; the second of the other stages holds none."""
    state, row = search_state(), ("skip", "band", "place")
    patterns = {"band": state.patterns[1], "place": state.patterns[2]}
    plan = Plan("tiny", GEOMETRY, TILE, patterns, tuple(Stage(end, (row, row)) for end in ends))
    found = stand(plan, state.measurement())
    assert found.steps.tolist() == steps
    assert found.total_error == pytest.approx(by_hand(plan, state, "layer")[0])
    assert np.isfinite(found.relative).all() and not found.error[found.steps == 0].any()


def test_a_pattern_that_was_not_measured():
    state = search_state()
    row = (("full", "other", "full"), ("full",) * 3)
    plan = Plan("tiny", GEOMETRY, TILE, {"other": Diagonal(frames=2)}, (Stage(1.0, row),))
    with pytest.raises(SvditError, match=r'stages\[0\]\.layers\[0\]\[1\]: got the pattern "other"; expected a pattern'):
        stand(plan, state.measurement())


def small() -> Measurement:
    """3 steps, 1 layer, 2 heads, 2 modes."""
    random = np.random.default_rng(3)
    error = random.random((3, 1, 2, 2)) * [1.0, 0.3]
    sparsity = np.broadcast_to([0.9, 0.4], (1, 2, 2))
    return Measurement(("a", "b"), (Diagonal(), Diagonal(frames=1)), error, np.ones((3, 1, 2)), sparsity)


DENSITY = np.broadcast_to([0.1, 0.6, 1.0], (1, 2, 3))


def every_plan(data: Measurement, cost: CostModel, weights: np.ndarray, max_stages: int, coherence=None):
    """(ms, error) of every plan with at most max_stages stages; coherence None: errors of steps add up."""
    density, coherence = [0.1, 0.6, 1.0], np.eye(3)[None] if coherence is None else coherence
    for cuts in itertools.chain.from_iterable(itertools.combinations((1, 2), n) for n in range(max_stages)):
        stages = list(itertools.pairwise([0, *cuts, 3]))
        for choice in itertools.product(range(3), repeat=2 * len(stages)):
            by_step, time = np.zeros(3), 0.0
            for i, (a, b) in enumerate(stages):
                for head in range(2):
                    mode = choice[2 * i + head]
                    time += float(cost.heads_ms(HeadWork(density[mode]))) * (b - a) / 3
                    if mode < 2:
                        by_step[a:b] += weights[a:b] * data.error[a:b, 0, head, mode] / weights.sum() / 2
            videos = (coherence * np.sqrt(np.outer(by_step, by_step))).sum((1, 2))
            yield cost.fixed_ms + time, float(np.prod(videos) ** (1 / len(videos)))


@pytest.mark.parametrize("max_stages", [1, 2, 3])
def test_no_plan_lies_below_the_best_places(max_stages):
    data, weights = small(), WEIGHTS[:3]
    cost = replace(COST, layers=1, heads=2)
    plans = list(every_plan(data, cost, weights, max_stages))
    places = best_places(weighted_errors(data, weights), cost.heads_ms(HeadWork(DENSITY)), cost.fixed_ms, max_stages)
    assert places == sorted(places, key=lambda p: p.latency_ms) and len(places) > 2
    for place in places:
        assert any(time == pytest.approx(place.latency_ms) and error == pytest.approx(place.error, abs=1e-12)
                   for time, error in plans), "not a plan at all"
        assert min(e for t, e in plans if t <= place.latency_ms * (1 + 1e-9)) >= place.error - 1e-12
    for a, b in itertools.pairwise(places):  # convex, and nothing below the line between two of them
        for time, error in plans:
            if a.latency_ms <= time <= b.latency_ms:
                part = (time - a.latency_ms) / (b.latency_ms - a.latency_ms)
                assert error >= (1 - part) * a.error + part * b.error - 1e-9


@pytest.mark.parametrize("limit", [1.8, 2.2, 2.6])
def test_least_error_is_that_of_the_best_plan_within_the_time(limit):
    data, cost = small(), replace(COST, layers=1, heads=2)
    truth = min(e for t, e in every_plan(data, cost, WEIGHTS[:3], 2) if t <= limit)
    tables = weighted_errors(data, WEIGHTS[:3]), cost.heads_ms(HeadWork(DENSITY))
    assert least_error(*tables, limit - cost.fixed_ms, 2) == pytest.approx(truth, rel=2e-4)


def test_places_under_coherence_are_plans_and_better_than_the_additive_ones():
    """Each has the combined error of a plan of its time, and none lies above the corners that adding up finds."""
    data, cost, weights, coherence = small(), replace(COST, layers=1, heads=2), WEIGHTS[:3], coherence_of(3)
    error, heads = weighted_errors(data, weights), cost.heads_ms(HeadWork(DENSITY))
    plans = list(every_plan(data, cost, weights, 2, coherence))
    places = best_places(error, heads, cost.fixed_ms, 2, coherence)
    assert places == sorted(places, key=lambda p: p.latency_ms) and len(places) > 2
    for place in places:
        assert any(t == pytest.approx(place.latency_ms) and e == pytest.approx(place.error, abs=1e-9) for t, e in plans)
    limit = 2.2
    found = least_error(error, heads, limit - cost.fixed_ms, 2, coherence)
    truth = min(e for t, e in plans if t <= limit)
    both = zip(every_plan(data, cost, weights, 2), plans, strict=True)
    _, additive = min((e, combined) for (t, e), (_, combined) in both if t <= limit)
    assert truth * (1 - 1e-9) <= found <= additive * (1 + 1e-9)


def test_the_rules_places_are_those_of_its_plans():
    state = search_state()
    data = state.measurement()
    rule = Rule(error_scale=2.0, normaliser="head", dense_steps=0.3)
    tables = weighted_errors(data, WEIGHTS, "head"), mode_ms(COST, data, paper_plan(state).tiling())
    places = rule_places(data, *tables, COST.fixed_ms, 2, rule)
    assert places == sorted(places, key=lambda p: p.latency_ms) and len(places) > 3
    for lam in (100.0, 1e-3):
        plan = plan_from(data, model="tiny", geometry=GEOMETRY, tile=TILE, provenance={}, max_stages=2,
                         rule=replace(rule, lam=lam, eps=lam))
        found = stand(plan, data, "head")
        place = places[0 if lam == 100.0 else -1]
        assert place.error == pytest.approx(found.total_error)
        assert place.latency_ms == pytest.approx(found.latency_ms(COST))


def test_the_standard_error_of_a_sampled_measurement():
    """Heads of a layer share their tiles and add up; layers and steps are independent."""
    data = search_state().measurement()
    deviation = np.random.default_rng(1).random(data.error.shape) * 0.01
    plan = paper_plan(search_state(), 3.0)
    found = stand(plan, replace(data, deviation=deviation))
    square = 0.0
    for step, layer in itertools.product(range(STEPS), range(2)):
        names = plan.stages[plan.stage_of(step, STEPS)].layers[layer]
        own = 0.0
        for head, name in enumerate(names):
            modes = [data.pattern(mode, layer, head) for mode in range(4)]
            if name != "full":
                own += deviation[step, layer, head, modes.index(plan.pattern(name))] / data.power[step, layer].mean()
        square += (WEIGHTS[step] / WEIGHTS.sum() * own / 6) ** 2
    assert found.deviation == pytest.approx(square**0.5)
    assert stand(plan, data).deviation is None
    nothing = replace(data, deviation=np.full(data.error.shape, np.nan))
    assert stand(plan, nothing).deviation is None
