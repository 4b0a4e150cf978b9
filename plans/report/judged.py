"""Plans that were judged by their videos: a JSON list of figures, made by whoever compared them with dense ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from svdit.plans.errors import complain
from svdit.plans.fields import array, number, shown, string
from svdit.plans.files import parse_json, read_text

MOST_DB = 200.0


@dataclass(frozen=True)
class JudgedPlan:
    """psnr, lowest: mean and least PSNR in dB over the videos; speedup and density as far as the file has them."""

    name: str
    method: str
    psnr: float
    lowest: float
    videos: int
    density: float | None
    speedup: float | None


def read_judged(path: Path) -> list[JudgedPlan]:
    """Read a list of plans, or an object with such a list under `plans`; keys of no use here are passed over.

    Each needs `plan` (its name), `psnr` (a number, or one for each video) and `density` or `speedup` (measured);
    `method` is optional. Raises SvditError naming the entry.
    """
    data, where = parse_json(read_text(path, "a JSON list of judged plans"), str(path)), "$"
    if isinstance(data, dict) and "plans" in data:
        data, where = data["plans"], "$.plans"
    rows = array(data, f"{path}: {where}", "judged plans")
    if not rows:
        raise complain(f"{path}: {where}", "an empty list", "at least one judged plan")
    return [_judged(row, f"{path}: {where}[{i}]") for i, row in enumerate(rows)]


def _judged(row: object, where: str) -> JudgedPlan:
    if not isinstance(row, dict):
        raise complain(where, shown(row), "an object with plan, psnr and density or speedup")
    for key in ("plan", "psnr"):
        if key not in row:
            raise complain(f"{where}.{key}", "nothing", "a value", "the key is required")
    found = row["psnr"]
    values = array(found, f"{where}.psnr", "numbers") if isinstance(found, (list, tuple)) else [found]
    psnr = [_within(value, f"{where}.psnr", -MOST_DB, MOST_DB, "decibels") for value in values]
    if not psnr:
        raise complain(f"{where}.psnr", "an empty list", "one number for each video")
    density = _optional(row, "density", where, 1.0, "a share above 0 and at most 1")
    speedup = _optional(row, "speedup", where, 1e6, "a number above 0")
    if density is None and speedup is None:
        raise complain(f"{where}.density", "nothing, and no speedup either", "one of the two")
    return JudgedPlan(
        name=Path(string(row["plan"], f"{where}.plan")).name.removesuffix(".json").removesuffix(".plan"),
        method="judged" if row.get("method") is None else string(row["method"], f"{where}.method"),
        psnr=sum(psnr) / len(psnr),
        lowest=min(psnr),
        videos=len(psnr),
        density=density,
        speedup=speedup,
    )


def _optional(row: dict, key: str, where: str, high: float, expected: str) -> float | None:
    return None if row.get(key) is None else _within(row[key], f"{where}.{key}", 0.0, high, expected)


def _within(value: object, where: str, above: float, high: float, expected: str) -> float:
    result = number(value, where, expected)
    if not above < result <= high:
        raise complain(where, result, expected)
    return result


def same_axis(plans: Sequence[JudgedPlan]) -> str:
    """What all plans have: "speedup" if possible, else "density". Raises SvditError when neither is common to all."""
    for name in ("speedup", "density"):
        if all(getattr(plan, name) is not None for plan in plans):
            return name
    raise complain("judged plans", "some with only density, some with only speedup", "one of them for all plans")
