"""`svdit-plan template`: a plan that no search made, for any size of video."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from svdit.plans import registry
from svdit.plans.command import json_option, reports_mistakes, write_json
from svdit.plans.errors import complain
from svdit.plans.files import parse_json
from svdit.plans.flops import mean_density
from svdit.plans.patterns import pattern_from_json
from svdit.plans.schema import template as one_pattern
from svdit.plans.schema import write_plan
from svdit.plans.tiles import check_tile

FILE = click.Path(path_type=Path)


@click.command()
@click.option("--model", required=True, metavar="NAME", help="The model that the plan is for.")
@click.option("--checkpoint", type=FILE, metavar="DIR", help="Take sizes from it (default: the published model's).")
@click.option("--frames", type=int, help="Frames of the video (default: those of the model's reference video).")
@click.option("--height", type=int, help="Height of the video in pixels (default: as above).")
@click.option("--width", type=int, help="Width of the video in pixels (default: as above).")
@click.option("--pattern", default='{"kind": "diagonal"}', show_default=True, help="Pattern of every head, JSON.")
@click.option("--dense-steps", type=float, default=0.2, show_default=True, help="Share of the steps kept full.")
@click.option("--tile", type=(int, int, int), metavar="T H W", help="Tile (default: the model's).")
@click.option("-o", "--output", required=True, type=FILE, metavar="P.plan.json", help="The plan file.")
@json_option
@reports_mistakes
def template(
    model: str,
    checkpoint: Path | None,
    frames: int | None,
    height: int | None,
    width: int | None,
    pattern: str,
    dense_steps: float,
    tile: tuple[int, int, int] | None,
    output: Path,
    json_file: Path | None,
) -> None:
    """Write a plan with one pattern for all heads: a start for a size that has no searched plan.

    Nothing is measured: what the pattern costs in quality is for svdit-compare to say.
    """
    adapter = registry.adapter(model)
    checkpoint = adapter.packaged_checkpoint() if checkpoint is None else checkpoint
    geometry = adapter.geometry_for((frames, height, width), checkpoint)
    if checkpoint is not None:
        adapter.check_geometry(checkpoint, geometry)
    if not 0 <= dense_steps < 1:
        raise complain("--dense-steps", dense_steps, "a number of at least 0 and below 1")
    chosen = pattern_from_json(parse_json(pattern, "--pattern"), "--pattern")
    plan = one_pattern(model, geometry, adapter.default_tile() if tile is None else check_tile(tile), chosen)
    if dense_steps:
        full = one_pattern(model, geometry, plan.tile).stages[0]
        plan = replace(plan, stages=(replace(full, until=dense_steps), *plan.stages))
    write_plan(output, plan)
    write_json(json_file, {"plan": str(output), "grid": list(geometry.grid), "density": mean_density(plan)})
    click.echo(f"{output}: {model}, grid {' x '.join(map(str, geometry.grid))}, density {mean_density(plan):.4f}")
