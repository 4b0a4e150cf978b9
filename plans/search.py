"""The choice of one attention pattern per layer and head from measured errors (Sparse-vDiT, arXiv 2506.03065).

Numpy only: the errors come from `svdit.runtime.measure`, stages are merged by `svdit.plans.stages`.
Shape letters: S steps, L layers, H heads, M modes (candidate patterns, `full` not among them).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from svdit.plans.errors import complain
from svdit.plans.geometry import Geometry
from svdit.plans.numbers import significant
from svdit.plans.patterns import Full, Pattern, Skip
from svdit.plans.schema import Plan
from svdit.plans.stages import Segment, merge, stages_of

DEFAULT_LAM = 0.5
DEFAULT_EPS = 1.0
DEFAULT_ERROR_SCALE = 4.0
DEFAULT_DENSE_STEPS = 0.2
NORMALISERS = ("layer", "head")
PROBE_DENSITY = 0.25
"""A head's probe is its best pattern that keeps at most this."""


@dataclass(frozen=True)
class Measurement:
    """What one walk over the denoising trajectory measured.

    modes      M names, in the order in which ties are broken (first wins)
    patterns   per mode either one pattern for every head, or a tuple over layers of tuples over heads
    error      [S, L, H, M] mean over tokens, channels and prompts of (O_mode - O_full)^2
    power      [S, L, H]    mean of O_full^2
    sparsity   [L, H, M]    1 - kept query-key token pairs / N^2
    layer_power [S, L]      error of a head that is H times the layer's whole output; None: the mean of power
    deviation  [S, L, H, M] standard error of `error` from the sample of query tiles; None: not known
    """

    modes: tuple[str, ...]
    patterns: tuple[Pattern | tuple[tuple[Pattern, ...], ...], ...]
    error: np.ndarray
    power: np.ndarray
    sparsity: np.ndarray
    layer_power: np.ndarray | None = None
    deviation: np.ndarray | None = None

    def relative(self, normaliser: str = "layer") -> np.ndarray:
        """float64 [S, L, H, M] errors as shares, see `relative_error`."""
        return relative_error(self.error, self.power, normaliser, self.layer_power)

    def name(self, mode: int, layer: int, head: int) -> str:
        """Pattern name in the plan; patterns that differ by head carry their place in the name."""
        if isinstance(self.patterns[mode], tuple):
            return f"{self.modes[mode]}-l{layer}h{head}"
        return "skip" if isinstance(self.patterns[mode], Skip) else self.modes[mode]

    def pattern(self, mode: int, layer: int, head: int) -> Pattern:
        found = self.patterns[mode]
        return found[layer][head] if isinstance(found, tuple) else found


