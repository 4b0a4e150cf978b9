"""svdit-bench: options in, timings out as a table and as JSON."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from svdit.plans.command import json_option, reports_mistakes, write_json
from svdit.plans.errors import complain
from svdit.runtime.bench_cases import LATENCY, TABLE, BenchCase, bench_case, case_names, dense_case, layer_case


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Times beside the peers installed."""


def _kernel_options(command):
    """What is timed and for how long, for the modes that time kernels."""
    for option in (
        json_option,
        *_turn_options(3, 0.5),
        click.option("--dtype", default="bfloat16", show_default=True, metavar="TYPE", help="bfloat16 or float16."),
        click.option(
            "--library",
            "libraries",
            multiple=True,
            metavar="[NAME=]PATH",
            help="Kernel library to time, and its name in the table; repeat to compare builds.",
        ),
        click.option("--peer", "peers", multiple=True, metavar="NAME", help="fa4, cudnn, flash or flex; repeatable."),
    ):
        command = option(command)
    return command


def _runner_options(command):
    """What is timed and for how long, for the modes that time runners."""
    for option in (
        json_option,
        *_turn_options(3, 1.0),
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads (default: the library's choice)."),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N; not for onnxrt."),
        click.option("--backend", "backends", multiple=True, metavar="NAME", help="Repeat for more (default: auto)."),
        click.argument("bundles", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path)),
    ):
        command = option(command)
    return command


def _turn_options(rounds: int, seconds: float):
    return (
        click.option("--seconds", default=seconds, show_default=True, type=float, help="Length of a turn, at least."),
        click.option("--rounds", default=rounds, show_default=True, type=click.IntRange(1), help="Turns of each."),
    )


@main.command()
@click.option("--case", "cases", multiple=True, metavar="NAME", help="Case; repeat for more (default: the table).")
@click.option("--latency", is_flag=True, help="The cases that a latency table of a GPU is made of.")
@click.option("--list", "list_cases", is_flag=True, help="Name the cases and stop.")
@_kernel_options
@reports_mistakes
def attention(
    cases: tuple[str, ...],
    peers: tuple[str, ...],
    libraries: tuple[str, ...],
    dtype: str,
    rounds: int,
    seconds: float,
    latency: bool,
    list_cases: bool,
    json_file: Path | None,
) -> None:
    """Time the attention kernel of one layer; the method is in svdit.runtime.bench_attention."""
    if list_cases:
        click.echo("\n".join(case_names()))
        return
    implementations = _implementations(peers, libraries)
    if cases and latency:
        raise complain("--latency", "also --case", "one of the two")
    chosen = LATENCY if latency else cases or TABLE
    for name in cases:
        bench_case(name)
    _time_kernels([bench_case(name) for name in chosen], implementations, dtype, rounds, seconds, json_file)


@main.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@click.option("--stage", default=-1, metavar="N", help="Stage of the plan (default: the last).")
@click.option("--layer", "layers", multiple=True, type=int, metavar="N", help="Repeat for more (default: all).")
@_kernel_options
@reports_mistakes
def layer(
    plan_file: Path,
    stage: int,
    layers: tuple[int, ...],
    peers: tuple[str, ...],
    libraries: tuple[str, ...],
    dtype: str,
    rounds: int,
    seconds: float,
    json_file: Path | None,
) -> None:
    """Time the attention of layers of a plan, each beside the same layer with all heads full."""
    from svdit.plans.schema import read_plan

    plan = read_plan(plan_file)
    stage = len(plan.stages) - 1 if stage == -1 else stage
    sparse = [layer_case(plan, stage, number) for number in layers or range(plan.geometry.layers)]
    cases = [case for pair in ((case, dense_case(case)) for case in sparse) for case in pair]
    _time_kernels(cases, _implementations(peers, libraries), dtype, rounds, seconds, json_file)


