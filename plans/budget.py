"""A plan for a speed-up, a density or an error: stages and patterns chosen together for the whole trajectory.

Errors are the sum over steps, layers and heads of relative errors, each weighted (`plans.dynamics`, or as measured by
`runtime.sensitivity`). Where the coherence of steps was measured, errors E_i of steps are not added but combined, in
each video p, as sum over i, j of coherence_pij * sqrt(E_i * E_j): errors of two steps that point the same way grow like
amplitudes. A plan's error is then the geometric mean over videos, so that its logarithm goes like a mean PSNR.
Costs are additive (`plans.cost`, or kept pairs for a density). For one price per unit of cost the best stages and
patterns are found exactly by `plans.stages.merge`; the price is driven to the target, then, with the cuts between
stages fixed, `plans.optimum.select` finds the best patterns exactly.

Shape letters: P videos, S steps, L layers, H heads, M modes; `full` is mode M.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from svdit.plans.cost import CostModel, HeadWork, head_work
from svdit.plans.errors import complain
from svdit.plans.fields import number, one_of
from svdit.plans.geometry import Geometry
from svdit.plans.numbers import significant
from svdit.plans.optimum import ENOUGH, Point, Selection, relative_gap, select, solve_dual
from svdit.plans.patterns import Pattern
from svdit.plans.schema import Plan
from svdit.plans.search import Measurement, mode_density, plan_of_segments, with_full
from svdit.plans.stages import Segment, merge
from svdit.plans.tiles import Tiling

GOALS = ("speedup", "density", "error")
STEEP = 1e9
"""A price at which the cheaper choice wins whatever its error, in units of all error over all cost."""
ROUNDS = 12
"""Tangents that are solved, at most, where errors of steps are coherent."""
SMALL = 1e-6
"""Share of the largest step's error below which a step counts as this when the tangent is taken: it may be 0."""


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
    """[S, L, H, M + 1] shares whose sum over steps, layers and heads is the weighted mean relative error.

    weights [S], or [S, L, H] where heads were found to matter differently; only their proportions count.
    """
    relative = with_full(measured.relative(normaliser), 0.0)
    return relative * _proportions(weights, relative.shape[:3])[..., None]