@dataclass(frozen=True)
class Rule:
    """Hyper-parameters of the paper's rule.

    `lam` weighs density against error, `eps` is the loss above which a head stays full (paper: 0.5 and 1).
    `error_scale` multiplies the normalised error; `normaliser` is "layer" (mean square of the dense output
    over all heads of the layer) or "head" (of that head alone). `dense_steps` is the share of the steps, from the
    first, in which every head stays full: errors made while the picture is still noise decide what it becomes.
    """

    lam: float = DEFAULT_LAM
    eps: float = DEFAULT_EPS
    error_scale: float = DEFAULT_ERROR_SCALE
    normaliser: str = "layer"
    dense_steps: float = DEFAULT_DENSE_STEPS

    def __post_init__(self) -> None:
        for name in ("lam", "eps", "error_scale"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise complain(name, repr(value), "a finite number >= 0", "see docs/search.md for useful values")
        if self.normaliser not in NORMALISERS:
            raise complain("normaliser", repr(self.normaliser), " or ".join(NORMALISERS))
        share = self.dense_steps
        if not (isinstance(share, (int, float)) and 0 <= share <= 1):
            raise complain("dense_steps", repr(share), "a share of the steps in [0, 1]")

    def is_dense(self, step: int, steps: int) -> bool:
        """Whether step `step` of `steps` (from 0) is one of the first `dense_steps`."""
        return step / steps < self.dense_steps


def relative_error(
    error: np.ndarray, power: np.ndarray, normaliser: str = "layer", layer_power: np.ndarray | None = None
) -> np.ndarray:
    """Squared error [..., H, M] as a share of `layer_power` [...] or of the head's own `power` [..., H].

    layer_power None: the mean of power over heads. The mean over heads of the first share is the share of the layer's
    output that is lost. A silent layer gives zeros.
    """
    if normaliser == "layer":
        scale = power.mean(-1) if layer_power is None else np.asarray(layer_power)
        scale = np.broadcast_to(scale[..., None], power.shape)
    else:
        scale = power
    return np.divide(error, scale[..., None], out=np.zeros_like(error), where=scale[..., None] > 0)


def losses(error: np.ndarray, sparsity: np.ndarray, lam: float) -> np.ndarray:
    """Equation 2 of the paper: L_i = error_i + lam * (1 - S_i), S_i being sparsity.

    The penalty grows with density, so sparse modes are cheap. (The paper's Algorithm 1 prints lam * S_i,
    which would reward dense modes.)
    """
    return error + lam * (1.0 - sparsity)


def with_full(loss: np.ndarray, eps: float) -> np.ndarray:
    """Append `full` as mode M at the constant loss eps; other figures of the modes have constants of their own.

    "Full if all L_i > eps, otherwise the smallest L_i" is then exactly the first smallest entry of the
    last axis: a sparse mode that equals eps comes before full.
    """
    return np.concatenate([loss, np.full((*loss.shape[:-1], 1), eps)], axis=-1)


def mode_density(measured: Measurement) -> np.ndarray:
    """[L, H, M + 1] kept share of query-key pairs of every mode, `full` last."""
    return with_full(1.0 - measured.sparsity, 1.0)


def probes(measured: Measurement) -> np.ndarray:
    """int [L, H]: of the modes that keep at most PROBE_DENSITY, the one with the least error over all steps."""
    allowed = mode_density(measured)[..., :-1]
    fits = (allowed > 0) & (allowed <= PROBE_DENSITY)
    if not fits.any(-1).all():
        raise complain("candidates", "none for some head", f"one that keeps at most {PROBE_DENSITY:g} and not nothing")
    return np.where(fits, measured.relative().sum(0), np.inf).argmin(-1)


def errors_at(measured: Measurement, chosen: np.ndarray) -> np.ndarray:
    """[S, L, H] relative errors with the modes `chosen`, int [L, H]."""
    return np.take_along_axis(measured.relative(), chosen[None, ..., None], -1)[..., 0]


def choose(loss: np.ndarray, eps: float) -> np.ndarray:
    """The paper's rule on losses [..., M]: integer [...], M meaning full."""
    return with_full(loss, eps).argmin(-1)


def loss_table(measured: Measurement, rule: Rule) -> np.ndarray:
    """[S, L, H, M + 1] losses of every mode, full last; in dense steps no sum of others can undercut full."""
    error = rule.error_scale * measured.relative(rule.normaliser)
    table = with_full(losses(error, measured.sparsity, rule.lam), rule.eps)
    steps = len(table)
    dense = [rule.is_dense(step, steps) for step in range(steps)]
    table[dense, ..., :-1] = (steps + 1) * (table.max() + 1)
    return table


def mean_density(measured: Measurement, segments: list[Segment]) -> float:
    """Kept share of all query-key pairs, averaged over steps, layers and heads."""
    dense = mode_density(measured)
    kept = [np.take_along_axis(dense, s.choice[..., None], -1).mean() * (s.stop - s.start) for s in segments]
    return float(np.sum(kept) / segments[-1].stop)


def rule_for_density(
    measured: Measurement,
    density: float,
    max_stages: int,
    error_scale: float = DEFAULT_ERROR_SCALE,
    normaliser: str = "layer",
    dense_steps: float = DEFAULT_DENSE_STEPS,
) -> Rule:
    """The rule whose merged plan keeps at most `density`, found by bisection over lam with eps = lam.

    With eps = lam the constant of `full` equals the loss that equation 2 gives to a mode without error and
    without sparsity, so the rule minimises total error at a price per kept pair: along this line
    the density falls monotonically with lam, and every plan on it is the best one for its own density.
    """
    if not 0 < density <= 1:
        raise complain("density", repr(density), "a number in (0, 1]")

    def at(lam: float) -> tuple[Rule, float]:
        rule = Rule(lam, lam, error_scale, normaliser, dense_steps)
        return rule, mean_density(measured, merge(loss_table(measured, rule), max_stages))

    low, high = -12.0, 12.0
    if at(10.0**high)[1] > density:
        raise complain(
            "density",
            repr(density),
            f"at least {at(10.0**high)[1]:.4f} with these candidates",
            "add sparser candidates, allow more stages or fewer dense steps",
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(10.0**middle)[1] > density else (low, middle)
    return at(10.0**high)[0]


def plan_from(
    measured: Measurement,
    *,
    model: str,
    geometry: Geometry,
    tile: tuple[int, int, int],
    rule: Rule,
    max_stages: int,
    provenance: Mapping[str, object],
) -> Plan:
    """Choose, merge into at most `max_stages` stages, and write down what was chosen and at which error.

    The errors in the provenance are relative errors (before `error_scale`), one per stage, layer and head.
    """
    segments = merge(loss_table(measured, rule), max_stages)
    record = {
        "method": "sparse-vdit",
        "lam": rule.lam,
        "eps": rule.eps,
        "error_scale": rule.error_scale,
        "normaliser": rule.normaliser,
        "dense_steps": rule.dense_steps,
        "steps": len(measured.error),
        "max_stages": max_stages,
        **provenance,
    }
    results = {"summed_loss": significant(sum(s.loss for s in segments))}
    return plan_of_segments(
        measured,
        segments,
        model=model,
        geometry=geometry,
        tile=tile,
        normaliser=rule.normaliser,
        record=record,
        results=results,
    )


def plan_of_segments(
    measured: Measurement,
    segments: list[Segment],
    *,
    model: str,
    geometry: Geometry,
    tile: tuple[int, int, int],
    normaliser: str,
    record: Mapping[str, object],
    results: Mapping[str, object],
) -> Plan:
    """Write down what was chosen: `record` says how, then density, stages, `results` and the errors of the choice."""
    steps, num_layers, num_heads, num_modes = measured.error.shape
    relative = with_full(measured.relative(normaliser), 0.0)
    patterns: dict[str, Pattern] = {}
    names, errors = [], []
    for segment in segments:
        chosen = segment.choice
        mean = relative[segment.start : segment.stop].mean(0)
        picked = np.take_along_axis(mean, chosen[..., None], -1)[..., 0]
        errors.append([[significant(x, 4) for x in row] for row in picked])
        stage = []
        for layer in range(num_layers):
            row = []
            for head in range(num_heads):
                mode = int(chosen[layer, head])
                if mode == num_modes or measured.sparsity[layer, head, mode] == 0:  # measured columns may keep all
                    row.append("full")
                    continue
                name, pattern = measured.name(mode, layer, head), measured.pattern(mode, layer, head)
                if not isinstance(pattern, (Skip, Full)):
                    patterns[name] = pattern
                row.append(name)
            stage.append(tuple(row))
        names.append(tuple(stage))
    provenance = {
        **record,
        "density": significant(mean_density(measured, segments)),
        "stage_steps": [[s.start, s.stop] for s in segments],
        **results,
        "relative_errors": errors,
    }
    used = {name for stage in names for row in stage for name in row}
    order = {name: patterns[name] for name in sorted(patterns) if name in used}
    return Plan(
        model=model,
        geometry=geometry,
        tile=tile,
        patterns=order,
        stages=stages_of(segments, steps, names),
        provenance=provenance,
    )
