#!/usr/bin/env python3
"""Time of one denoising step of `tiny` on the CPU for each of several plans, against dense attention.

    speed_tiny.py plans/library/*.plan.json [--rounds 2] [--rows 2] [--json speed.json]

Every distinct stage of the plans is exported alone (portable) and timed in ONNX Runtime: a call to warm up and
--rounds that count, each after a call of the dense variant; medians count. A plan's step is the mean over its stages,
weighted by their steps; its ratio is that of neighbouring calls, so that slow moments of the machine count on both
sides. One row a call (--rows 1) is a prompt without guidance.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from svdit.exporter.export import export
from svdit.plans.flops import mean_density, stage_shares
from svdit.plans.schema import Plan, Stage, read_plan, template
from svdit.runtime.bench_runners import step_call
from svdit.runtime.ort_runner import OrtRunner
from svdit.runtime.progress import progress

STEPS = 25


def alone(plan: Plan, stage: Stage) -> Plan:
    """A plan of this one stage."""
    used = {name for row in stage.layers for name in row}
    patterns = {name: pattern for name, pattern in plan.patterns.items() if name in used}
    return Plan(plan.model, plan.geometry, plan.tile, patterns, (Stage(1.0, stage.layers),), {"method": "timing"})


def computed(plan: Plan, stage: Stage) -> tuple:
    """What the stage computes: equal for stages that differ in names only."""
    return (plan.tile, *(tuple(plan.pattern(name) for name in row) for row in stage.layers))


def runner_of(plan: Plan, folder: str, variant: str, args: argparse.Namespace) -> OrtRunner:
    path = Path(folder) / variant
    return OrtRunner(export("tiny", plan, path, checkpoint=args.checkpoint, variant=variant, batch=args.rows))


def time_stage(plan: Plan, stage: Stage, dense: Callable[[], float], args: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of calls of the stage, and of the dense calls right before them."""
    with (
        tempfile.TemporaryDirectory() as folder,
        runner_of(alone(plan, stage), folder, "portable", args) as runner,
    ):
        sparse = step_call(runner, 0)
        sparse()
        turns = [{"dense": 1e3 * dense(), "sparse": 1e3 * sparse()} for _ in range(args.rounds)]
    return {name: statistics.median(turn[name] for turn in turns) for name in ("dense", "sparse")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2, help="of a denoiser call")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    known: dict[tuple, dict[str, float]] = {}
    results = []
    first = read_plan(args.plans[0])
    print("| plan | density | dense, s a step | plan, s a step | ratio |\n| --- | --- | --- | --- | --- |", flush=True)
    with (
        tempfile.TemporaryDirectory() as outer,
        runner_of(template("tiny", first.geometry, first.tile), outer, "dense", args) as runner,
    ):
        dense = step_call(runner, 0)
        dense()
        for path in progress(args.plans, "timing plans", "plan"):
            plan = read_plan(path)
            for stage in plan.stages:
                key = computed(plan, stage)
                if key not in known:
                    known[key] = time_stage(plan, stage, dense, args)
            shares, name = stage_shares(plan, STEPS), path.name.removesuffix(".plan.json")
            rows = [known[computed(plan, stage)] for stage in plan.stages]
            step = {n: float(shares @ np.array([row[n] for row in rows])) for n in ("dense", "sparse")}
            density = mean_density(plan, STEPS)
            ratio = 1 / float(shares @ np.array([row["sparse"] / row["dense"] for row in rows]))
            results.append({"plan": name, "density": density, "speedup": ratio, "step_ms": step, "stages": rows})
            print(
                f"| {name} | {density:.3f} | {step['dense'] / 1e3:.2f} | {step['sparse'] / 1e3:.2f} | {ratio:.2f}x |",
                flush=True,
            )
            if args.json:
                args.json.write_text(json.dumps({"rows": args.rows, "rounds": args.rounds, "plans": results}) + "\n")


if __name__ == "__main__":
    main()
