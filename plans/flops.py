"""Density and FLOPs of a plan: what it keeps, by stage and layer, against dense attention.

One denoiser pass of a dense model costs layers * (4 N^2 W + 2 N c W^2) floating point operations,
with N tokens and W = heads * head_dim. The first term is attention, scaled by its density; the second
all matrix products of a block, c being their weights in units of W^2. Everything else is small.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svdit.plans.fields import integer
from svdit.plans.patterns import Full
from svdit.plans.schema import BUILT_IN, Plan

MATRIX_WEIGHTS = {"hunyuan": 12.0, "cogvideox1.5": 12.0, "wan2.1": 11.4, "tiny": 14.0}
"""c of the known models. Self-attention has 4, a feed-forward layer 2 * inner / W, Wan's cross-attention 2
(its other two products see only the prompt)."""


@dataclass(frozen=True)
class Flops:
    """Floating point operations of one denoiser pass at batch 1, dense and with the plan (mean over steps)."""

    dense: float
    plan: float
    scope: str
    """"model" when the matrix products of the model are known and counted, else "attention"."""

    @property
    def ratio(self) -> float:
        """Dense over plan: how many times fewer operations. Infinite when nothing is left."""
        return self.dense / self.plan if self.plan else float("inf")


def pattern_density(plan: Plan) -> dict[str, float]:
    """Density of every pattern of the plan, "full" and "skip" included."""
    tiling = plan.tiling()
    known = {name: tiling.density(tiling.mask(pattern)) for name, pattern in plan.patterns.items()}
    return {**{name: float(isinstance(pattern, Full)) for name, pattern in BUILT_IN.items()}, **known}


def layer_density(plan: Plan) -> np.ndarray:
    """float [S, L]: mean density over the heads of each layer in each stage."""
    known = pattern_density(plan)
    return np.array([[np.mean([known[name] for name in row]) for row in stage.layers] for stage in plan.stages])


def stage_shares(plan: Plan, steps: int | None = None) -> np.ndarray:
    """float [S], sum 1: part of the denoising steps in each stage; of exactly `steps` steps when given."""
    if steps is None:
        return np.diff([0.0, *(stage.until for stage in plan.stages)])
    steps = integer(steps, "steps", low=1)
    counts = np.bincount([plan.stage_of(i, steps) for i in range(steps)], minlength=len(plan.stages))
    return counts / steps


def mean_density(plan: Plan, steps: int | None = None) -> float:
    """Kept part of all query-key token pairs over steps, layers and heads."""
    return float(stage_shares(plan, steps) @ layer_density(plan).mean(axis=1))


def flops_of(plan: Plan, density: float | None = None) -> Flops:
    """Operations of a plan, or of its model at another mean density."""
    geometry = plan.geometry
    width = geometry.heads * geometry.head_dim
    attention = 4.0 * geometry.tokens**2 * width * geometry.layers
    weights = MATRIX_WEIGHTS.get(plan.model)
    rest = 0.0 if weights is None else 2.0 * geometry.tokens * weights * width**2 * geometry.layers
    density = mean_density(plan) if density is None else density
    return Flops(attention + rest, attention * density + rest, "attention" if weights is None else "model")
