"""`svdit-build`: options to one call, exit status back."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from svdit.plans.command import json_option, reports_mistakes, write_json


@click.command(name="svdit-build", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle_dir", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--strip-weights", is_flag=True, help="Leave the weights out; loading puts them back from the bundle.")
@click.option(
    "--weight-streaming",
    type=click.FloatRange(min=0),
    metavar="GIB",
    help="Keep only so much of the weights in device memory.",
)
@click.option("--force", is_flag=True, help="Build even when the engines are up to date.")
@click.option("--dry-run", is_flag=True, help="Check everything and print what would be done.")
@json_option
@reports_mistakes
def main(
    bundle_dir: Path,
    strip_weights: bool,
    weight_streaming: float | None,
    force: bool,
    dry_run: bool,
    json_file: Path | None,
) -> None:
    """Build TensorRT engines for the bundle in DIR, on the GPU that will run them.

    Adds an engine for every graph, and engine.json, which says what they were built for. With
    POLYGRAPHY_USE_TENSORRT_RTX=1 TensorRT-RTX builds them, from portable and dense bundles only.
    """
    from svdit.plans.bundle import read_bundle
    from svdit.runtime.build import build, prepare
    from svdit.runtime.build_platform import this_platform
    from svdit.runtime.build_record import Options

    work = prepare(read_bundle(bundle_dir), this_platform(), Options(strip_weights, weight_streaming))
    figures: dict[str, object] = {
        "bundle": str(bundle_dir),
        "platform": str(work.platform),
        "reason": work.reason,
        "timing_cache": str(work.timing_cache),
        "built": False,
    }
    if dry_run:
        click.echo("\n".join(work.lines()))
    elif not work.reason and not force:
        click.echo(f"{bundle_dir}: engines are up to date")
    else:
        start = time.perf_counter()
        made = build(work, show=sys.stderr.isatty())
        seconds = time.perf_counter() - start
        size = sum(engine.size for engine in made.engines)
        figures |= {"built": True, "engine_bytes": size, "seconds": round(seconds, 3)}
        click.echo(f"{bundle_dir}: {len(made.engines)} engine(s), {size / 1e6:.1f} MB, {seconds:.1f} s")
    write_json(json_file, figures)
