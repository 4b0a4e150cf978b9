#!/usr/bin/env python3
"""Time of one denoising step of `tiny` on the CPU for each of several plans, against dense attention.

    speed_tiny.py plans/library/*.plan.json [--rounds 2]

Each plan is exported (portable) and loaded in ONNX Runtime beside the dense variant. In every round the dense graph and
each stage's graph run once, in turn; medians count. A plan's step is the mean over its stages, weighted by their steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from svdit.exporter.export import export
from svdit.plans.flops import mean_density
from svdit.plans.schema import Plan, read_plan
from svdit.runtime.ort_runner import OrtRunner
from svdit.runtime.progress import progress
from svdit.runtime.runner import Runner

STEPS = 25
BATCH = 2


def seconds(runner: Runner, stage: int) -> float:
    rng = np.random.default_rng(0)
    shapes = {x.name: [n if isinstance(n, int) else BATCH for n in x.shape] for x in runner.inputs}
    feed = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    feed["timestep"] = np.full(feed["timestep"].shape, 500, np.float32)
    begin = time.perf_counter()
    runner.infer(feed, stage)
    return time.perf_counter() - begin


def time_plan(plan: Plan, folder: Path, rounds: int) -> tuple[float, float]:
    """Seconds of a dense step and of a mean step of the plan."""
    bundles = [export("tiny", plan, folder / variant, variant=variant) for variant in ("dense", "portable")]
    stages = [plan.stage_of(step, STEPS) for step in range(STEPS)]
    taken: dict[int, list[float]] = {stage: [] for stage in (-1, *set(stages))}
    with OrtRunner(bundles[0]) as dense, OrtRunner(bundles[1]) as sparse:
        for _ in range(rounds):
            for stage, times in taken.items():
                times.append(seconds(dense if stage < 0 else sparse, max(stage, 0)))
    medians = {stage: statistics.median(times) for stage, times in taken.items()}
    return medians[-1], statistics.mean(medians[stage] for stage in stages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    rows = []
    for path in progress(args.plans, "timing plans", "plan"):
        plan = read_plan(path)
        with tempfile.TemporaryDirectory() as folder:
            dense, sparse = time_plan(plan, Path(folder), args.rounds)
        name, density = path.name.removesuffix(".plan.json"), mean_density(plan, STEPS)
        rows.append(f"| {name} | {density:.3f} | {dense:.2f} | {sparse:.2f} | {dense / sparse:.2f}x |")
    print("| plan | density | dense, s a step | plan, s a step | ratio |\n| --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
