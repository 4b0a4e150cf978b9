"""`svdit-plan fit`: a searched plan for another size of video or number of steps."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import click

from svdit.plans import registry
from svdit.plans.command import json_option, reports_mistakes, write_json
from svdit.plans.errors import complain, rooted
from svdit.plans.fit import carried
from svdit.plans.flops import mean_density
from svdit.plans.geometry import Geometry
from svdit.plans.schema import Plan, read_plan, write_plan

FILE = click.Path(path_type=Path)
MOST = 12
"""Heads and patterns that are listed on the terminal."""


@click.command()
@click.argument("plan", type=FILE)
@click.option("--geometry", "grid", type=(int, int, int), metavar="T H W", help="Token grid after patchify.")
@click.option("--frames", type=int, help="Frames of the video (default: those of the model's reference video).")
@click.option("--height", type=int, help="Height of the video in pixels (default: as above).")
@click.option("--width", type=int, help="Width of the video in pixels (default: as above).")
@click.option("--checkpoint", type=FILE, metavar="DIR", help="Take the reference video from it.")
@click.option("--steps", type=int, help="Denoising steps: put the ends of stages between them.")
@click.option("-o", "--output", required=True, type=FILE, metavar="P.plan.json", help="The plan file.")
@json_option
@reports_mistakes
def fit(
    plan: Path,
    grid: tuple[int, int, int] | None,
    frames: int | None,
    height: int | None,
    width: int | None,
    checkpoint: Path | None,
    steps: int | None,
    output: Path,
    json_file: Path | None,
) -> None:
    """Carry a plan to another grid or step count, and say which heads should be measured again.

    Windows keep their share of each axis. Nothing is measured: svdit-compare says what the plan costs in quality.
    """
    found = read_plan(plan)
    size = (frames, height, width)
    if grid is not None and any(x is not None for x in size):
        raise complain("--geometry", "also a size of the video", "one of the two")
    if grid is None and steps is None and all(x is None for x in size):
        raise complain("fit", "nothing to change", "--geometry, --frames, --height, --width or --steps")
    geometry = found.geometry
    if grid is not None:
        with rooted("--geometry: "):
            geometry = replace(geometry, grid=grid)
    elif any(x is not None for x in size):
        geometry = _geometry(found, size, checkpoint)
    with rooted("--"):
        fitted, doubts = carried(found, geometry, steps)
    before, after = mean_density(found), mean_density(fitted)
    write_plan(output, fitted)
    again = [asdict(doubt) for doubt in doubts]
    places = sorted({(doubt.layer, doubt.head) for doubt in doubts})
    write_json(
        json_file,
        {"plan": str(output), "grid": list(geometry.grid), "density": after, "density_before": before, "again": again},
    )
    click.echo(f"{output}: grid {' x '.join(map(str, geometry.grid))}, density {before:.4f} -> {after:.4f}")
    total = geometry.layers * geometry.heads
    click.echo(f"{len(places)} of {total} heads should be measured again{': ' if places else ''}{_shown(places)}")
    reasons = Counter(f"{doubt.pattern}: {doubt.reason}" for doubt in doubts)
    for reason, count in reasons.most_common(MOST):
        click.echo(f"  {reason} ({count} {'time' if count == 1 else 'times'})")
    if len(reasons) > MOST:
        click.echo(f"  ... and {len(reasons) - MOST} more patterns (--json has all)")


def _geometry(plan: Plan, size: tuple[int | None, ...], checkpoint: Path | None) -> Geometry:
    """The geometry of a video of this size, sizes left out being those of the model's reference video."""
    adapter = registry.adapter(plan.model)
    checkpoint = adapter.packaged_checkpoint() if checkpoint is None else checkpoint
    return adapter.geometry_for(size, checkpoint)


def _shown(places: list[tuple[int, int]]) -> str:
    text = ", ".join(f"l{layer}h{head}" for layer, head in places[:MOST])
    return text if len(places) <= MOST else f"{text}, ... (--json has all)"
