"""`svdit-export`: options to one call, exit status back."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from svdit.plans.bundle import PRECISIONS, VARIANTS
from svdit.plans.command import json_option, reports_mistakes, write_json


@click.command(name="svdit-export")
@click.option("--model", required=True, help="Model name; an unknown one lists what there is.")
@click.option("--plan", "plan_file", required=True, type=click.Path(path_type=Path), help="Plan file (*.plan.json).")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Folder in diffusers' format: a pipeline or its transformer. Default: the weights shipped with the package.",
)
@click.option("--variant", type=click.Choice(VARIANTS), default="plugin", show_default=True, help="Graphs to write.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Compute type.")
@click.option(
    "--batch",
    default="2",
    show_default=True,
    metavar="N|LOW-HIGH",
    help="Rows of a call; 1-2 serves calls with and without guidance.",
)
@click.option("--height", type=int, help="Height of the video in pixels; the plan must be for it.")
@click.option("--width", type=int, help="Width of the video in pixels; the plan must be for it.")
@click.option("--frames", type=int, help="Frames of the video; the plan must be for them.")
@click.option("--copy-weights", is_flag=True, help="Copy the weight files instead of linking to them.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Bundle folder to write.")
@json_option
@reports_mistakes
def main(
    model: str,
    plan_file: Path,
    checkpoint: Path | None,
    variant: str,
    precision: str,
    batch: str,
    height: int | None,
    width: int | None,
    frames: int | None,
    copy_weights: bool,
    json_file: Path | None,
    output: Path,
) -> None:
    """Bake a plan into the ONNX graphs of a model.

    Writes a bundle: graphs, plan, manifest, and links to the checkpoint's weights. Variants: plugin, one graph
    with svdit::SparseAttention nodes; portable, one graph a stage in standard operators; dense, the baseline.
    """
    size = (frames, height, width)
    write_json(json_file, run(model, plan_file, checkpoint, variant, precision, batch, size, copy_weights, output))


def run(
    model: str,
    plan_file: Path,
    checkpoint: Path | None,
    variant: str,
    precision: str,
    batch: str,
    size: tuple[int | None, int | None, int | None],
    copy_weights: bool,
    output: Path,
) -> dict:
    """Export with a progress bar and return figures for --json."""
    from tqdm import tqdm

    from svdit.exporter.export import STEPS, export
    from svdit.plans.schema import read_plan

    plan = read_plan(plan_file)
    start = time.perf_counter()
    notes: list[str] = []
    with tqdm(total=len(STEPS), desc="export", unit="step", leave=False, disable=not sys.stderr.isatty()) as bar:

        def report(step: str) -> None:
            bar.n = STEPS.index(step)
            bar.set_description(f"export: {step}")

        bundle = export(
            model,
            plan,
            output,
            checkpoint=checkpoint,
            variant=variant,
            precision=precision,
            batch=batch,
            size=size,
            copy_weights=copy_weights,
            report=report,
            note=notes.append,
        )
    for text in notes:
        click.echo(f"note: {text}", err=True)
    seconds = time.perf_counter() - start
    graph_bytes = sum((bundle.path / graph.file).stat().st_size for graph in bundle.manifest.graphs)
    click.echo(
        f"{output}: {variant} {precision}, {len(bundle.manifest.graphs)} graph(s), {graph_bytes / 1e6:.1f} MB, "
        f"{len(bundle.manifest.weights)} weight file(s), {seconds:.1f} s"
    )
    return {
        "bundle": str(output),
        "model": model,
        "variant": variant,
        "precision": precision,
        "stages": len(plan.stages),
        "graph_bytes": graph_bytes,
        "weight_bytes": sum(weight.size for weight in bundle.manifest.weights),
        "seconds": round(seconds, 3),
    }
