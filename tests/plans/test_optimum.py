"""The optimiser against every possible choice, enumerated, on small problems."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from svdit.plans.budget import combined_error, errors_by_step, optimise, optimise_coherent, tangent
from svdit.plans.errors import SvditError
from svdit.plans.optimum import relative_gap, select

QUICK = settings(max_examples=25, deadline=None, derandomize=True)


def tables(draw, whole):
    """value, weight [n, M] and a limit; integers give many ties and limits that are met exactly."""
    places, options = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    numbers = st.integers(0, 12).map(float) if whole else st.floats(0, 1, width=32)
    value, weight = (draw(arrays(np.float64, (places, options), elements=numbers)) for _ in range(2))
    share = draw(st.floats(0, 1))
    low, high = weight.min(1).sum(), weight.max(1).sum()
    limit = low + share * (high - low)
    return value, weight, float(math.floor(limit)) if whole and math.floor(limit) >= low else float(limit)


whole_problems = st.composite(lambda draw: tables(draw, True))()
real_problems = st.composite(lambda draw: tables(draw, False))()


def best_of_all(value, weight, limit):
    """Least value over all choices within the limit."""
    rows = np.arange(len(value))
    totals = [
        (value[rows, list(choice)].sum(), weight[rows, list(choice)].sum())
        for choice in itertools.product(range(value.shape[1]), repeat=len(value))
    ]
    return min(v for v, w in totals if w <= limit * (1 + 1e-9))


def check(value, weight, limit):
    found, rows = select(value, weight, limit, enough=0.0), np.arange(len(value))
    assert found.value == pytest.approx(value[rows, found.choice].sum(), rel=1e-12, abs=1e-12)
    assert found.weight == pytest.approx(weight[rows, found.choice].sum(), rel=1e-12, abs=1e-12)
    assert found.weight <= limit * (1 + 1e-9) + 1e-12
    truth = best_of_all(value, weight, limit)
    assert found.bound <= truth * (1 + 1e-9) + 1e-9, "the bound is no bound"
    assert found.value == pytest.approx(truth, rel=1e-6, abs=1e-6)


@QUICK
@given(whole_problems)
def test_integers_against_brute_force(problem):
    check(*problem)


@QUICK
@given(real_problems)
def test_reals_against_brute_force(problem):
    check(*problem)


@QUICK
@given(whole_problems)
def test_what_may_not_be_taken_is_not(problem):
    value, weight, _ = problem
    value[:, 0] = np.inf
    if value.shape[1] == 1:
        with pytest.raises(SvditError, match="options: got a place without a finite value"):
            select(value, weight, 1.0)
        return
    assert (select(value, weight, weight.max(1).sum()).choice > 0).all()


def test_a_gap_between_hull_and_optimum_is_closed():
    """The hull alone takes the first place (ratio 10 / 6), which leaves no room; the other two together are better."""
    value = np.array([[10.0, 0.0], [8.0, 0.0], [8.0, 0.0]])
    weight = np.array([[0.0, 6.0], [0.0, 5.0], [0.0, 5.0]])
    found = select(value, weight, 10.0)
    assert found.choice.tolist() == [0, 1, 1]
    assert (found.value, found.weight, found.gap) == (10.0, 10.0, 0.0)


def test_nothing_fits():
    with pytest.raises(SvditError, match="speedup: got 1; expected at least 3; nothing lighter is among the options"):
        select(np.zeros((3, 2)), np.ones((3, 2)), 1.0, subject="speedup")


@pytest.mark.parametrize(
    ("value", "weight", "message"),
    [
        (np.zeros((2, 2)), np.zeros((2, 3)), "options: got shapes"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "options: got shapes"),
        (np.zeros((1, 2)), np.array([[np.inf, 1.0]]), "options: got shapes"),
        (np.array([[np.nan, 1.0]]), np.ones((1, 2)), "options: got a place without a finite value"),
    ],
)
def test_refuses(value, weight, message):
    with pytest.raises(SvditError, match=message):
        select(value, weight, 1.0)


def test_nothing_is_printed(capfd):
    """HiGHS 1.12 prints a line of its own for this problem."""
    random = np.random.default_rng(9)
    weight = np.sort(random.random((96, 60)), axis=1)
    falls = np.exp(-random.uniform(2, 8, (96, 1)) * weight)
    value = falls * random.lognormal(0, 0.3, (96, 60)) * random.lognormal(0, 2, (96, 1))
    print("before")
    assert select(value, weight, 0.35 * 96, enough=0.0).gap < 1e-9
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"


def test_rounding_is_no_gap():
    assert relative_gap(1.0, 1.0 - 1e-13) == 0.0 and relative_gap(1.0, 2.0) == 0.0
    assert relative_gap(2.0, 1.0) == 0.5


def trajectories(draw):
    """error [S, L, H, M], cost [L, H, M], a limit on the mean cost, most stages."""
    steps, heads, options = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(2, 3))
    numbers = st.integers(0, 9).map(float)
    error = draw(arrays(np.float64, (steps, 1, heads, options), elements=numbers))
    cost = draw(arrays(np.float64, (1, heads, options), elements=numbers))
    low, high = cost.min(-1).sum(), cost.max(-1).sum()
    return error, cost, low + draw(st.floats(0, 1)) * (high - low), draw(st.integers(1, steps))


def best_trajectory(error, cost, limit, max_stages):
    """Least summed error over all cuts and all modes, enumerated."""
    steps, _, heads, options = error.shape
    best = np.inf
    for count in range(min(max_stages, steps)):
        for cuts in itertools.combinations(range(1, steps), count):
            edges = [0, *cuts, steps]
            stages = list(itertools.pairwise(edges))
            for choice in itertools.product(range(options), repeat=heads * len(stages)):
                total = spent = 0.0
                for i, (a, b) in enumerate(stages):
                    for h in range(heads):
                        mode = choice[i * heads + h]
                        total += error[a:b, 0, h, mode].sum()
                        spent += cost[0, h, mode] * (b - a) / steps
                if spent <= limit * (1 + 1e-9) + 1e-12:
                    best = min(best, total)
    return best


@QUICK
@given(st.composite(trajectories)())
def test_stages_and_modes_within_the_proven_gap(problem):
    """Never better than the truth, never a bound above it, and as close as the gap says."""
    error, cost, limit, max_stages = problem
    found = optimise(error, cost, limit, max_stages, limited="cost", subject="density")
    truth = best_trajectory(error, cost, limit, max_stages)
    assert len(found.segments) <= max_stages
    assert found.cost <= limit * (1 + 1e-8) + 1e-9
    assert found.error >= truth - 1e-9
    assert found.bound <= truth + 1e-7
    assert found.error * (1 - found.gap) == pytest.approx(found.bound, abs=1e-7)
    assert found.cuts_gap <= 2e-4


@QUICK
@given(st.composite(trajectories)())
def test_least_cost_for_an_error(problem):
    """The other direction: what it spends cannot be undercut, and its error is within the limit."""
    error, cost, _, max_stages = problem
    limit = float(error.min(-1).sum() * 1.3 + 0.5)
    if error.sum(0).min(-1).sum() > limit:  # at one stage nothing fits; more stages are another problem
        return
    found = optimise(error, cost, limit, max_stages, limited="error", subject="error")
    assert found.error <= limit * (1 + 1e-8)
    assert best_trajectory(error, cost, found.bound * (1 - 1e-6) - 1e-6, max_stages) > limit * (1 - 1e-9)


def coherent_trajectories(draw):
    error, cost, limit, max_stages = trajectories(draw)
    steps = len(error)
    videos = draw(st.integers(1, 3))
    sides = draw(arrays(np.float64, (videos, steps, 3), elements=st.integers(0, 3).map(float))) + 0.1
    length = np.linalg.norm(sides, axis=2, keepdims=True)  # cosines of vectors without negative parts, times
    sides *= np.exp(np.log(length).mean(0)) ** -1  # lengths whose geometric mean over videos is 1
    return error, cost, limit, max_stages, sides @ sides.transpose(0, 2, 1)


@QUICK
@given(st.composite(coherent_trajectories)())
def test_coherent_steps_keep_the_limit_and_beat_the_additive_choice(problem):
    """No worse than what adding errors would choose, and no better than errors that only add could be."""
    error, cost, limit, max_stages, coherence = problem

    def solve(table):
        return optimise(table, cost, limit, max_stages, limited="cost", subject="density")

    found, combined = optimise_coherent(error, coherence, solve, None)
    assert found.cost <= limit * (1 + 1e-8) + 1e-9 and len(found.segments) <= max_stages
    assert combined == pytest.approx(combined_error(errors_by_step(error, found.segments), coherence))
    additive = solve(error)
    assert combined <= combined_error(errors_by_step(error, additive.segments), coherence) * (1 + 1e-9) + 1e-9
    assert combined >= additive.bound - 1e-6, "amplitudes that do not cancel are no less than squares"


@QUICK
@given(st.composite(coherent_trajectories)())
def test_coherent_steps_keep_a_limit_on_the_error(problem):
    error, cost, _, max_stages, coherence = problem
    every = combined_error(error.max((1, 3)).sum(1), coherence)

    def solve(table):
        return optimise(table, cost, 0.6 * every + 0.5, max_stages, limited="error", subject="error")

    try:
        found, combined = optimise_coherent(error, coherence, solve, 0.6 * every + 0.5)
    except SvditError:
        return  # nothing fits
    assert combined <= (0.6 * every + 0.5) * (1 + 1e-6)
    assert combined == pytest.approx(combined_error(errors_by_step(error, found.segments), coherence))


def test_coherence_moves_error_to_a_step_that_stands_alone():
    """One head, half of four steps to keep. Errors of the first three steps add up like amplitudes, the last apart."""
    error = np.array([1.0, 1.1, 1.3, 1.25])[:, None, None, None] * np.array([1.0, 0.0])
    coherence = np.eye(4)[None]
    coherence[:, :3, :3] = 1.0

    def solve(table):
        return optimise(table, np.array([[[0.0, 1.0]]]), 0.5, 4, limited="cost", subject="density")

    additive = solve(error)
    assert errors_by_step(error, additive.segments).tolist() == [1.0, 1.1, 0, 0]
    found, combined = optimise_coherent(error, coherence, solve, None)
    assert errors_by_step(error, found.segments).tolist() == [1.0, 0, 0, 1.25] and combined == pytest.approx(2.25)


def test_a_plan_is_chosen_by_the_geometric_mean_over_videos():
    """Two steps, one to keep. By the mean over videos the first counts 2.005 and the second 1; a mean PSNR says 0.2."""
    error = np.ones((2, 1, 1, 2)) * np.array([1.0, 0.0])
    coherence = np.array([np.diag([4.0, 1.0]), np.diag([0.01, 1.0])])

    def solve(table):
        return optimise(table, np.array([[[0.0, 1.0]]]), 0.5, 2, limited="cost", subject="density")

    loud = error * np.array([2.005, 1.0])[:, None, None, None]
    assert errors_by_step(error, solve(loud).segments).tolist() == [0.0, 1.0]
    found, combined = optimise_coherent(error, coherence, solve, None)
    assert errors_by_step(error, found.segments).tolist() == [1.0, 0.0]
    assert combined == pytest.approx(0.2) and -10 * np.log10(combined) == pytest.approx(-5 * np.log10([4, 0.01]).sum())


@QUICK
@given(st.composite(coherent_trajectories)())
def test_slopes_of_the_combined_error(problem):
    """By differences in float64; the tangent through a choice is nowhere below the error of another one."""
    error, *_, coherence = problem
    here, there = error.max((1, 3)).sum(1) + 0.5, error.mean((1, 3)).sum(1) + 0.1
    slopes = tangent(here, coherence)
    assert slopes @ here == pytest.approx(combined_error(here, coherence))
    for step in range(len(here)):
        moved = np.eye(len(here))[step] * here[step] * 1e-5
        risen = combined_error(here + moved, coherence) - combined_error(here - moved, coherence)
        assert slopes[step] == pytest.approx(risen / (2 * moved[step]), rel=1e-5)
    assert slopes @ there >= combined_error(there, coherence) * (1 - 1e-9)


def test_seconds_for_a_large_model():
    """5 stages x 60 layers x 24 heads x 100 candidates."""
    random = np.random.default_rng(0)
    density = np.append(np.sort(random.random(100)) * 0.85, 1.0)
    falls = np.exp(-random.uniform(2, 8, (7200, 1)) * density[:-1]) * random.lognormal(0, 0.3, (7200, 100))
    value = np.append(np.exp(random.normal(size=(7200, 1)) * 2) * falls, np.zeros((7200, 1)), axis=1)
    began = time.perf_counter()
    found = select(value, np.broadcast_to(density / 7200, value.shape), 0.35)
    assert time.perf_counter() - began < 60
    assert found.weight <= 0.35 * (1 + 1e-9) and found.gap < 2e-4
