"""Where a plan stands between error and cost: its own place, the best plans at each cost, those of the paper's rule.

Errors are weighted mean relative errors, combined under the coherence of steps where that was measured
(`plans.budget`); costs are those of `plans.cost`.
Shape letters: P videos, S steps, L layers, H heads, M modes (`full` is mode M), G stages of a plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from svdit.plans.budget import (
    ENOUGH,
    ROUNDS,
    STEEP,
    Budget,
    combined_error,
    errors_by_step,
    optimise,
    optimise_coherent,
    sampling_deviation,
    tangent,
    total,
    weighted_errors,
)
from svdit.plans.cost import CostModel
from svdit.plans.errors import complain
from svdit.plans.fields import shown
from svdit.plans.optimum import ROUNDING, Point
from svdit.plans.patterns import Full, Pattern
from svdit.plans.schema import Plan
from svdit.plans.search import Measurement, Rule, loss_table, mode_density, with_full
from svdit.plans.stages import Segment, merge

RULE_PRICES = np.geomspace(1e-3, 1e2, 26)
"""Values of lam = eps along which the paper's rule is followed."""


@dataclass(frozen=True, eq=False)
class Standing:
    """A plan by one measurement. Arrays are [G, L, H] unless stated.

    error      its part of the plan's error, summed over the stage's steps
    relative   relative error of a step, mean over the stage's steps, not weighted (0 where the stage has no step)
    density    kept share of the query-key pairs
    ms         predicted time in one pass
    steps      int [G]: steps of each stage
    by_step    [S]: each step's part of the plan's error
    deviation  standard error of the plan's error from the sample of query tiles; None: not known
    """

    error: np.ndarray
    relative: np.ndarray
    density: np.ndarray
    ms: np.ndarray
    steps: np.ndarray
    by_step: np.ndarray
    deviation: float | None

    @property
    def total_error(self) -> float:
        return float(self.error.sum())

    @property
    def mean_density(self) -> float:
        return float(self.density.mean((1, 2)) @ self.steps / self.steps.sum())

    def pass_ms(self, cost: CostModel) -> np.ndarray:
        """[G]: predicted time of one denoiser pass in each stage."""
        return cost.fixed_ms + self.ms.sum((1, 2))

    def latency_ms(self, cost: CostModel) -> float:
        """Predicted time of a pass, mean over the steps."""
        return float(self.pass_ms(cost) @ self.steps / self.steps.sum())


@dataclass(frozen=True)
class Place:
    """One plan on a trade-off curve."""

    latency_ms: float
    error: float


def standing(
    plan: Plan,
    measured: Measurement,
    weights: np.ndarray,
    normaliser: str,
    heads_ms: np.ndarray,
    coherence: np.ndarray | None = None,
) -> Standing:
    """Look a plan up in a measurement. Raises SvditError for a pattern that was not measured.

    weights    [S] or [S, L, H], as in `plans.budget.weighted_errors`
    heads_ms   [L, H, M + 1]: milliseconds of every mode (`plans.budget.mode_ms`)
    coherence  [P, S, S] of the steps' errors; each counts by the slope that it has at this plan. None: they add up
    """
    modes = chosen_modes(plan, measured)
    steps = len(measured.error)
    counts = np.bincount([plan.stage_of(step, steps) for step in range(steps)], minlength=len(plan.stages))
    ends = np.cumsum(counts).tolist()
    segments = [Segment(a, b, choice, 0.0) for a, b, choice in zip([0, *ends], ends, modes, strict=False)]
    weighted = weighted_errors(measured, weights, normaliser)
    slopes = _slopes(errors_by_step(weighted, segments), coherence)
    weighted = weighted * slopes[:, None, None, None]
    relative = with_full(measured.relative(normaliser), 0.0)

    def of(table: np.ndarray, choice: np.ndarray) -> np.ndarray:
        return np.take_along_axis(table, choice[..., None], -1)[..., 0]

    lost = [of(relative[s.start : s.stop].sum(0), s.choice) for s in segments]
    by_step = [of(weighted[step], s.choice).sum() for s in segments for step in range(s.start, s.stop)]
    deviation = sampling_deviation(measured, weights, segments, normaliser, slopes)
    return Standing(
        error=np.stack([of(weighted[s.start : s.stop].sum(0), s.choice) for s in segments]),
        relative=np.stack(lost) / np.maximum(counts, 1)[:, None, None],
        density=np.stack([of(mode_density(measured), choice) for choice in modes]),
        ms=np.stack([of(heads_ms, choice) for choice in modes]),
        steps=counts,
        by_step=np.array(by_step),
        deviation=deviation if deviation is not None and math.isfinite(deviation) else None,
    )


def _slopes(by_step: np.ndarray, coherence: np.ndarray | None) -> np.ndarray:
    """[S] by which errors [S] of steps count in their sum."""
    if coherence is None or not combined_error(by_step, coherence):
        return np.ones(len(by_step))
    return tangent(by_step, coherence)


