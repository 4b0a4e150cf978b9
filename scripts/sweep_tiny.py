#!/usr/bin/env python3
"""Search plans for `tiny` and judge many of them by their videos, all in torch on one device.

    sweep_tiny.py --out DIR --device cuda

For each tile shape: one measuring walk (paper mode), then for each density (and each lam, eps pair) the choice is
made again from the stored errors, the videos of the held-out prompts are drawn with dense and with the plan's
attention from the same noise, and PSNR over all pixels is taken. Writes DIR/*.plan.json, DIR/*.search.npz and
DIR/sweep.json after every plan, so that an interrupted sweep keeps what it has.
"""
from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from svdit.exporter.models import registry
from svdit.plans.schema import write_plan
from svdit.plans.search import Rule, rule_for_density
from svdit.runtime.measure import plan_of, search
from svdit.runtime.pipeline import generate

SEARCH_PROMPTS = ["red circle moving right", "fast blue square moving up-left", "slow green triangle moving down",
                  "yellow square moving up"]
TEST_PROMPTS = ["cyan circle moving left", "fast magenta triangle moving right", "slow red square moving down-left",
                "green circle moving up-right", "fast yellow triangle moving down", "blue circle moving down-right",
                "slow cyan square moving up", "magenta circle moving up-left"]
TEST_SEED = 1000


def psnr(dense: np.ndarray, video: np.ndarray) -> list[float]:
    """dB per video, uint8 [P, F, H, W, 3] each."""
    gap = (dense.astype(np.float64) - video.astype(np.float64)) ** 2
    return [float(10 * np.log10(255**2 / max(e, 1e-9))) for e in gap.mean((1, 2, 3, 4))]


def numbers(text: str) -> list[float]:
    return [float(x) for x in text.split(",") if x]


def tile_of(text: str) -> tuple[int, int, int]:
    t, h, w = map(int, text.split("x"))
    return t, h, w


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16", help="of the videos; errors are always measured in float32")
    parser.add_argument("--tiles", default="1x8x8,2x8x8")
    parser.add_argument("--densities", default="0.5,0.4,0.45,0.35,0.3,0.55,0.25,0.2")
    parser.add_argument("--stages", default="3,1")
    parser.add_argument("--lam", default="0.5")
    parser.add_argument("--eps", default="", help="paper rule: every eps with every lam")
    parser.add_argument("--closed", type=float, help="walk twice, the second time with the rule of this density")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--count", type=int, default=8, help="test prompts")
    parser.add_argument("--videos", action="store_true", help="also write the videos, as DIR/*.npz")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    adapter, began, rows = registry.adapter("tiny"), time.time(), []
    prompts = TEST_PROMPTS[:args.count]

    def videos(plan=None):
        return generate(adapter, args.checkpoint, prompts, plan=plan, seed=TEST_SEED, steps=args.steps,
                        device=args.device, dtype=args.dtype, attention="masked").videos

    dense = videos()
    if args.videos:
        np.savez_compressed(args.out / "dense.npz", videos=dense)

    def judge(name: str, plan, **facts) -> None:
        write_plan(args.out / f"{name}.plan.json", plan)
        found = videos(plan)
        if args.videos:
            np.savez_compressed(args.out / f"{name}.npz", videos=found)
        values = psnr(dense, found)
        rows.append({"plan": name, **facts, "density": plan.provenance["density"], "psnr": values})
        (args.out / "sweep.json").write_text(json.dumps(rows, indent=1))
        print(f"{time.time() - began:5.0f} s {name}: density {rows[-1]['density']:.3f} PSNR {np.mean(values):.2f} "
              f"(min {min(values):.2f})", flush=True)

    for text in args.tiles.split(","):
        shape = tile_of(text)

        def walk(rule: Rule, state: str | None, shape=shape):
            return search(adapter, args.checkpoint, SEARCH_PROMPTS, rule=rule, tile=shape, steps=args.steps,
                          device=args.device, state=state and args.out / state, show=False)

        rule = Rule()
        if args.closed:  # twice: the second walk feeds forward about the choices that will be made
            rule = rule_for_density(walk(rule, None).measurement, args.closed, 3)
        found = walk(rule, f"tiny-{text}.search.npz")
        print(f"{time.time() - began:5.0f} s searched with tile {text}", flush=True)
        judge(f"tiny-{text}-closed", found.plan, rule="closed loop")
        for stages in map(int, args.stages.split(",")):
            for density in numbers(args.densities):
                rule = rule_for_density(found.measurement, density, stages)
                judge(f"tiny-{text}-d{density:g}-s{stages}", plan_of(found.state, rule, stages), lam=rule.lam)
        for lam in numbers(args.lam):
            for eps in numbers(args.eps):
                judge(f"tiny-{text}-lam{lam:g}-eps{eps:g}", plan_of(found.state, Rule(lam, eps), 3), lam=lam, eps=eps)


if __name__ == "__main__":
    main()
