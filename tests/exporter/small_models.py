"""A small random checkpoint of each real model, and a plan for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Pattern
from svdit.plans.schema import Plan, Stage
from tests.exporter import checkpoints
from tests.exporter.models.cogvideox import conftest as cogvideox
from tests.exporter.models.hunyuan import checkpoints as hunyuan

NAMES = ("wan2.1", "cogvideox1.5", "hunyuan")


def save(model: str, folder: Path, patterns: Mapping[str, Pattern], stages: tuple[Stage, ...]) -> tuple[Path, Plan]:
    """Two layers of three heads; HunyuanVideo has a plan of its own."""
    if model == "wan2.1":
        geometry = Geometry((3, 4, 6), 0, "none", 2, 3, 64)
        return checkpoints.save_wan(folder), Plan(model, geometry, (1, 4, 4), patterns, stages, {})
    if model == "cogvideox1.5":
        geometry = Geometry((3, 5, 7), 7, "before", 2, 3, 64)
        return cogvideox.save(folder), Plan(model, geometry, (2, 2, 4), patterns, stages, {})
    return hunyuan.save(folder), hunyuan.plan()