def _proportions(weights: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """[S, L, H] weights that add up to 1."""
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape not in (shape[:1], shape) or not (weights >= 0).all() or not weights.sum() > 0:
        raise complain("step weights", f"{weights.shape}", f"{shape[0]} numbers of at least 0, not all 0")
    weights = np.broadcast_to(weights if weights.ndim == 3 else weights[:, None, None], shape)
    return weights / weights.sum()


def _by_step(weights: np.ndarray) -> np.ndarray:
    """[S] with mean 1."""
    mean = weights.reshape(len(weights), -1).mean(1)
    return mean / mean.mean()


def sampling_deviation(
    measured: Measurement,
    weights: np.ndarray,
    segments: list[Segment],
    normaliser: str = "layer",
    slopes: np.ndarray | float = 1.0,
) -> float | None:
    """Standard error of a choice's weighted error that comes from sampling query tiles; None: not known.

    slopes [S]: by which errors of steps count in what this is the error of.

    Heads of a layer were measured on the same tiles and are taken as wholly dependent; layers and steps drew theirs
    independently.
    """
    if measured.deviation is None:
        return None
    one = replace(measured, error=measured.deviation)
    table = weighted_errors(one, weights, normaliser)
    chosen = [np.take_along_axis(table[s.start : s.stop], s.choice[None, ..., None], -1).sum((2, 3)) for s in segments]
    by_layer = np.concatenate(chosen) * np.reshape(slopes, (-1, 1))
    return float(np.sqrt(np.square(by_layer).sum()))


def combined_error(by_step: np.ndarray, coherence: np.ndarray) -> float:
    """The error of a whole plan from those of its steps [S], under coherence [P, S, S]; 0 where a video has none."""
    amplitude = np.sqrt(by_step)
    videos = coherence @ amplitude @ amplitude
    return float(np.exp(np.log(videos).mean())) if (videos > 0).all() else 0.0


def tangent(by_step: np.ndarray, coherence: np.ndarray) -> np.ndarray:
    """[S] slopes of the combined error at errors [S] that make one; their product, summed, is the combined error."""
    amplitude = np.sqrt(by_step)
    pull = coherence @ amplitude
    mean = (pull / (pull @ amplitude)[:, None]).mean(0)
    return combined_error(by_step, coherence) * mean / np.sqrt(np.maximum(by_step, SMALL * by_step.max()))


def errors_by_step(table: np.ndarray, segments: list[Segment]) -> np.ndarray:
    """[S] summed entries of a choice in table [S, L, H, M + 1]."""
    parts = [np.take_along_axis(table[s.start : s.stop], s.choice[None, ..., None], -1) for s in segments]
    return np.concatenate([part.sum((1, 2, 3)) for part in parts])


def optimise_coherent(
    error: np.ndarray, coherence: np.ndarray, solve: Callable[[np.ndarray], Budget], limit: float | None
) -> tuple[Budget, float]:
    """A choice with little combined error, and that error: `solve` finds the best one for an additive error table.

    The combined error is concave in the errors of the steps, so its tangent is nowhere below it: each round solves the
    tangent at the choice before, and what is minimised falls from round to round, to a local minimum. `limit` bounds
    the combined error where `solve` minimises the cost within it; None where it minimises the error itself.
    """
    slopes = np.ones(len(error))
    best: tuple[Budget, float] | None = None
    for _ in range(ROUNDS):
        found = solve(error * slopes[:, None, None, None])
        by_step = errors_by_step(error, found.segments)
        combined = combined_error(by_step, coherence)
        if limit is None or combined <= limit * (1 + 1e-9):
            aim = combined if limit is None else found.cost
            if best is not None and aim >= (best[1] if limit is None else best[0].cost) * (1 - ENOUGH):
                break
            best = found, combined
        if not combined:
            break
        slopes = tangent(by_step, coherence)
    assert best is not None  # the second round keeps to the limit of its tangent, and so to the limit
    return best


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
    heaviest = float(weight.max(-1).sum())
    steep = STEEP * float(value.max(-1).sum()) / heaviest if heaviest else 1.0

    def solve(price: float) -> Point[list[Segment]]:
        segments = merge(value + (steep if math.isinf(price) else price) * weight, max_stages)
        return Point(total(value, segments), total(weight, segments), segments)

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
    return Budget(segments, total(error, segments), total(costs, segments), bound, gap, selection.gap, price)


def total(table: np.ndarray, segments: list[Segment]) -> float:
    """Sum of [S, L, H, M] over steps, layers and heads at the modes that were chosen."""
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
    coherence: np.ndarray | None = None,
    model: str,
    geometry: Geometry,
    tile: tuple[int, int, int],
    normaliser: str,
    max_stages: int,
    provenance: Mapping[str, object],
) -> Plan:
    """The best plan for a target. `cost` is needed for all but a density; with it the plan says its predicted speed.

    weights [S] or [S, L, H] as for `weighted_errors`; coherence [P, S, S] of the steps' errors. None: they
    add up.
    """
    density = mode_density(measured)
    error = weighted_errors(measured, weights, normaliser)
    if cost is None and target.goal != "density":
        raise complain("cost model", "none", f"one for a target {target.goal}")
    heads = None if cost is None else mode_ms(cost, measured, Tiling(geometry, tile))

    def solve(table: np.ndarray) -> Budget:
        if target.goal == "density":
            kept = density / density[..., 0].size
            return optimise(table, kept, target.amount, max_stages, limited="cost", subject="density")
        if target.goal == "error":
            return optimise(table, heads, target.amount, max_stages, limited="error", subject="error")
        return _for_speedup(table, cost, heads, target.amount, max_stages)

    results: dict[str, object] = {}
    if coherence is None:
        found = solve(error)
    else:
        limit = target.amount if target.goal == "error" else None
        found, combined = optimise_coherent(error, coherence, solve, limit)
        results["combined_error"] = significant(combined)
    results |= {
        "weighted_error": significant(total(error, found.segments)),
        "gap": significant(found.gap),
        "gap_at_these_cuts": significant(found.cuts_gap),
        "price": significant(found.price),
    }
    deviation = sampling_deviation(measured, weights, found.segments, normaliser)
    if deviation is not None:
        results["sampling_deviation"] = significant(deviation, 3)
    if cost is not None:
        results["predicted"] = predicted(cost, heads, found.segments)
    record = {
        "method": "budget",
        "target": {target.goal: target.amount},
        "normaliser": normaliser,
        "steps": len(measured.error),
        "max_stages": max_stages,
        "step_weights": [significant(x) for x in _by_step(weights)],
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


def mode_ms(cost: CostModel, measured: Measurement, tiling: Tiling) -> np.ndarray:
    """[L, H, M + 1] milliseconds of every mode of every head in one pass, `full` last."""
    density = mode_density(measured)
    if cost.counts_density_alone:
        return cost.heads_ms(HeadWork(density))
    milliseconds = np.full(density.shape, float(cost.heads_ms(cost.full)))
    known: dict[Pattern, float] = {}
    for layer, head, mode in np.ndindex(*measured.sparsity.shape):
        pattern = measured.pattern(mode, layer, head)
        if pattern not in known:
            known[pattern] = float(cost.heads_ms(head_work(tiling, [tiling.mask(pattern)]))[0])
        milliseconds[layer, head, mode] = known[pattern]
    return milliseconds


def _for_speedup(error: np.ndarray, cost: CostModel, heads: np.ndarray, speedup: float, max_stages: int) -> Budget:
    limit = cost.dense_ms / speedup - cost.fixed_ms
    least = float(heads.min(-1).sum())
    if limit < least:
        most = cost.dense_ms / (cost.fixed_ms + least) if cost.fixed_ms + least else math.inf
        raise complain("speedup", f"{speedup:g}", f"at most {most:.4g} with these candidates on {cost.hardware}")
    return optimise(error, heads, limit, max_stages, limited="cost", subject="speedup")


def predicted(cost: CostModel, heads: np.ndarray, segments: list[Segment]) -> dict[str, object]:
    """Predicted times of one denoiser pass (mean over steps), and how much of that was measured.

    heads [L, H, M + 1]: milliseconds of each mode.
    """
    steps = segments[-1].stop
    chosen = [np.take_along_axis(heads, s.choice[..., None], -1).sum() * (s.stop - s.start) for s in segments]
    latency = cost.fixed_ms + float(np.sum(chosen)) / steps
    return {
        "latency_ms": significant(latency),
        "dense_latency_ms": significant(cost.dense_ms),
        "speedup": significant(cost.dense_ms / latency) if latency else None,
        "scope": "attention" if cost.rest_ms is None else "model",
        **cost.record(),
    }
