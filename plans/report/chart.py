"""Points and lines placed in a rectangle, ready for an SVG template. Ticks are matplotlib's; nothing is drawn here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = {"left": 46.0, "right": 14.0, "top": 10.0, "bottom": 36.0}
MARKERS = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "square": "M-4 -4h8v8h-8z",
    "up": "M0 -5l5 9h-10z",
    "diamond": "M0 -5.5l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
    "down": "M0 5l5 -9h-10z",
    "cross": "M-5 -3l2 -2l3 3l3 -3l2 2l-3 3l3 3l-2 2l-3 -3l-3 3l-2 -2l3 -3z",
    "plus": "M-1.6 -5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z",
    "star": "M0 -9l2.2 6h6.4l-5.1 3.9l1.9 6.2l-5.4 -3.7l-5.4 3.7l1.9 -6.2l-5.1 -3.9h6.4z",
}


@dataclass(frozen=True)
class Mark:
    """A value in data units with its words."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Series:
    """Marks of one name. `look` is a CSS class; `marker` a key of MARKERS or "" for a line alone."""

    name: str
    look: str
    marks: Sequence[Mark]
    marker: str = ""
    line: bool = True


@dataclass(frozen=True)
class Axis:
    """Range and words of an axis."""

    low: float
    high: float
    label: str


def chart(series: Sequence[Series], x: Axis, y: Axis, width: float, height: float) -> dict:
    """Ticks, polylines and markers in pixels of a width x height view box; marks at infinity are left out."""
    inner = (width - MARGIN["left"] - MARGIN["right"], height - MARGIN["top"] - MARGIN["bottom"])

    def at_x(value: float) -> float:
        return round(MARGIN["left"] + inner[0] * (value - x.low) / (x.high - x.low), 2)

    def at_y(value: float) -> float:
        return round(MARGIN["top"] + inner[1] * (y.high - value) / (y.high - y.low), 2)

    placed = []
    for one in series:
        marks = [m for m in one.marks if math.isfinite(m.x) and math.isfinite(m.y)]
        points = [{"x": at_x(m.x), "y": at_y(m.y), "mark": m} for m in marks]
        inside = [p for p, m in zip(points, marks, strict=True) if _within(m, x, y)]
        placed.append(
            {
                "series": one,
                "line": " ".join(f"{p['x']},{p['y']}" for p in points) if one.line and len(points) > 1 else "",
                "points": inside if one.marker else [],
                "path": MARKERS.get(one.marker, ""),
            }
        )
    return {
        "width": width,
        "height": height,
        "left": MARGIN["left"],
        "top": MARGIN["top"],
        "right": width - MARGIN["right"],
        "bottom": height - MARGIN["bottom"],
        "x_label": x.label,
        "y_label": y.label,
        "x_ticks": [{"at": at_x(tick), "text": f"{tick:g}"} for tick in _ticks(x)],
        "y_ticks": [{"at": at_y(tick), "text": f"{tick:g}"} for tick in _ticks(y)],
        "series": placed,
    }


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """The range of finite values with a margin on both sides; one value gets a range around it."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    margin = share * (high - low) or max(abs(high), 1.0) * share
    return low - margin, high + margin


def _within(mark: Mark, x: Axis, y: Axis) -> bool:
    return x.low <= mark.x <= x.high and y.low <= mark.y <= y.high


def _ticks(axis: Axis) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    places = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(axis.low, axis.high)
    return [round(float(tick), 10) for tick in places if axis.low <= tick <= axis.high]
