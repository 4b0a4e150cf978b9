"""`svdit-plan report`: one HTML file about a plan and the search that it came from."""

from __future__ import annotations

from pathlib import Path

import click

from svdit.plans.command import json_option, reports_mistakes, write_json
from svdit.plans.errors import rooted
from svdit.plans.files import write_atomic

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("plan", type=FILE)
@click.option("--state", type=FILE, metavar="FILE", help="State of its search (default: the plan's .search.npz).")
@click.option("--beside", multiple=True, type=FILE, metavar="PLAN", help="Another plan on the same curve; repeatable.")
@click.option("--judged", multiple=True, type=FILE, metavar="FILE", help="JSON of plans with PSNR; repeatable.")
@click.option("--hardware", default="h100", show_default=True, metavar="NAME|FILE", help="Latency table for costs.")
@click.option("-o", "--output", required=True, type=FILE, metavar="P.html", help="The report.")
@json_option
@reports_mistakes
def report(
    plan: Path,
    state: Path | None,
    beside: tuple[Path, ...],
    judged: tuple[Path, ...],
    hardware: str,
    output: Path,
    json_file: Path | None,
) -> None:
    """Write a report: maps, choice, trade-off between error and speed, stages, largest errors, origin.

    The page needs no network and no other file. Plans beside it take the state with their own name if there is one,
    else that of PLAN.
    """
    from svdit.plans.cost import read_hardware
    from svdit.plans.report.figures import read_entry
    from svdit.plans.report.judged import read_judged
    from svdit.plans.report.page import html
    from svdit.plans.search_state import default_state

    with rooted("--"):
        table = read_hardware(hardware)
    state = default_state(plan) if state is None else state
    entry = read_entry(plan, state, table)
    others = [
        read_entry(other, own if (own := default_state(other)).exists() else state, table, entry) for other in beside
    ]
    plans = [one for path in judged for one in read_judged(path)]
    page, figures = html(entry, others, plans)
    write_atomic(output, page)
    write_json(json_file, figures)
    click.echo(f"{output}: {len(page.encode()) / 1024:.0f} kB, {1 + len(others)} plans, {len(plans)} judged")
