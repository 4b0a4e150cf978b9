"""`svdit-plan`: look at plans."""

from __future__ import annotations

from pathlib import Path

import click

from svdit.plans import listing, registry
from svdit.plans.command import json_option, reports_mistakes, write_json
from svdit.plans.errors import SvditError
from svdit.plans.fit_cli import fit
from svdit.plans.flops import mean_density
from svdit.plans.report.cli import report
from svdit.plans.schema import read_plan
from svdit.plans.template_cli import template

PLAN = click.argument("plan", type=click.Path(path_type=Path))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Look at plans: which attention pattern each head of each layer uses in each part of the denoising loop.

    Exit code 0: done. 1: the plans differ (diff). 2: a plan or an option is wrong, with a message on stderr.
    """


main.add_command(template)
main.add_command(fit)
main.add_command(report)


@main.command()
@PLAN
@click.option("--png", type=click.Path(path_type=Path), metavar="FILE", help="Draw head map and tile masks to FILE.")
@json_option
@reports_mistakes
def show(plan: Path, png: Path | None, json_file: Path | None) -> None:
    """Print patterns, density and FLOP ratio (dense over plan) by stage and layer."""
    found = read_plan(plan)
    table, figures = listing.text(found), listing.figures(found)
    if png is not None:
        from svdit.plans.picture import write_png

        write_png(png, found)
    write_json(json_file, figures)
    click.echo(table, nl=False)


@main.command()
@click.argument("plans", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Also compare the geometry with this checkpoint of the plan's model.",
)
@json_option
@click.pass_context
@reports_mistakes
def check(context: click.Context, plans: tuple[Path, ...], checkpoint: Path | None, json_file: Path | None) -> None:
    """Check plan files; name the field, what it holds and what was expected."""
    rows: list[dict[str, object]] = []
    failed = False
    for path in plans:
        try:
            plan = read_plan(path)
            if checkpoint is not None:
                geometry = registry.adapter(plan.model).geometry(checkpoint)
                plan.geometry.require_same(geometry, f"{path}: $.geometry", str(checkpoint))
        except SvditError as error:
            click.echo(f"error: {error}", err=True)
            failed = True
            continue
        rows.append({"plan": str(path), "model": plan.model, "density": mean_density(plan)})
        click.echo(f"{path}: ok, {plan.model}, density {rows[-1]['density']:.4f}")
    if failed:
        context.exit(2)
    write_json(json_file, {"plans": rows})


@main.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--limit", default=40, show_default=True, type=click.IntRange(min=0), help="Most lines of differences.")
@json_option
@click.pass_context
@reports_mistakes
def diff(context: click.Context, first: Path, second: Path, limit: int, json_file: Path | None) -> None:
    """Say where two plans compute different things. Exit code 1 when they do.

    Names of patterns, unused definitions and provenance do not count.
    """
    plans = read_plan(first), read_plan(second)
    changes = listing.changes(*plans)
    density = [mean_density(plan) for plan in plans]
    rows = [{"where": change.where, "first": change.first, "second": change.second} for change in changes]
    write_json(json_file, {"same": not changes, "density": density, "differences": rows})
    for change in changes[:limit]:
        click.echo(str(change))
    if len(changes) > limit:
        click.echo(f"... and {len(changes) - limit} more")
    click.echo(f"{len(changes)} differences; density {density[0]:.4f} -> {density[1]:.4f}")
    context.exit(1 if changes else 0)
