"""svdit-bench: options in, timings out as a table and as JSON."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from svdit.plans.command import json_option, reports_mistakes, write_json
from svdit.plans.errors import complain
from svdit.runtime.bench_cases import TABLE, bench_case, case_names


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Times beside the peers installed."""


@main.command()
@click.option("--case", "cases", multiple=True, metavar="NAME", help="Case; repeat for more (default: the table).")
@click.option("--peer", "peers", multiple=True, metavar="NAME", help="fa4, cudnn or flex; repeat for more.")
@click.option(
    "--library",
    "libraries",
    multiple=True,
    metavar="[NAME=]PATH",
    help="Kernel library to time, with a name for the table; repeat to compare builds (default: the built one).",
)
@click.option("--dtype", default="bfloat16", show_default=True, metavar="TYPE", help="bfloat16 or float16.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Turns of each.")
@click.option("--seconds", default=0.5, show_default=True, type=float, help="Length of a turn, at least.")
@click.option("--list", "list_cases", is_flag=True, help="Name the cases and stop.")
@json_option
@reports_mistakes
def attention(
    cases: tuple[str, ...],
    peers: tuple[str, ...],
    libraries: tuple[str, ...],
    dtype: str,
    rounds: int,
    seconds: float,
    list_cases: bool,
    json_file: Path | None,
) -> None:
    """Time the attention kernel of one layer; the method is in svdit.runtime.bench_attention."""
    if list_cases:
        click.echo("\n".join(case_names()))
        return
    from svdit.runtime.bench_attention import gpu_description, time_case

    implementations = _implementations(peers, libraries)
    if dtype not in ("bfloat16", "float16"):
        raise complain("--dtype", dtype, "bfloat16 or float16")
    for name in cases:
        bench_case(name)
    report = {**gpu_description(), "dtype": dtype, "rounds": rounds, "seconds": seconds, "cases": []}
    click.echo(f"{report['gpu']}, torch {report['torch']}, {dtype}; TFLOP/s of kept pairs")
    for name in cases or TABLE:
        case = bench_case(name)
        rows = [timing.to_json(case) for timing in time_case(case, implementations, dtype, rounds, seconds)]
        for row in rows:
            if "error" in row:
                click.echo(f"{name:14} {row['implementation']:14} {row['error']}")
            else:
                click.echo(
                    f"{name:14} {row['implementation']:14} {row['latency_ms']:10.3f} ms {row['tflops']:7.1f} TFLOP/s "
                    f"{row['sm_mhz'] or '?':>5} MHz {row['watts'] or '?':>4} W"
                )
        sys.stdout.flush()
        report["cases"].append(
            {"case": name, "shape": case.shape, "density": case.density, "flop": case.flop, "results": rows}
        )
        if json_file is not None:
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