def _time_kernels(
    cases: list[BenchCase],
    implementations: dict,
    dtype: str,
    rounds: int,
    seconds: float,
    json_file: Path | None,
) -> None:
    from svdit.runtime.bench_attention import gpu_description, time_case

    if dtype not in ("bfloat16", "float16"):
        raise complain("--dtype", dtype, "bfloat16 or float16")
    report = {**gpu_description(), "dtype": dtype, "rounds": rounds, "seconds": seconds, "cases": []}
    click.echo(f"{report['gpu']}, torch {report['torch']}, {dtype}; TFLOP/s of kept pairs")
    for case in cases:
        rows = [timing.to_json(case) for timing in time_case(case, implementations, dtype, rounds, seconds)]
        for row in rows:
            if "error" in row:
                click.echo(f"{case.name:22} {row['implementation']:14} {row['error']}")
            else:
                click.echo(
                    f"{case.name:22} {row['implementation']:14} {row['latency_ms']:10.3f} ms {row['tflops']:7.1f} "
                    f"TFLOP/s {row['sm_mhz'] or '?':>5} MHz {row['watts'] or '?':>4} W"
                )
        sys.stdout.flush()
        report["cases"].append(
            {"case": case.name, "shape": case.shape, "density": case.density, "flop": case.flop, "results": rows}
        )
        if json_file is not None:
            write_json(json_file, report)


@main.command()
@_runner_options
@reports_mistakes
def step(
    bundles: tuple[Path, ...],
    backends: tuple[str, ...],
    device: str,
    threads: int | None,
    rounds: int,
    seconds: float,
    json_file: Path | None,
) -> None:
    """Time one denoiser call of bundles DIR... wherever a stage begins in any one's plan."""
    from svdit.runtime.bench_runners import activated, candidates, stage_beginnings, time_steps

    found = candidates(bundles, backends, device=device, threads=threads)
    with activated(found):
        cases = [
            (f"stage-{i}", time_steps(found, begin, rounds, seconds)) for i, begin in enumerate(stage_beginnings(found))
        ]
    _report_runners(cases, rounds, seconds, json_file)


@main.command()
@click.option("--steps", type=click.IntRange(1), help="Denoising steps (default: the checkpoint's).")
@_runner_options
@reports_mistakes
def loop(
    bundles: tuple[Path, ...],
    backends: tuple[str, ...],
    device: str,
    threads: int | None,
    steps: int | None,
    rounds: int,
    seconds: float,
    json_file: Path | None,
) -> None:
    """Time the whole denoising loop of one prompt with bundles DIR..."""
    from svdit.runtime.bench_runners import activated, candidates, steps_of, time_loops

    found = candidates(bundles, backends, device=device, threads=threads)
    count = steps_of(found, steps)
    with activated(found):
        rows = time_loops(found, count, rounds, seconds)
    for candidate, row in zip(found, rows, strict=True):
        row["steps"], row["density"] = count, candidate.density(count)
    _report_runners([(f"loop-{count}", rows)], rounds, seconds, json_file)


def _report_runners(
    cases: list[tuple[str, list[dict]]], rounds: int, seconds: float, json_file: Path | None
) -> None:
    """Print the rows of every case, each with its speed-up over the first, and write them."""
    from svdit.runtime.bench_runners import machine

    report = {**machine(), "rounds": rounds, "seconds": seconds, "cases": []}
    click.echo(f"{report['gpu'] or report['cpu']}, torch {report['torch']}")
    for name, rows in cases:
        for row in rows:
            row["speedup"] = round(rows[0]["latency_ms"] / row["latency_ms"], 4)
            click.echo(f"{name:10} {row['implementation']:32} {row['latency_ms']:10.3f} ms {row['speedup']:7.3f}x")
        report["cases"].append({"case": name, "results": rows})
    write_json(json_file, report)


def _implementations(peers: tuple[str, ...], libraries: tuple[str, ...]) -> dict:
    from svdit.runtime.bench_attention import PEERS, ours
    from svdit.trt_plugins import cuda_library

    found = {}
    for text in libraries:
        name, _, path = text.rpartition("=")
        if not Path(path).is_file():
            raise complain("--library", path, "a built libsvdit_kernels.so")
        found[name or "svdit"] = ours(Path(path))
    if not libraries:
        path = cuda_library.find()
        if path is None:
            raise complain("kernel library", "none", cuda_library.FILE_NAME, "build it with CMake (docs/kernels.md)")
        found["svdit"] = ours(path)
    for name in peers:
        if name not in PEERS:
            raise complain("--peer", name, "one of " + ", ".join(PEERS))
        found[name] = PEERS[name]
    return found


if __name__ == "__main__":
    main()
