"""Numbers as they are written down."""

from __future__ import annotations


def significant(value: float, digits: int = 6) -> float:
    """The nearest float with that many significant decimal digits."""
    return float(f"{value:.{digits}g}")
