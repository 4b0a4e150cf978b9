"""The best choice of one option per head under a limit: a multiple-choice knapsack, exact or with a proven gap.

Shapes: n places (a head of a layer in a stage), M options. `value` is what is minimised, `weight` what is limited;
speed-up targets minimise error under a time limit, error targets the other way round.

How: (1) The dual problem, a price per unit of weight, is solved exactly by following the lower convex hull of all
choices; that leaves a choice that fits and a proven bound. (2) Options whose reduced cost exceeds the distance between
the two cannot be part of a better choice and are dropped. (3) What remains, a small core, goes to HiGHS
(scipy.optimize.milp).
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from svdit.plans.errors import complain

T = TypeVar("T")
MAX_PRICES = 200
FILLS = 50
"""Single moves that use up the room under the limit before a solver is asked."""
ENOUGH = 1e-4
"""A proven gap that is not worth closing: far below what the measured errors are known to."""
ROUNDING = 1e-11
"""Relative slack of sums of floats."""


@dataclass(frozen=True, eq=False)
class Point(Generic[T]):
    """A choice with its two totals."""

    value: float
    weight: float
    choice: T


@dataclass(frozen=True, eq=False)
class Dual(Generic[T]):
    """The ends of the hull's edge over the limit. `bound` <= the value of every choice that fits.

    inside fits the limit; outside does not (None when the best of all fits); price is the slope between them.
    """

    inside: Point[T]
    outside: Point[T] | None
    price: float
    bound: float


@dataclass(frozen=True, eq=False)
class Selection:
    """choice int [n]; `bound` is proven: no choice within the limit has a smaller value."""

    choice: np.ndarray
    value: float
    weight: float
    bound: float
    price: float

    @property
    def gap(self) -> float:
        """Proven distance to the optimum as a share of the value; 0 means optimal."""
        return relative_gap(self.value, self.bound)


def relative_gap(value: float, bound: float) -> float:
    """(value - bound) / value, 0 where the difference is rounding."""
    gap = value - bound
    return 0.0 if gap <= ROUNDING * max(abs(value), abs(bound)) else gap / abs(value)


def solve_dual(solve: Callable[[float], Point[T]], limit: float, subject: str = "limit") -> Dual[T]:
    """Maximise min(value + price * weight) - price * limit over price >= 0.

    `solve(price)` returns a choice that minimises value + price * weight; solve(inf) one that minimises weight.
    Raises SvditError about `subject` when nothing fits.
    """
    outside, inside = solve(0.0), solve(math.inf)
    slack = ROUNDING * max(abs(limit), abs(inside.weight))
    if outside.weight <= limit + slack:
        return Dual(outside, None, 0.0, outside.value)
    if inside.weight > limit + slack:
        raise complain(subject, f"{limit:.6g}", f"at least {inside.weight:.6g}", "nothing lighter is among the options")
    price, bound = 0.0, -math.inf
    for _ in range(MAX_PRICES):
        price = (inside.value - outside.value) / (outside.weight - inside.weight)
        found = solve(price)
        least = found.value + price * found.weight
        edge = inside.value + price * inside.weight
        bound = max(bound, min(least, edge) - price * limit)
        if least >= edge - ROUNDING * max(abs(least), abs(edge)):
            break
        if found.weight <= limit + slack:
            inside = found
        else:
            outside = found
    return Dual(inside, outside, price, bound)


def select(
    value: np.ndarray,
    weight: np.ndarray,
    limit: float,
    *,
    enough: float = ENOUGH,
    time_limit: float = 5.0,
    subject: str = "limit",
) -> Selection:
    """The options [n] with the least summed `value` [n, M] whose summed `weight` [n, M] is at most `limit`.

    An infinite value marks an option that may not be taken; every place needs one that may. The gap of the answer is
    proven, and above `enough` only where HiGHS did not finish in time_limit seconds. Raises SvditError when nothing
    fits.
    """
    value, weight = np.asarray(value, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    if value.ndim != 2 or value.shape != weight.shape or not value.size or not np.isfinite(weight).all():
        raise complain("options", f"shapes {value.shape}, {weight.shape}", "finite [places, options], not empty")
    if np.isnan(value).any() or not np.isfinite(value).any(axis=1).all():
        raise complain("options", "a place without a finite value", "at least one option for each place")
    value = _without_dominated(value, weight)
    rows = np.arange(len(value))

    def point(choice: np.ndarray) -> Point[np.ndarray]:
        return Point(float(value[rows, choice].sum()), float(weight[rows, choice].sum()), choice)

    def solve(price: float) -> Point[np.ndarray]:
        if math.isinf(price):
            allowed = np.where(np.isfinite(value), weight, np.inf)
            return point(allowed.argmin(1))
        return point((value + price * weight).argmin(1))

    dual = solve_dual(solve, limit, subject)
    if dual.outside is None:
        return Selection(dual.inside.choice, dual.inside.value, dual.inside.weight, dual.bound, 0.0)
    best = point(_filled(value, weight, limit, dual))
    bound = dual.bound
    if relative_gap(best.value, bound) > enough:
        found, bound = _core(value, weight, limit, dual, best, time_limit)
        if found is not None:
            other = point(found)
            fits = other.weight <= limit + ROUNDING * abs(limit)
            best = other if fits and other.value < best.value else best
    return Selection(best.choice, best.value, best.weight, min(bound, best.value), dual.price)


def _without_dominated(value: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Infinite value for options that another one beats in both; of equal options the first stays."""
    order = np.lexsort((value, weight), axis=1)
    sorted_value = np.take_along_axis(value, order, 1)
    before = np.minimum.accumulate(sorted_value, axis=1)[:, :-1]
    worse = np.zeros(value.shape, dtype=bool)
    worse[:, 1:] = sorted_value[:, 1:] >= before
    result = value.copy()
    np.put_along_axis(result, order, np.where(worse, np.inf, sorted_value), 1)
    return result


