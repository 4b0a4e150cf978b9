"""Checks of single JSON values. Every function returns the value in its final type or raises SvditError."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Sequence

from svdit.plans.errors import complain

INT_MAX = 2**31 - 1
"""Largest integer of a plan or manifest: everything ends up in int32 tables."""


def shown(value: object, limit: int = 60) -> str:
    """`value` as JSON when it is JSON, cut to `limit` characters for a message."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def integer(value: object, subject: str, low: int, high: int = INT_MAX, hint: str = "") -> int:
    """An int in [low, high]; bools and floats are refused, NumPy integers are not."""
    expected = f"an integer of at least {low}" if high == INT_MAX else f"an integer from {low} to {high}"
    if isinstance(value, bool):
        raise complain(subject, shown(value), expected, hint)
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise complain(subject, shown(value), expected, hint) from None
    if not low <= number <= high:
        raise complain(subject, number if abs(number) < 10**20 else "a huge integer", expected, hint)
    return number


def number(value: object, subject: str, expected: str = "a finite number") -> float:
    """A finite float; integers are converted, bools, NaN and infinities are refused."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise complain(subject, shown(value), expected)
    try:
        result = float(value)
    except OverflowError:
        raise complain(subject, "a huge integer", expected) from None
    if not math.isfinite(result):
        raise complain(subject, result, expected)
    return result


def string(value: object, subject: str) -> str:
    """A string with at least one character."""
    if not isinstance(value, str) or not value:
        raise complain(subject, shown(value), "a non-empty string")
    return value


def one_of(value: object, subject: str, names: Iterable[str], hint: str = "") -> str:
    """One of a fixed set of strings."""
    names = list(names)
    if not isinstance(value, str) or value not in names:
        raise complain(subject, shown(value), "one of " + ", ".join(names), hint)
    return value


def boolean(value: object, subject: str) -> bool:
    """true or false, nothing that merely looks like it."""
    if not isinstance(value, bool):
        raise complain(subject, shown(value), "true or false")
    return value


def array(value: object, subject: str, of: str, length: int | None = None) -> Sequence:
    """A list (or tuple) of `length` entries; `of` says in words what they are."""
    expected = f"a list of {of}" if length is None else f"a list of {length} {of}"
    if not isinstance(value, (list, tuple)):
        raise complain(subject, shown(value), expected)
    if length is not None and len(value) != length:
        raise complain(subject, f"{len(value)} entries", expected)
    return value


def integers(value: object, subject: str, length: int, low: int, high: int = INT_MAX) -> tuple[int, ...]:
    """A fixed number of integers in [low, high]."""
    items = array(value, subject, "integers", length)
    return tuple(integer(item, f"{subject}[{i}]", low, high) for i, item in enumerate(items))


def header(value: object, subject: str, name: str, version: int, hint: str) -> None:
    """Check `format` and `version`, before anything else of a file: another version has other keys."""
    if not isinstance(value, dict):
        raise complain(subject, shown(value), f"a {name} object")
    for key, wanted, step in (("format", name, ""), ("version", version, hint)):
        if key not in value:
            raise complain(f"{subject}.{key}", "nothing", shown(wanted))
        if type(value[key]) is not type(wanted) or value[key] != wanted:
            raise complain(f"{subject}.{key}", shown(value[key]), shown(wanted), step)


def record(value: object, subject: str, required: Iterable[str], optional: Iterable[str] = ()) -> dict:
    """An object with exactly the known keys: none unknown, no required one missing."""
    required = list(required)
    known = required + list(optional)
    if not isinstance(value, dict):
        raise complain(subject, shown(value), "an object with the keys " + ", ".join(known))
    for key in value:
        if key not in known:
            raise complain(f"{subject}.{key}", "an unknown key", "one of " + ", ".join(known))
    for key in required:
        if key not in value:
            raise complain(f"{subject}.{key}", "nothing", "a value", "the key is required")
    return value
