"""Step weights against the propagation that they stand for, integrated numerically."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from svdit.plans.dynamics import fit_spread, step_weights
from svdit.plans.errors import SvditError

NOISE = np.linspace(1, 0, 26)
NOISE = 3 * NOISE / (1 + 2 * NOISE)  # flow matching with shift 3, as the tiny model


def final_error(spread: float, step: int, noise: np.ndarray) -> float:
    """A velocity error of the size of the undecided part, put in at one step, carried to the end by the exact flow.

    Pictures are normal with standard deviation `spread`: v = (noise - (1 - noise) spread^2) x / ((1 - noise)^2 spread^2
    + noise^2), integrated with many small steps.
    """
    here = noise[step]
    undecided = spread / np.sqrt(((1 - here) * spread) ** 2 + here**2)
    x = abs(noise[step + 1] - here) * undecided
    path = np.linspace(noise[step + 1], 0, 40001)
    for a, b in pairwise(path):
        level = (a + b) / 2
        x += (b - a) * (level - (1 - level) * spread**2) * x / (((1 - level) * spread) ** 2 + level**2)
    return x**2


@pytest.mark.parametrize("spread", [1.0, 4.0, 16.0])
def test_weights_are_what_the_flow_makes_of_an_error(spread):
    weights = step_weights(1 - NOISE, NOISE, spread)
    steps = (0, 3, 12, 24)
    expected = np.array([final_error(spread, i, NOISE) for i in steps])
    np.testing.assert_allclose(weights[list(steps)] / weights[12], expected / expected[2], rtol=1e-3)


def test_early_steps_weigh_more():
    weights = step_weights(1 - NOISE, NOISE, 16.0)
    assert weights.mean() == pytest.approx(1) and weights[:5].mean() > 20 * weights[8:].mean()


def test_variance_preserving_schedules_are_the_same_thing():
    """A schedule and its rescaling to signal^2 + noise^2 = 1 walk through the same latents up to a factor."""
    angle = np.arctan2(NOISE, 1 - NOISE)
    weights = step_weights(np.cos(angle), np.sin(angle), 16.0)
    assert (weights > 0).all() and weights[:5].mean() > weights[8:].mean()
    injected = np.sin(angle[:-1] - angle[1:])
    size = 1 / np.hypot(np.cos(angle), np.sin(angle) / 16)
    np.testing.assert_allclose(weights, (p := np.square(injected * size[:-1] * size[1:])) / p.mean(), rtol=1e-9)


def test_fit_finds_the_spread_that_made_the_runs():
    random = np.random.default_rng(0)
    errors = random.random((8, 25)) ** 2
    decibels = 30 - 10 * np.log10(errors @ step_weights(1 - NOISE, NOISE, 9.0))
    found = fit_spread(1 - NOISE, NOISE, errors, decibels)
    assert found.spread == pytest.approx(9.0, rel=0.06)
    assert found.residual_db < 0.1 and found.rank > 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [0.0]), "noise schedule: got shapes"),
        (([0.0, 1.0], [0.0, 0.0]), "noise schedule: got levels that are not finite or all zero"),
        (([0.5, 0.5], [0.5, 0.5]), "noise schedule: got levels that never change"),
        (([0.0, 1.0], [1.0, 0.0], 0.5), "spread: got 0.5; expected a number of at least 1"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(SvditError, match=message):
        step_weights(*arguments)
    with pytest.raises(SvditError, match="runs: got errors of shape"):
        fit_spread(1 - NOISE, NOISE, np.ones((2, 25)), [1.0, 2.0])
