"""Numbers: how they are written down, and their mean where they differ by orders of magnitude."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SILENT = 1e-12
"""A share below this counts as this where its logarithm or its inverse is taken: it may be 0."""


def significant(value: float, digits: int = 6) -> float:
    """The nearest float with that many significant decimal digits."""
    return float(f"{value:.{digits}g}")


def geometric_mean(values: np.ndarray, weights: Sequence[float] | None = None) -> np.ndarray:
    """Geometric mean over the first axis, weighted if so asked; a value of 0 counts as SILENT times the greatest."""
    greatest = values.max(0)
    shares = np.divide(values, greatest, out=np.ones_like(values), where=greatest > 0)
    return greatest * np.exp(np.average(np.log(np.maximum(shares, SILENT)), axis=0, weights=weights))
