"""A plan for a speed-up, a density or an error: stages and patterns chosen together for the whole trajectory.

Errors are additive: the sum over steps, layers and heads of relative errors, each step weighted (`plans.dynamics`).
Costs are additive too (`plans.cost`, or kept pairs for a density). For one price per unit of cost the best stages and
patterns are found exactly by `plans.stages.merge`; the price is driven to the target, then, with the cuts between
stages fixed, `plans.optimum.select` finds the best patterns exactly.

Shape letters: S steps, L layers, H heads, M modes; `full` is mode M.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from svdit.plans.cost import CostModel
from svdit.plans.errors import complain
from svdit.plans.fields import number, one_of
from svdit.plans.geometry import Geometry
from svdit.plans.optimum import Point, Selection, relative_gap, select, solve_dual
from svdit.plans.schema import Plan
from svdit.plans.search import Measurement, mode_density, plan_of_segments, relative_error, with_full
from svdit.plans.stages import Segment, merge

GOALS = ("speedup", "density", "error")
STEEP = 1e9
"""A price at which the cheaper choice wins whatever its error, in units of all error over all cost."""


@dataclass(frozen=True)
class Target:
    """speedup: dense time over plan time of one pass; density: kept pairs; error: weighted mean relative error."""

    goal: str
    amount: float

    def __post_init__(self) -> None:
        one_of(self.goal, "target", GOALS)
        expected = {"speedup": "a number of at least 1", "density": "a number above 0 and at most 1"}.get(
            self.goal, "a number above 0"
        )
        amount = number(self.amount, self.goal, expected)
        if amount <= 0 or (self.goal == "speedup" and amount < 1) or (self.goal == "density" and amount > 1):
            raise complain(self.goal, amount, expected)


@dataclass(frozen=True, eq=False)
class Budget:
    """The optimum. error and cost are means over steps (cost: ms a pass or density).

    bound      no plan with these modes and at most max_stages stages has a smaller objective (error, or cost for an
               error target) within the limit
    cuts_gap   proven gap once the cuts between stages are given; gap: proven gap altogether
    price      error per unit of cost at the optimum
    """

    segments: list[Segment]
    error: float
    cost: float
    bound: float
    gap: float
    cuts_gap: float
    price: float


def weighted_errors(measured: Measurement, weights: np.ndarray, normaliser: str = "layer") -> np.ndarray:
    """[S, L, H, M + 1] shares whose sum over steps, layers and heads is the weighted mean relative error."""
    relative = with_full(relative_error(measured.error, measured.power, normaliser), 0.0)
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != relative.shape[:1] or not (weights >= 0).all() or not weights.sum() > 0:
        raise complain("step weights", f"{weights.shape}", f"{len(relative)} numbers of at least 0, not all 0")
    places = relative.shape[1] * relative.shape[2]
    return relative * (weights / weights.sum() / places)[:, None, None, None]


def optimise(
    error: np.ndarray, cost: np.ndarray, limit: float, max_stages: int, *, limited: str, subject: str
) -> Budget:
    """Stages and modes with the least error within a cost, or (limited = "error") the least cost within an error.

    error [S, L, H, M + 1]; cost [L, H, M + 1] of one step; the total cost is the mean over steps. Raises SvditError
    about `subject` when no choice keeps to the limit.
    """
    steps = len(error)
    costs = np.broadcast_to(cost / steps, error.shape)
    value, weight = (error, costs) if limited == "cost" else (costs, error)
    steep = STEEP * float(value.max(-1).sum()) / max(float(weight.max(-1).sum()), 1e-300)

    def solve(price: float) -> Point[list[Segment]]:
        segments = merge(value + (steep if math.isinf(price) else price) * weight, max_stages)
        return Point(_total(value, segments), _total(weight, segments), segments)

    dual = solve_dual(solve, limit, subject)
    ends = [dual.inside] if dual.outside is None else [dual.inside, dual.outside]
    best: tuple[Selection, list[Segment]] | None = None
    for cuts in {tuple((s.start, s.stop) for s in end.choice): None for end in ends}:
        found = _at_cuts(value, weight, cuts, limit, subject)
        if found is not None and (best is None or found[0].value < best[0].value):
            best = found
    assert best is not None  # the choice of `inside` fits at its own cuts
    selection, segments = best
    price = dual.price if limited == "cost" else (1 / dual.price if dual.price else 0.0)
    bound = min(dual.bound, selection.value)
    gap = relative_gap(selection.value, bound)
    return Budget(segments, _total(error, segments), _total(costs, segments), bound, gap, selection.gap, price)


def _total(table: np.ndarray, segments: list[Segment]) -> float:
    sums = [np.take_along_axis(table[s.start : s.stop].sum(0), s.choice[..., None], -1).sum() for s in segments]
    return float(np.sum(sums))


def _at_cuts(
    value: np.ndarray, weight: np.ndarray, cuts: tuple[tuple[int, int], ...], limit: float, subject: str
) -> tuple[Selection, list[Segment]] | None:
    """The best modes for given stages; None when none fits at these cuts."""
    shape = (len(cuts), *value.shape[1:])
    by_stage = [np.stack([table[a:b].sum(0) for a, b in cuts]).reshape(-1, shape[-1]) for table in (value, weight)]
    if by_stage[1].min(1).sum() > limit * (1 + 1e-9):
        return None
    found = select(*by_stage, max(limit, float(by_stage[1].min(1).sum())), subject=subject)
    choice = found.choice.reshape(shape[:-1])
    losses = by_stage[0][np.arange(len(by_stage[0])), found.choice].reshape(len(cuts), -1).sum(1)
    return found, [Segment(a, b, choice[i], float(losses[i])) for i, (a, b) in enumerate(cuts)]


def budget_plan(
    measured: Measurement,
    target: Target,
    weights: np.ndarray,
    cost: CostModel | None,
    *,
    model: str,
    geometry: Geometry,
    tile: tuple[int, int, int],
    normaliser: str,
    max_stages: int,
    provenance: Mapping[str, object],
) -> Plan:
    """The best plan for a target. `cost` is needed for all but a density; with it the plan says its predicted speed."""
    density = mode_density(measured)
    error = weighted_errors(measured, weights, normaliser)
    if target.goal == "density":
        kept = density / density[..., 0].size
        found = optimise(error, kept, target.amount, max_stages, limited="cost", subject="density")
    elif cost is None:
        raise complain("cost model", "none", f"one for a target {target.goal}")
    elif target.goal == "error":
        found = optimise(error, cost.heads_ms(density), target.amount, max_stages, limited="error", subject="error")
    else:
        found = _for_speedup(error, cost, density, target.amount, max_stages)
    results: dict[str, object] = {
        "weighted_error": _rounded(found.error),
        "gap": _rounded(found.gap),
        "gap_at_these_cuts": _rounded(found.cuts_gap),
        "price": _rounded(found.price),
    }
    if cost is not None:
        results["predicted"] = predicted(cost, density, found.segments)
    record = {
        "method": "budget",
        "target": {target.goal: target.amount},
        "normaliser": normaliser,
        "steps": len(measured.error),
        "max_stages": max_stages,
        "step_weights": [_rounded(x) for x in weights],
        **provenance,
    }
    return plan_of_segments(
        measured,
        found.segments,
        model=model,
        geometry=geometry,
        tile=tile,
        normaliser=normaliser,
        record=record,
        results=results,
    )


def _for_speedup(error: np.ndarray, cost: CostModel, density: np.ndarray, speedup: float, max_stages: int) -> Budget:
    limit = cost.dense_ms / speedup - cost.fixed_ms
    heads = cost.heads_ms(density)
    least = float(heads.min(-1).sum())
    if limit < least:
        most = cost.dense_ms / (cost.fixed_ms + least) if cost.fixed_ms + least else math.inf
        raise complain("speedup", f"{speedup:g}", f"at most {most:.4g} with these candidates on {cost.hardware}")
    return optimise(error, heads, limit, max_stages, limited="cost", subject="speedup")


def predicted(cost: CostModel, density: np.ndarray, segments: list[Segment]) -> dict[str, object]:
    """Predicted times of one denoiser pass at batch 1 (mean over steps), and how much of that was measured."""
    heads = cost.heads_ms(density)
    steps = segments[-1].stop
    chosen = [np.take_along_axis(heads, s.choice[..., None], -1).sum() * (s.stop - s.start) for s in segments]
    latency = cost.fixed_ms + float(np.sum(chosen)) / steps
    return {
        "latency_ms": _rounded(latency),
        "dense_latency_ms": _rounded(cost.dense_ms),
        "speedup": _rounded(cost.dense_ms / latency) if latency else None,
        "scope": "attention" if cost.rest_ms is None else "model",
        **cost.record(),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")

