#!/usr/bin/env python3
"""Time of one denoising step of `tiny` on the CPU for each of several plans, against dense attention.

    speed_tiny.py plans/library/*.plan.json [--rounds 2]

Each plan is exported (portable) and loaded in ONNX Runtime beside the dense variant; the two take turns in every
stage, as in `svdit-bench step`, and medians count. A plan's step is the mean over its stages, weighted by their steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from svdit.exporter.export import export
from svdit.plans.flops import mean_density, stage_shares
from svdit.plans.schema import Plan, read_plan
from svdit.runtime.bench_runners import activated, candidates, time_steps
from svdit.runtime.progress import progress

STEPS = 25


def time_plan(plan: Plan, folder: Path, rounds: int) -> tuple[float, float]:
    """Seconds of a dense step and of a mean step of the plan."""
    for variant in ("dense", "portable"):
        export("tiny", plan, folder / variant, variant=variant)
    found = candidates([folder / "dense", folder / "portable"], ["onnxrt"])
    begins = [0.0, *(stage.until for stage in plan.stages[:-1])]
    with activated(found):
        rows = [[row["latency_ms"] / 1000 for row in time_steps(found, begin, rounds, 0.0)] for begin in begins]
    dense, sparse = zip(*rows, strict=True)
    shares = stage_shares(plan, STEPS)
    return statistics.median(dense), float(sum(share * t for share, t in zip(shares, sparse, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    print("| plan | density | dense, s a step | plan, s a step | ratio |\n| --- | --- | --- | --- | --- |", flush=True)
    for path in progress(args.plans, "timing plans", "plan"):
        plan = read_plan(path)
        with tempfile.TemporaryDirectory() as folder:
            dense, sparse = time_plan(plan, Path(folder), args.rounds)
        name, density = path.name.removesuffix(".plan.json"), mean_density(plan, STEPS)
        print(f"| {name} | {density:.3f} | {dense:.2f} | {sparse:.2f} | {dense / sparse:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
