"""The stage merge against enumeration of every way to cut the steps."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from svdit.plans.errors import SvditError
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal
from svdit.plans.schema import Plan
from svdit.plans.stages import Segment, merge, stages_of


def enumerated(loss: np.ndarray, max_stages: int) -> tuple[float, tuple[int, ...]]:
    """Best total and its cuts by trying all; equal totals: fewest stages, then the smallest cuts."""
    steps, found = len(loss), []
    for count in range(1, min(max_stages, steps) + 1):
        for inner in combinations(range(1, steps), count - 1):
            cuts = (0, *inner, steps)
            total = sum(
                float(
                    sum(
                        min(loss[a:b, i, h, m].sum() for m in range(loss.shape[3]))
                        for i in range(loss.shape[1])
                        for h in range(loss.shape[2])
                    )
                )
                for a, b in pairwise(cuts)
            )
            found.append((round(total, 9), count, cuts))
    total, _, cuts = min(found)
    return total, cuts


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_stages", [1, 2, 3, 7, 50])
def test_merge_is_the_best_of_all_cuts(seed, max_stages):
    random = np.random.default_rng(seed)
    loss = random.random((7, 2, 3, 4))
    total, cuts = enumerated(loss, max_stages)
    segments = merge(loss, max_stages)
    assert (*(s.start for s in segments), segments[-1].stop) == cuts
    assert sum(s.loss for s in segments) == pytest.approx(total, abs=1e-8)
    for s in segments:
        np.testing.assert_array_equal(s.choice, loss[s.start : s.stop].sum(0).argmin(-1))


def test_merge_with_ties_takes_fewest_stages_and_earliest_cut():
    loss = np.zeros((6, 1, 1, 2))
    assert [(s.start, s.stop) for s in merge(loss, 4)] == [(0, 6)]
    loss[:, 0, 0, 0] = [0, 0, 5, 5, 5, 5]  # mode 0 early, mode 1 late, equal at steps 0..1 and nowhere else
    loss[:, 0, 0, 1] = [1, 0, 0, 0, 0, 0]  # step 1 may go to either side
    assert [(s.start, s.stop) for s in merge(loss, 4)] == [(0, 1), (1, 6)]


def test_merge_with_a_stage_per_step_is_the_choice_per_step():
    loss = np.random.default_rng(0).random((5, 2, 2, 3))
    chosen = np.concatenate([np.repeat(s.choice[None], s.stop - s.start, 0) for s in merge(loss, 5)])
    np.testing.assert_array_equal(chosen, loss.argmin(-1))


def test_merge_prefers_the_first_mode_among_equals():
    (segment,) = merge(np.ones((3, 1, 1, 4)), 1)
    assert segment.choice.tolist() == [[0]]


@pytest.mark.parametrize(
    ("loss", "stages", "message"),
    [
        (np.zeros((3, 2, 2)), 1, r"loss: got shape \(3, 2, 2\); expected \[steps, layers, heads, modes\]"),
        (np.zeros((0, 2, 2, 1)), 1, "loss: got shape"),
        (np.full((1, 1, 1, 1), np.nan), 1, "1 values that are not finite"),
        (np.zeros((1, 1, 1, 1)), 0, "max_stages: got 0; expected an integer >= 1"),
        (np.zeros((1, 1, 1, 1)), 2.0, "max_stages: got 2.0"),
    ],
)
def test_merge_refuses(loss, stages, message):
    with pytest.raises(SvditError, match=message):
        merge(loss, stages)


@pytest.mark.parametrize("steps", [1, 3, 7, 25, 49, 50])
def test_stages_are_read_back_at_the_steps_where_they_were_cut(steps):
    cuts = sorted({0, steps // 3, steps // 2, steps})
    segments = [Segment(a, b, np.zeros((1, 1), int), 0.0) for a, b in pairwise(cuts)]
    names = [(("d",),)] * len(segments)
    plan = Plan(
        "m",
        Geometry((1, 1, 1), 0, "none", 1, 1, 64),
        (1, 1, 1),
        {"d": Diagonal()},
        stages_of(segments, steps, names),
        {},
    )
    expected = [i for i, s in enumerate(segments) for _ in range(s.start, s.stop)]
    assert [plan.stage_of(step, steps) for step in range(steps)] == expected
