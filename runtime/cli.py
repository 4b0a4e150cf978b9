"""svdit-run and svdit-compare: options in, one call, figures out. Exit 0 done, 1 a limit was missed, 2 bad input."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np

from svdit.plans.command import json_option, reports_mistakes, write_json
from svdit.plans.errors import complain
from svdit.plans.files import write_atomic
from svdit.runtime.prompt_options import collect_prompts, prompt_options

FOLDER = click.Path(path_type=Path)
BACKEND_HELP = "auto: onnxrt for portable and dense bundles, torch for plugin bundles."


def _engine_options(command):
    for option in (
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads (default: the library's choice)."),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N; not for onnxrt."),
        click.option("--guidance", type=float, help="Guidance scale (default: the checkpoint's; 1: none)."),
        click.option("--seed", type=int, default=0, show_default=True, help="Prompt i uses seed + i."),
        click.option("--steps", type=int, help="Denoising steps (default: the checkpoint's)."),
        click.option(
            "--backend",
            default="auto",
            show_default=True,
            metavar="NAME",
            help="auto, tensorrt, onnxrt-cuda, onnxrt or torch. " + BACKEND_HELP,
        ),
    ):
        command = option(command)
    return command


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle_dir", metavar="DIR", type=FOLDER)
@prompt_options
@_engine_options
@click.option(
    "--pipeline",
    "pipeline_dir",
    type=FOLDER,
    metavar="CHECKPOINT",
    help="Run this diffusers pipeline, with the bundle in the place of its transformer.",
)
@click.option("--image", type=FOLDER, metavar="FILE", help="First frame, for image-to-video pipelines.")
@click.option("--height", type=int, help="Pixels; must be the bundle's (default). With --pipeline.")
@click.option("--width", type=int, help="Pixels; must be the bundle's (default). With --pipeline.")
@click.option("--frames", type=int, help="Frames of the video; must be the bundle's (default). With --pipeline.")
@click.option("--fps", type=click.IntRange(1, 120), default=8, show_default=True, help="Frames a second of the mp4.")
@click.option(
    "-o",
    "--output",
    type=FOLDER,
    default=Path("video.mp4"),
    show_default=True,
    help="The mp4; several prompts give video-0.mp4, video-1.mp4 ... A contact sheet (.png) is put beside.",
)
@json_option
@reports_mistakes
def run(
    *,
    bundle_dir: Path,
    prompt: tuple[str, ...],
    prompts_file: Path | None,
    backend: str,
    steps: int | None,
    seed: int,
    guidance: float | None,
    device: str,
    threads: int | None,
    pipeline_dir: Path | None,
    image: Path | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    fps: int,
    output: Path,
    json_file: Path | None,
) -> None:
    """Make videos from prompts with the bundle in DIR."""
    from svdit.plans.bundle import read_bundle
    from svdit.plans.flops import mean_density
    from svdit.runtime.pipeline import Request, run_bundle
    from svdit.runtime.runner import make_runner
    from svdit.runtime.video import check_target, contact_sheet, write_mp4, write_png

    request = Request(collect_prompts(prompt, prompts_file), seed, steps, guidance)
    check_target(output, ".mp4", "--output")
    if json_file is not None:
        check_target(json_file, None, "--json")
    bundle = read_bundle(bundle_dir)
    if pipeline_dir is None:
        _only_with_pipeline(image=image, height=height, width=width, frames=frames)
        with make_runner(bundle, backend, device=device, threads=threads) as runner:
            click.echo(f"{bundle_dir}: {bundle.manifest.model}, {bundle.manifest.variant} on {runner.name}", err=True)
            made = run_bundle(runner, bundle, request)
    else:
        from svdit.runtime.pipeline_folder import Wish, run_folder

        wish = Wish(image, frames, height, width)
        runner, made = run_folder(bundle, pipeline_dir, request, wish, backend=backend, device=device, threads=threads)
    count = len(request.prompts)
    names = [output if count == 1 else output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(count)]
    for name, video in zip(names, made.videos, strict=True):
        write_mp4(name, video, fps)
        write_png(name.with_suffix(".png"), contact_sheet(video))
    figures = {
        "backend": runner.backend,
        "variant": bundle.manifest.variant,
        "model": bundle.manifest.model,
        "steps": made.steps,
        "guidance": made.guidance,
        "density": 1.0 if bundle.manifest.variant == "dense" else mean_density(bundle.plan, made.steps),
        "latency_ms": float(np.median(made.step_seconds) * 1000),
        "total_ms": float(made.step_seconds.sum() * 1000),
        "step_ms": [round(float(s) * 1000, 3) for s in made.step_seconds],
        "stages": [record.stage for record in made.records],
        "videos": [
            {"prompt": p, "seed": s, "video": str(n), "sheet": str(n.with_suffix(".png"))}
            for p, s, n in zip(request.prompts, request.seeds, names, strict=True)
        ],
    }
    write_json(json_file, figures)
    click.echo(f"{made.steps} steps, median {figures['latency_ms']:.0f} ms a step, {figures['total_ms'] / 1000:.1f} s")
    for name in names:
        click.echo(f"{name}  {name.with_suffix('.png')}")


def _only_with_pipeline(**given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise complain(f"--{name}", value, "no such option without --pipeline")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle_dir", metavar="DIR", type=FOLDER)
@click.option(
    "--against",
    default="dense",
    show_default=True,
    metavar="dense|BACKEND",
    help="dense attention on the same backend, or the same bundle on another backend.",
)
@click.option(
    "--dense",
    "dense_dir",
    type=FOLDER,
    metavar="DIR",
    help="Dense bundle for --against dense (default: DIR-dense beside DIR; torch needs none).",
)
@click.option(
    "--other",
    "other_dir",
    type=FOLDER,
    metavar="DIR",
    help="Bundle that --against BACKEND runs: the same plan in another variant or precision (default: the same).",
)
@prompt_options
@_engine_options
@click.option("--layers", is_flag=True, help="Compare every attention layer; exit with 1 when one departs.")
@click.option("--min-psnr", type=float, help="Exit with 1 when the mean PSNR is lower.")
@click.option("--min-speedup", type=float, help="Exit with 1 when the speed-up is lower.")
@click.option("--report", type=FOLDER, metavar="FILE.html", help="Write a page with figures and contact sheets.")
@json_option
@reports_mistakes
def compare(
    *,
    bundle_dir: Path,
    against: str,
    dense_dir: Path | None,
    other_dir: Path | None,
    prompt: tuple[str, ...],
    prompts_file: Path | None,
    backend: str,
    steps: int | None,
    seed: int,
    guidance: float | None,
    device: str,
    threads: int | None,
    layers: bool,
    min_psnr: float | None,
    min_speedup: float | None,
    report: Path | None,
    json_file: Path | None,
) -> None:
    """Compare the bundle in DIR with dense attention or with another backend.

    Both run in one process, step by step in turn, from the same noise. Without prompts, those of the plan's
    search are taken.
    """
    from svdit.plans.bundle import read_bundle
    from svdit.runtime.compare import compare as run_both
    from svdit.runtime.compare import layers_table, scores_table
    from svdit.runtime.pipeline import Request
    from svdit.runtime.video import check_target

    if report is not None:
        check_target(report, ".html", "--report")
    if json_file is not None:
        check_target(json_file, None, "--json")
    prompts = collect_prompts(prompt, prompts_file)
    bundle = read_bundle(bundle_dir)
    if not prompts:
        known = bundle.plan.provenance.get("prompts")
        if not isinstance(known, list) or not known:
            raise complain("prompts", "none", "at least one prompt", "pass --prompt TEXT; this plan records none")
        prompts = tuple(known)
    found = run_both(
        bundle,
        Request(prompts, seed, steps, guidance),
        backend=backend,
        against=against,
        dense=dense_dir,
        other=other_dir,
        device=device,
        threads=threads,
        layers=layers,
    )
    figures = found.figures()
    if report is not None:
        from svdit.runtime.report import html_report

        write_atomic(report, html_report(found, bundle))
    write_json(json_file, figures)
    width = max(len(row[0]) for row in scores_table(found))
    for row in scores_table(found):
        click.echo(f"{row[0]:<{width}}  {row[1]:>10}  SSIM {row[2]}")
    mean = figures["psnr"]
    click.echo(
        f"{found.runner} against {found.against}: PSNR {'identical' if mean is None else f'{mean:.2f} dB'}, "
        f"SSIM {figures['ssim']:.4f}, density {found.density:.4f}, FLOP ratio {found.flops_ratio:.3f}, "
        f"{figures['against_latency_ms']:.0f} -> {figures['latency_ms']:.0f} ms a step, speed-up "
        f"{found.speedup:.3f}x; denoiser outputs: rel. L2 {_text(figures['rel_l2_error'])}, "
        f"max. {figures['max_abs_error']:.3e}"
    )
    missed = []
    if found.layers is not None:
        click.echo("\n".join(layers_table(found.layers)))
        if first := found.layers.first_departure:
            missed.append(
                f"{first.path}, layer {first.layer}, is the first to depart: rel. L2 {first.rel_l2_error:.3e} at "
                f"step {first.step} is above {found.layers.limit(first.layer):.1e}"
            )
    if min_psnr is not None and mean is not None and mean < min_psnr:
        missed.append(f"PSNR {mean:.2f} dB is below {min_psnr:g} dB")
    if min_speedup is not None and found.speedup < min_speedup:
        missed.append(f"speed-up {found.speedup:.3f} is below {min_speedup:g}")
    for line in missed:
        click.echo(f"missed: {line}", err=True)
    sys.exit(1 if missed else 0)


def _text(value: object) -> str:
    return "infinite" if value is None else f"{value:.3e}"
