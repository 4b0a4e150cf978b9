"""A plan carried to another grid or number of steps, and which of its heads should be measured again.

Windows keep their share of each axis: a window of 2 r + 1 of n tiles becomes the nearest odd width for the same share
of the new axis. Key tiles that a pattern lists stay at the same place of the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from svdit.plans.errors import complain
from svdit.plans.fields import integer
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, MultiDiagonal, Pattern, Stripe, TileGrid, Tiles, Union
from svdit.plans.schema import Plan, Stage
from svdit.plans.tiles import Tiling

TOLERANCE = 0.1
"""Relative change of a pattern's density from which its heads should be measured again."""
MEASURED_PLACES = "its key tiles were found by measuring"
CHANGED_DENSITY = "its density changed"


@dataclass(frozen=True)
class Doubt:
    """A head whose pattern may not be right at the new size, and why."""

    stage: int
    layer: int
    head: int
    pattern: str
    reason: str


def carried(plan: Plan, geometry: Geometry | None = None, steps: int | None = None) -> tuple[Plan, list[Doubt]]:
    """The plan on another grid, or with stages that end between two of `steps` steps, or both.

    Raises SvditError when the geometry differs in anything but the grid and the text.
    """
    geometry = plan.geometry if geometry is None else geometry
    wrong = [n for n in ("layers", "heads", "head_dim") if getattr(geometry, n) != getattr(plan.geometry, n)]
    if wrong:
        name = wrong[0]
        got, own = getattr(geometry, name), getattr(plan.geometry, name)
        raise complain(f"geometry.{name}", got, f"{own} as in the plan", "only the size of the video can change")
    old, new = plan.tiling(), Tiling(geometry, plan.tile)
    patterns = {name: _pattern(pattern, old.tile_grid, new.tile_grid) for name, pattern in plan.patterns.items()}
    stages = plan.stages if steps is None else _stages(plan.stages, integer(steps, "steps", low=1))
    doubts = _doubts(plan, patterns, old, new, stages) if old.geometry != geometry else []
    record = dict(plan.provenance)
    record["fitted_from"] = {"grid": list(plan.geometry.grid), "steps": plan.provenance.get("steps")}
    if steps is not None:
        record["fitted_steps"] = steps
    result = replace(plan, geometry=geometry, patterns=patterns, stages=stages, provenance=record)
    return result, doubts


def _stages(stages: tuple[Stage, ...], steps: int) -> tuple[Stage, ...]:
    """The same choice for each of `steps` steps, cuts at multiples of 1 / steps; stages without a step are gone."""
    result, begin = [], 0
    for stage in stages:
        end = sum(step / steps < stage.until for step in range(steps))
        if end > begin:
            result.append(replace(stage, until=1.0 if end == steps else end / steps))
        begin = end
    return tuple(result)


def _pattern(pattern: Pattern, old: TileGrid, new: TileGrid) -> Pattern:
    if old == new:
        return pattern
    if isinstance(pattern, (Diagonal, MultiDiagonal)):
        cells = [[-(-n // c) for n, c in zip(grid, pattern.cell, strict=True)] for grid in (old, new)]
        changes = {
            name: _half_width(getattr(pattern, name), cells[0][axis], cells[1][axis])
            for axis, name in enumerate(("frames", "rows", "cols"))
            if getattr(pattern, name, None) is not None
        }
        return replace(pattern, offset=round(pattern.offset * cells[1][0] / cells[0][0]), **changes)
    if isinstance(pattern, Stripe):
        columns = np.zeros(math.prod(old), dtype=bool)
        for start, stop in pattern.columns:
            columns[start:stop] = True
        moved = Tiles.from_mask(columns[_origin(old, new)][None]).rows[0]
        return replace(pattern, columns=moved, frames=_half_width(pattern.frames, old[0], new[0]))
    if isinstance(pattern, Union):
        return Union(tuple(_pattern(member, old, new) for member in pattern.members))
    if isinstance(pattern, Tiles):
        origin = _origin(old, new)
        return Tiles.from_mask(pattern.video_mask(old)[np.ix_(origin, origin)])
    return pattern


def _half_width(half: int, old: int, new: int) -> int:
    """Half of the odd width nearest to the same share of the axis; of two, the wider."""
    return math.floor(((2 * half + 1) * new / old - 1) / 2 + 0.5) if new != old else half


def _origin(old: TileGrid, new: TileGrid) -> np.ndarray:
    """int [nV new]: the old tile that lies at the centre of each new one."""
    axes = [
        np.minimum(((np.arange(n) + 0.5) * o / n).astype(np.int64), o - 1) for o, n in zip(old, new, strict=True)
    ]
    t, h, w = np.meshgrid(*axes, indexing="ij")
    return ((t * old[1] + h) * old[2] + w).ravel()


def _doubts(
    plan: Plan, patterns: dict[str, Pattern], old: Tiling, new: Tiling, stages: tuple[Stage, ...]
) -> list[Doubt]:
    reasons = {}
    for name, pattern in plan.patterns.items():
        before, after = old.density(old.mask(pattern)), new.density(new.mask(patterns[name]))
        if _has_measured_places(pattern, old.tile_grid):
            reasons[name] = MEASURED_PLACES
        elif abs(after - before) > TOLERANCE * before:
            reasons[name] = f"{CHANGED_DENSITY} from {before:.4f} to {after:.4f}"
    return [
        Doubt(i, layer, head, name, reasons[name])
        for i, stage in enumerate(stages)
        for layer, row in enumerate(stage.layers)
        for head, name in enumerate(row)
        if name in reasons
    ]


def _has_measured_places(pattern: Pattern, tile_grid: TileGrid) -> bool:
    """Whether it lists key tiles other than whole frames."""
    if isinstance(pattern, Union):
        return any(_has_measured_places(member, tile_grid) for member in pattern.members)
    plane = tile_grid[1] * tile_grid[2]
    if isinstance(pattern, Stripe):
        return any(start % plane or stop % plane for start, stop in pattern.columns)
    return isinstance(pattern, Tiles)