def _filled(value: np.ndarray, weight: np.ndarray, limit: float, dual: Dual[np.ndarray]) -> np.ndarray:
    """The choice that fits, with places moved to the better one that does not while there is room."""
    assert dual.outside is not None
    rows = np.arange(len(value))
    choice, room = dual.inside.choice.copy(), limit - dual.inside.weight
    extra = weight[rows, dual.outside.choice] - weight[rows, choice]
    for place in np.argsort(-extra, kind="stable"):
        if 0 < extra[place] <= room:
            choice[place] = dual.outside.choice[place]
            room -= extra[place]
    for _ in range(FILLS):
        gain = value[rows, choice][:, None] - value
        gain[weight - weight[rows, choice][:, None] > room] = -np.inf
        place, option = np.unravel_index(np.argmax(gain), gain.shape)
        if not gain[place, option] > 0:
            break
        room -= weight[place, option] - weight[place, choice[place]]
        choice[place] = option
    return choice


def _core(
    value: np.ndarray,
    weight: np.ndarray,
    limit: float,
    dual: Dual[np.ndarray],
    best: Point[np.ndarray],
    time_limit: float,
) -> tuple[np.ndarray | None, float]:
    """(choice or None, proven bound) by HiGHS, from the options that can still be in a better choice than `best`."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    gap = best.value - dual.bound
    priced = value + dual.price * weight
    keep = priced - priced.min(1, keepdims=True) <= gap * (1 + 1e-9) + ROUNDING * abs(best.value)
    keep[np.arange(len(value)), best.choice] = True
    place, option = np.nonzero(keep)
    least_weight = np.where(keep, weight, np.inf).min(1)
    above = weight[place, option] - least_weight[place]
    room = max(limit - least_weight.sum(), 0.0)
    change = value[place, option] - value[place, best.choice[place]]
    ones = csr_matrix((np.ones(len(place)), (place, np.arange(len(place)))), shape=(len(value), len(place)))
    unit = 1.0 / (room or 1.0)  # both sides near 1, where the absolute tolerances of HiGHS (1e-6) are small
    with _silent():
        result = milp(
            change / gap,
            integrality=np.ones(len(place)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(ones, 1, 1),
                LinearConstraint(csr_matrix(above[None] * unit), -np.inf, room * unit),
            ],
            options={"time_limit": time_limit, "mip_rel_gap": 0.0},
        )
    if result.x is None:
        return None, dual.bound
    choice = best.choice.copy()
    taken = result.x > 0.5
    choice[place[taken]] = option[taken]
    if result.status == 0:
        # Also a bound where rounding let the solver exceed the limit a little: it then solved an easier problem.
        return choice, float(value[np.arange(len(value)), choice].sum())
    return choice, max(dual.bound, best.value + result.mip_dual_bound * gap)


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing reaches the standard output: HiGHS (1.12, in scipy 1.17) prints a line of its own past all options."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
