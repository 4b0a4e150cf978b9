"""The numbers of a search report: what a plan keeps, loses and costs by the search that it came from."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from svdit.plans.budget import mode_ms, weighted_errors
from svdit.plans.cost import CostModel, Hardware, cost_model
from svdit.plans.dynamics import DEFAULT_SPREAD, step_weights
from svdit.plans.errors import complain, rooted
from svdit.plans.fields import number
from svdit.plans.flops import flops_of
from svdit.plans.report.judged import JudgedPlan
from svdit.plans.report.tradeoff import Standing, least_error, standing
from svdit.plans.schema import Plan, read_plan
from svdit.plans.search import NORMALISERS, Measurement
from svdit.plans.search_state import SearchState, noise_levels, read_state

WORST = 12
"""Heads in the list of the largest errors."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A plan with the state that its patterns were measured in, and how its errors and times are counted.

    weights    [S] or [S, L, H] of errors
    coherence  [P, S, S] of the steps' errors; None: they add up
    cost       the cost model of its size
    sha256     of the files that it was read from, by name
    """

    name: str
    plan: Plan
    state: SearchState
    weights: np.ndarray
    coherence: np.ndarray | None
    normaliser: str
    cost: CostModel
    sha256: dict[str, str]

    @property
    def method(self) -> str:
        return str(self.plan.provenance.get("method", "not stated"))

    @cached_property
    def measured(self) -> Measurement:
        return self.state.measurement()

    @cached_property
    def heads_ms(self) -> np.ndarray:
        """[L, H, M + 1] milliseconds of every mode."""
        return mode_ms(self.cost, self.measured, self.plan.tiling())

    @cached_property
    def errors(self) -> np.ndarray:
        """[S, L, H, M + 1] weighted errors of every mode."""
        return weighted_errors(self.measured, self.weights, self.normaliser)

    @cached_property
    def standing(self) -> Standing:
        """Raises SvditError for a pattern that the state has not."""
        with rooted(f"{self.name}: $."):
            return standing(self.plan, self.measured, self.weights, self.normaliser, self.heads_ms, self.coherence)

    @property
    def latency_ms(self) -> float:
        return self.standing.latency_ms(self.cost)


def read_entry(plan_file: Path, state_file: Path, hardware: Hardware, like: Entry | None = None) -> Entry:
    """A plan and its state. Raises SvditError when they are of different models or sizes, or other ones than `like`.

    Errors are weighted and times predicted as for `like`, so that both can stand on one curve.
    """
    plan, state = read_plan(plan_file), read_state(state_file)
    name = plan_file.name.removesuffix(".json").removesuffix(".plan")
    for what, own in (("model", plan.model), ("tile", list(plan.tile))):
        _require(f"{plan_file}: $.{what}", own, state.settings.get(what), str(state_file))
    plan.geometry.require_same(state.geometry, f"{plan_file}: $.geometry", str(state_file))
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (plan_file, state_file)}
    if like is None:
        cost = cost_model(hardware, plan.model, plan.geometry)
        normaliser = plan.provenance.get("normaliser")
        normaliser = normaliser if normaliser in NORMALISERS else NORMALISERS[0]
        weights = _weights(plan, state)
        coherence = state.coherence if weights is state.sensitivity else None
        return Entry(name, plan, state, weights, coherence, normaliser, cost, hashes)
    _require(f"{name}: model", plan.model, like.plan.model, like.name)
    _require(f"{name}: steps", state.steps, like.state.steps, like.name)
    plan.geometry.require_same(like.plan.geometry, f"{name}: $.geometry", like.name)
    return Entry(name, plan, state, like.weights, like.coherence, like.normaliser, like.cost, hashes)


def _weights(plan: Plan, state: SearchState) -> np.ndarray:
    """Weights of errors: those that the plan was optimised with; of other plans the measured ones, if there are any."""
    state.measurement()
    wanted = plan.provenance.get("weights")
    if state.sensitivity is not None and wanted in (None, "measured"):
        return state.sensitivity
    if wanted == "measured":
        raise complain("search state", "no measured weights", "those that the plan was chosen with", "name its --state")
    spread = number(plan.provenance.get("spread", DEFAULT_SPREAD), "$.provenance.spread")
    return step_weights(*noise_levels(state), spread)


def _require(subject: str, own: object, wanted: object, owner: str) -> None:
    if own != wanted:
        raise complain(subject, own, wanted, f"that is what {owner} has")


def figures(entry: Entry, judged: Sequence[JudgedPlan] = ()) -> dict:
    """The numbers at the head of the report, as plain JSON."""
    stands, plan, cost = entry.standing, entry.plan, entry.cost
    latency, flops = entry.latency_ms, flops_of(plan, stands.mean_density)
    limit = (latency - cost.fixed_ms) * (1 + 1e-12)
    own = next((one for one in judged if one.name == entry.name), None)
    return {
        "plan": entry.name,
        "method": entry.method,
        "density": stands.mean_density,
        "flops_ratio": flops.ratio if math.isfinite(flops.ratio) else None,
        "flops_scope": flops.scope,
        "attention_error": stands.total_error,
        "error_deviation": stands.deviation,
        "least_error_at_this_cost": least_error(
            entry.errors, entry.heads_ms, limit, max_stages(plan), entry.coherence
        ),
        "predicted": {
            "latency_ms": latency,
            "dense_latency_ms": cost.dense_ms,
            "speedup": ratio(cost.dense_ms, latency),
            "scope": scope(cost),
            **cost.record(),
        },
        "psnr": None if own is None else own.psnr,
        "stages": _stages(entry),
        "largest_errors": _largest(entry),
    }


def basis(cost: CostModel) -> str:
    """Where predicted times come from, in words."""
    parts = [f"attention: {cost.attention_basis}"]
    if cost.rest_basis != "none":
        parts.append(f"outside attention: {cost.rest_basis}")
    return ", ".join(parts)


def max_stages(plan: Plan) -> int:
    found = plan.provenance.get("max_stages")
    return max(len(plan.stages), found if isinstance(found, int) else 1)


def scope(cost: CostModel) -> str:
    return "attention" if cost.rest_ms is None else "model"


def ratio(dense: float, latency: float) -> float | None:
    return dense / latency if latency else None


def _stages(entry: Entry) -> list[dict]:
    """One row a stage; `steps` are half-open; a stage's `share`s are parts of all time and of all error."""
    stands, plan, cost = entry.standing, entry.plan, entry.cost
    times, total = stands.pass_ms(cost), stands.total_error
    ends = np.cumsum(stands.steps)
    every = float(times @ stands.steps)
    return [
        {
            "steps": [int(end - count), int(end)],
            "density": float(stands.density[i].mean()),
            "latency_ms": float(times[i]),
            "speedup": ratio(cost.dense_ms, float(times[i])),
            "time_share": float(times[i] * count) / every if every else 0.0,
            "error_share": float(stands.error[i].sum()) / total if total else 0.0,
            "kinds": dict(Counter(plan.pattern(name).kind for row in plan.stages[i].layers for name in row)),
        }
        for i, (end, count) in enumerate(zip(ends, stands.steps, strict=True))
    ]


def _largest(entry: Entry) -> list[dict]:
    """The heads that carry most of the weighted error, and what full attention there would cost a pass."""
    stands = entry.standing
    order = np.argsort(-stands.error.ravel(), kind="stable")[:WORST]
    found = []
    for place in order:
        i, layer, head = (int(x) for x in np.unravel_index(place, stands.error.shape))
        if not stands.error[i, layer, head] > 0:
            break
        more = float(entry.heads_ms[layer, head, -1] - stands.ms[i, layer, head])
        found.append(
            {
                "stage": i,
                "layer": layer,
                "head": head,
                "pattern": entry.plan.stages[i].layers[layer][head],
                "density": float(stands.density[i, layer, head]),
                "relative_error": float(stands.relative[i, layer, head]),
                "error_share": float(stands.error[i, layer, head]) / stands.total_error,
                "full_ms": more * float(stands.steps[i] / stands.steps.sum()),
            }
        )
    return found
