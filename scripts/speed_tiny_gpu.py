#!/usr/bin/env python3
"""Time of `tiny`'s denoising loop on a GPU under each of several plans, against dense attention, all in one run.

    speed_tiny_gpu.py PLAN [PLAN ...] --json speed.json [--prompts 8] [--rounds 3] [--seconds 0.1]

One denoiser call holds all prompts, two rows each (guidance). Inputs are normal numbers: time does not depend on them.
Dense is the faster of the kernel with all heads full and torch's fused attention. Every stage of every plan has its
turn once a round, in an order that rotates; medians count. The loop is 25 calls, each in its stage. Times of attention
are those between two events around each layer's call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from svdit.plans import registry
from svdit.plans.flops import mean_density, stage_shares
from svdit.plans.schema import Plan, read_plan, template
from svdit.runtime.attention import DenseAttention, plan_attention
from svdit.runtime.bench_attention import Board, turns
from svdit.runtime.torch_runner import TorchRunner, checkpoint_of

STEPS = 25
DENSE = ("dense, kernel", "dense, torch")


class Clock:
    """Marks in the order of the device's work, and milliseconds between two of them once it is done."""

    def __init__(self, device: str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"

    def mark(self) -> object:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: object, stop: object) -> float:
        return start.elapsed_time(stop) if self.on_gpu else 1e3 * (stop - start)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


class Timed:
    """An attention function that leaves a pair of marks for every layer."""

    def __init__(self, attention: Callable, clock: Clock) -> None:
        self.attention, self.clock, self.marks = attention, clock, []

    def __call__(self, *args: object) -> torch.Tensor:
        start = self.clock.mark()
        out = self.attention(*args)
        self.marks.append((start, self.clock.mark()))
        return out


class Denoiser:
    """tiny with tokens in one tile order; `call` times one denoiser call."""

    def __init__(self, runner: TorchRunner, rows: int, clock: Clock) -> None:
        self.model, self.clock = runner.model, clock
        generator = torch.Generator().manual_seed(0)
        sizes = {spec.name: spec.sizes(rows) for spec in runner.inputs}
        self.feed = {n: torch.randn(size, generator=generator).to(runner.device) for n, size in sizes.items()}

    def call(self, attention: Callable, stage: torch.Tensor) -> tuple[float, list[float]]:
        """Milliseconds of a call, and of the attention of each layer."""
        timed = self.model.attention = Timed(attention, self.clock)
        start = self.clock.mark()
        with torch.inference_mode():
            self.model(**self.feed, stage=stage)
        stop = self.clock.mark()
        self.clock.wait()
        return self.clock.between(start, stop), [self.clock.between(*pair) for pair in timed.marks]


def take_turns(calls: dict, rounds: int, seconds: float) -> tuple[dict, list[int]]:
    """name -> [(ms of a call, [ms of attention by layer])] and the clock rates seen, in MHz."""
    found: dict = {name: [] for name in calls}
    board, clocks = Board(), []
    for call in calls.values():
        call()
    for name in turns(list(calls), rounds):
        began = time.perf_counter()
        found[name].append(calls[name]())
        while time.perf_counter() - began < seconds:
            found[name].append(calls[name]())
        clocks += board.megahertz()
    return found, clocks


def median(samples: list[tuple[float, list[float]]]) -> dict[str, object]:
    layers = zip(*(layers for _, layers in samples), strict=True)
    return {
        "step_ms": round(statistics.median(ms for ms, _ in samples), 4),
        "attention_ms": [round(statistics.median(layer), 4) for layer in layers],
        "calls": len(samples),
    }


def loop_ms(plan: Plan, stages: list[dict]) -> tuple[float, float]:
    """Milliseconds of a loop and of its attention."""
    counts = [STEPS * share for share in stage_shares(plan, STEPS)]
    return (
        sum(n * stage["step_ms"] for n, stage in zip(counts, stages, strict=True)),
        sum(n * sum(stage["attention_ms"]) for n, stage in zip(counts, stages, strict=True)),
    )


def time_plans(plans: dict[str, Plan], args: argparse.Namespace) -> dict[str, object]:
    """Every stage of every plan and dense attention in turn."""
    adapter, clock, calls, rows = registry.adapter("tiny"), Clock(args.device), {}, 2 * args.prompts
    folder = checkpoint_of(adapter, args.checkpoint)
    with ExitStack() as stack:
        denoisers: dict[tuple, Denoiser] = {}
        for plan in plans.values():
            if plan.tile in denoisers:
                continue
            runner = TorchRunner(adapter, folder, plan.tiling(), None, device=args.device, dtype=args.dtype)
            denoisers[plan.tile] = Denoiser(stack.enter_context(runner), rows, clock)
        first = next(iter(plans.values()))

        def add(name: tuple, tile: tuple, attention: Callable, stage: int) -> None:
            number = torch.tensor([stage], dtype=torch.int32, device=args.device)
            calls[name] = lambda: denoisers[tile].call(attention, number)

        full = template("dense", first.geometry, first.tile)
        add((DENSE[0], 0), first.tile, plan_attention(full, args.device, "op"), 0)
        add((DENSE[1], 0), first.tile, DenseAttention(first.tiling()), 0)
        for name, plan in plans.items():
            attention = plan_attention(plan, args.device, "op")
            for stage in range(len(plan.stages)):
                add((name, stage), plan.tile, attention, stage)
        found, clocks = take_turns(calls, args.rounds, args.seconds)
    times = {key: median(samples) for key, samples in found.items()}
    dense = {name: STEPS * times[name, 0]["step_ms"] for name in DENSE}
    dense_attention = {name: STEPS * sum(times[name, 0]["attention_ms"]) for name in DENSE}
    results = []
    for name, plan in plans.items():
        stages = [times[name, stage] for stage in range(len(plan.stages))]
        whole, attention = loop_ms(plan, stages)
        results.append(
            {
                "plan": name,
                "method": plan.provenance.get("method"),
                "density": round(mean_density(plan, STEPS), 4),
                "loop_ms": round(whole, 2),
                "attention_ms": round(attention, 2),
                "speedup": round(min(dense.values()) / whole, 4),
                "attention_speedup": round(min(dense_attention.values()) / attention, 4),
                "stages": stages,
            }
        )
    return {
        "device": torch.cuda.get_device_name() if clock.on_gpu else "cpu",
        "torch": torch.__version__,
        "dtype": args.dtype,
        "rows": rows,
        "steps": STEPS,
        "rounds": args.rounds,
        "sm_mhz": [min(clocks), statistics.median(clocks), max(clocks)] if clocks else None,
        "dense_loop_ms": dense,
        "dense_attention_ms": dense_attention,
        "dense": {name: times[name, 0] for name in DENSE},
        "plans": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.1, help="of a turn, at least")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16")
    args = parser.parse_args()
    found = time_plans({path.name.removesuffix(".plan.json"): read_plan(path) for path in args.plans}, args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['device']}, {found['rows']} rows a call; dense loop and its attention, ms:")
    print(json.dumps({"loop": found["dense_loop_ms"], "attention": found["dense_attention_ms"]}))
    print("| plan | density | loop, ms | speed-up | attention, ms | speed-up of attention |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in found["plans"]:
        print(
            f"| {row['plan']} | {row['density']:.3f} | {row['loop_ms']:.1f} | {row['speedup']:.3f} | "
            f"{row['attention_ms']:.1f} | {row['attention_speedup']:.3f} |"
        )


if __name__ == "__main__":
    main()
