"""Merging per-step choices into a few contiguous stages, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from svdit.plans.errors import complain
from svdit.plans.schema import Stage


@dataclass(frozen=True, eq=False)
class Segment:
    """Steps start..stop-1 share `choice`, int [L, H] mode indices; `loss` is their summed loss."""

    start: int
    stop: int
    choice: np.ndarray
    loss: float


def merge(loss: np.ndarray, max_stages: int) -> list[Segment]:
    """Cut the steps into at most `max_stages` segments with the least summed loss.

    loss [S, L, H, M]: of every mode at every step. Inside a segment each head takes the mode with the
    least sum over the segment's steps (ties: the first mode), so the whole is an exact dynamic programme
    over cut positions, O(S^2 * (L * H * M + max_stages)). Among equal sums: fewest stages, then the earliest
    cuts. With max_stages >= S and no ties it reproduces the per-step choice.
    """
    if loss.ndim != 4 or not loss.size:
        raise complain("loss", f"shape {loss.shape}", "[steps, layers, heads, modes], none of them empty")
    if not np.isfinite(loss).all():
        raise complain(
            "loss",
            f"{int((~np.isfinite(loss)).sum())} values that are not finite",
            "finite losses",
            "measure again; see docs/search.md",
        )
    if not isinstance(max_stages, (int, np.integer)) or max_stages < 1:
        raise complain("max_stages", repr(max_stages), "an integer >= 1")
    steps = loss.shape[0]
    sums = np.concatenate([np.zeros((1, *loss.shape[1:])), np.cumsum(loss, axis=0, dtype=np.float64)])
    cost = np.full((steps, steps + 1), np.inf)
    for start in range(steps):
        cost[start, start + 1 :] = (sums[start + 1 :] - sums[start]).min(-1).sum((1, 2))

    def better(new: float, old: float) -> bool:
        return new < old - 1e-12 * max(1.0, abs(old)) if np.isfinite(old) else new < old

    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}
    best_total, answer = np.inf, [0, steps]
    for _ in range(min(int(max_stages), steps)):
        following: dict[int, tuple[float, list[int]]] = {}
        for stop in range(1, steps + 1):
            for start, (total, cuts) in best.items():
                if start >= stop:
                    continue
                value = total + cost[start, stop]
                if stop not in following or better(value, following[stop][0]):
                    following[stop] = (value, [*cuts, stop])
        best = following
        if better(best[steps][0], best_total):
            best_total, answer = best[steps]
    return [
        Segment(a, b, (sums[b] - sums[a]).argmin(-1), float(cost[a, b]))
        for a, b in pairwise(answer)
    ]


def stages_of(
    segments: Sequence[Segment], steps: int, names: Sequence[tuple[tuple[str, ...], ...]]
) -> tuple[Stage, ...]:
    """Plan stages for segments over `steps` steps; names[i] are the pattern names [L][H] of segment i.

    Step i belongs to the first stage with until > i / steps, so a segment that ends before step b is
    written as until = b / steps, the very quotient that a reader computes.
    """
    return tuple(
        Stage(until=1.0 if s.stop == steps else s.stop / steps, layers=layers)
        for s, layers in zip(segments, names, strict=True)
    )