def chosen_modes(plan: Plan, measured: Measurement) -> np.ndarray:
    """int [G, L, H]: the mode whose pattern each head has, M where it is full."""
    layers, heads, num_modes = measured.sparsity.shape
    found = np.empty((len(plan.stages), layers, heads), dtype=np.int64)
    for layer in range(layers):
        for head in range(heads):
            mode_of: dict[Pattern, int] = {}
            for mode in range(num_modes):
                mode_of.setdefault(measured.pattern(mode, layer, head), mode)
            for i, stage in enumerate(plan.stages):
                name = stage.layers[layer][head]
                pattern = plan.pattern(name)
                mode = num_modes if isinstance(pattern, Full) else mode_of.get(pattern)
                if mode is None:
                    raise complain(
                        f"stages[{i}].layers[{layer}][{head}]",
                        f"the pattern {shown(name)}",
                        "a pattern that the search measured for this head",
                        "give the state (*.search.npz) that the plan was chosen from",
                    )
                found[i, layer, head] = mode
    return found


def best_places(
    error: np.ndarray,
    heads_ms: np.ndarray,
    fixed_ms: float,
    max_stages: int,
    coherence: np.ndarray | None = None,
    count: int = 24,
) -> list[Place]:
    """Corners of the lower convex hull of all plans, cheapest first: each has the least error at its cost.

    error [S, L, H, M + 1]: `plans.budget.weighted_errors`; heads_ms [L, H, M + 1]; fixed_ms: what no plan changes.
    Under a coherence [P, S, S] corners are local minima, found by following tangents
    (`plans.budget.optimise_coherent`).
    """
    heads = np.broadcast_to(heads_ms / len(error), error.shape)
    steep = STEEP * float(error.max(-1).sum()) / max(float(heads.max(-1).sum()), 1e-300)

    def solve(price: float) -> Point[list[Segment]]:
        slopes, best = np.ones(len(error)), None
        price = steep if math.isinf(price) else price
        for _ in range(1 if coherence is None else ROUNDS):
            segments = merge(error * slopes[:, None, None, None] + price * heads, max_stages)
            point = Point(_plan_error(error, segments, coherence), total(heads, segments), segments)
            if best is not None and _priced(point, price) >= _priced(best, price) * (1 - ENOUGH):
                break
            best = point
            slopes = _slopes(errors_by_step(error, segments), coherence)
        return best

    return [Place(fixed_ms + point.weight, point.value) for point in hull(solve, count)]


def _priced(point: Point[list[Segment]], price: float) -> float:
    return point.value + price * point.weight


def _plan_error(error: np.ndarray, segments: list[Segment], coherence: np.ndarray | None) -> float:
    """Of a choice in error [S, L, H, M + 1]: the sum, or what the steps' errors come to under their coherence."""
    if coherence is None:
        return total(error, segments)
    return combined_error(errors_by_step(error, segments), coherence)


def rule_places(
    measured: Measurement,
    error: np.ndarray,
    heads_ms: np.ndarray,
    fixed_ms: float,
    max_stages: int,
    rule: Rule,
    coherence: np.ndarray | None = None,
) -> list[Place]:
    """Plans of the paper's rule with lam = eps from cheap to dear, cheapest first; `rule` has the other terms."""
    heads = np.broadcast_to(heads_ms / len(error), error.shape)
    places: dict[Place, None] = {}
    for price in RULE_PRICES[::-1].tolist():
        segments = merge(loss_table(measured, replace(rule, lam=price, eps=price)), max_stages)
        places[Place(fixed_ms + total(heads, segments), _plan_error(error, segments, coherence))] = None
    return list(places)


def least_error(
    error: np.ndarray, heads_ms: np.ndarray, limit_ms: float, max_stages: int, coherence: np.ndarray | None = None
) -> float:
    """The least error of all plans whose heads take at most `limit_ms` a pass, within the optimiser's proven gap.

    Under a coherence [P, S, S]: of a local minimum.
    """

    def solve(table: np.ndarray) -> Budget:
        return optimise(table, heads_ms, limit_ms, max_stages, limited="cost", subject="latency")

    return solve(error).error if coherence is None else optimise_coherent(error, coherence, solve, None)[1]


def hull(solve: Callable[[float], Point[list[Segment]]], count: int) -> list[Point[list[Segment]]]:
    """Up to `count` corners of the lower convex hull of all choices, lightest first.

    `solve(price)` returns a choice that minimises value + price * weight. The edge that spans most weight is split
    first, so the corners that are found spread over all weights.
    """
    points, edges = [solve(math.inf), solve(0.0)], set()
    while len(points) < count:
        open_edges = [(a, b) for a, b in pairwise(points) if (a.weight, b.weight) not in edges and b.weight > a.weight]
        if not open_edges:
            break
        a, b = max(open_edges, key=lambda edge: edge[1].weight - edge[0].weight)
        price = (a.value - b.value) / (b.weight - a.weight)
        found = solve(price)
        line = a.value + price * a.weight
        below = found.value + price * found.weight < line - ROUNDING * abs(line)
        if below and a.weight < found.weight < b.weight:
            points.insert(points.index(b), found)
        else:
            edges.add((a.weight, b.weight))
    return points
