#!/usr/bin/env python3
"""Search plans for `tiny` and judge many of them by their videos, all in torch on one device.

    sweep_tiny.py --out DIR --device cuda --videos
    sweep_tiny.py --out DIR --judge PLAN [PLAN ...]   # no search: the videos of these plans
    sweep_tiny.py --table DIR                         # PSNR and SSIM of the videos of a finished sweep, as a table

For each tile shape: one measuring walk (paper mode), then for each number of stages, share of dense steps and
density (and for each lam, eps pair) the choice is made again from the stored errors, the videos of the held-out
prompts are drawn with dense and with the plan's attention from the same noise, and PSNR over all pixels is taken.
`--prompts search` judges on the prompts and noise that the plans were searched with, `--prompts FILE --seed N` on
others.
Writes DIR/*.plan.json, DIR/*.search.npz and DIR/sweep.json after every plan, so that an interrupted sweep keeps
what it has.
"""
from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np

from svdit.exporter.models import registry
from svdit.plans.flops import mean_density
from svdit.plans.schema import read_plan, write_plan
from svdit.plans.search import Rule, rule_for_density
from svdit.plans.tiles import Tiling
from svdit.runtime.candidates import default_candidates
from svdit.runtime.measure import plan_of, search
from svdit.runtime.pipeline import generate
from svdit.runtime.prompt_options import collect_prompts
from svdit.runtime.torch_runner import checkpoint_of

SEARCH_PROMPTS = ["red circle moving right", "fast blue square moving up-left", "slow green triangle moving down",
                  "yellow square moving up"]
TEST_PROMPTS = ["cyan circle moving left", "fast magenta triangle moving right", "slow red square moving down-left",
                "green circle moving up-right", "fast yellow triangle moving down", "blue circle moving down-right",
                "slow cyan square moving up", "magenta circle moving up-left"]
TEST_SEED = 1000
STEPS = 25


def psnr(dense: np.ndarray, video: np.ndarray) -> list[float]:
    """dB per video, uint8 [P, F, H, W, 3] each."""
    gap = (dense.astype(np.float64) - video.astype(np.float64)) ** 2
    return [float(10 * np.log10(255**2 / max(e, 1e-9))) for e in gap.mean((1, 2, 3, 4))]


def numbers(text: str) -> list[float]:
    return [float(x) for x in text.split(",") if x]


def tile_of(text: str) -> tuple[int, int, int]:
    t, h, w = map(int, text.split("x"))
    return t, h, w


def table(folder: Path) -> None:
    """Print mean PSNR and SSIM against dense for every plan of a sweep that kept its videos, densest first."""
    from svdit.runtime.metrics import psnr as exact_psnr
    from svdit.runtime.metrics import ssim

    dense = np.load(folder / "dense.npz")["videos"]
    print("| plan | density | stages | PSNR, dB | lowest | SSIM |\n| --- | --- | --- | --- | --- | --- |")
    for row in sorted(json.loads((folder / "sweep.json").read_text()), key=lambda r: -r["density"]):
        videos = np.load(folder / f"{row['plan']}.npz")["videos"]
        values = [exact_psnr(a, b) for a, b in zip(dense, videos, strict=True)]
        likeness = np.mean([ssim(a, b) for a, b in zip(dense, videos, strict=True)])
        print(f"| {row['plan']} | {row['density']:.3f} | {row['stages']} | {np.mean(values):.2f} | {min(values):.2f} | "
              f"{likeness:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, metavar="DIR")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16", help="of the videos; errors are always measured in float32")
    parser.add_argument("--tiles", default="4x4x4,1x8x8")
    parser.add_argument("--densities", default="0.5,0.4,0.45,0.35,0.3,0.55,0.25,0.2")
    parser.add_argument("--stages", default="3")
    parser.add_argument("--lam", default="0.5")
    parser.add_argument("--eps", default="", help="paper rule: every eps with every lam")
    parser.add_argument("--dense-steps", default="0.2", help="shares of the steps; the walk uses the first")
    parser.add_argument("--search-count", type=int, default=4, help="prompts of the walk")
    parser.add_argument("--query-tiles", type=int, help="measure errors on that many query tiles")
    parser.add_argument("--top", default="", help="shares of tile pairs: adds each head's heaviest tiles as candidates")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--count", type=int, default=8, help="test prompts")
    parser.add_argument("--judge", type=Path, nargs="+", metavar="PLAN", help="judge these plans instead of searching")
    parser.add_argument("--prompts", default="test", help="videos to judge by: test, search or a file, a prompt a line")
    parser.add_argument("--seed", type=int, help=f"of the first video (default: test {TEST_SEED}, else 0)")
    parser.add_argument("--attention", default="masked", help="of the plans: masked, op or auto (the built kernel)")
    parser.add_argument("--videos", action="store_true", help="also write the videos, as DIR/*.npz")
    args = parser.parse_args()
    if args.table:
        table(args.table)
        return
    if args.out is None:
        parser.error("--out DIR is needed")

    args.out.mkdir(parents=True, exist_ok=True)
    adapter, began, rows = registry.adapter("tiny"), time.time(), []
    known = {"test": (TEST_PROMPTS[:args.count], TEST_SEED), "search": (SEARCH_PROMPTS, 0)}
    prompts, seed = known.get(args.prompts) or (collect_prompts((), Path(args.prompts)), 0)
    seed = seed if args.seed is None else args.seed

    def videos(plan=None):
        return generate(adapter, args.checkpoint, prompts, plan=plan, seed=seed, steps=args.steps,
                        device=args.device, dtype=args.dtype, attention=args.attention).videos

    dense = videos()
    if args.videos:
        np.savez_compressed(args.out / "dense.npz", videos=dense)

    def judge(name: str, plan, rule: Rule | None = None) -> None:
        write_plan(args.out / f"{name}.plan.json", plan)
        found = videos(plan)
        if args.videos:
            np.savez_compressed(args.out / f"{name}.npz", videos=found)
        values = psnr(dense, found)
        rows.append({"plan": name, "method": plan.provenance.get("method"), **(asdict(rule) if rule else {}),
                     "stages": len(plan.stages), "density": mean_density(plan, args.steps or STEPS), "psnr": values})
        (args.out / "sweep.json").write_text(json.dumps(rows, indent=1))
        print(f"{time.time() - began:5.0f} s {name}: density {rows[-1]['density']:.3f} PSNR {np.mean(values):.2f} "
              f"(min {min(values):.2f})", flush=True)

    for path in args.judge or ():
        judge(path.name.removesuffix(".plan.json"), read_plan(path))
    for text in args.tiles.split(",") if args.judge is None else ():
        rule = Rule(dense_steps=numbers(args.dense_steps)[0])
        tiling = Tiling(adapter.geometry(checkpoint_of(adapter, args.checkpoint)), tile_of(text))
        top = {f"heaviest-{p:g}": {"kind": "tiles", "rows": {"top": p}} for p in numbers(args.top)}
        found = search(adapter, args.checkpoint, SEARCH_PROMPTS[:args.search_count], rule=rule, tile=tile_of(text),
                       candidates=default_candidates(tiling) | top, steps=args.steps, query_tiles=args.query_tiles,
                       device=args.device, state=args.out / f"tiny-{text}.search.npz", show=False)
        print(f"{time.time() - began:5.0f} s searched with tile {text}", flush=True)
        measured = found.measurement
        for stages, share, density in product(map(int, args.stages.split(",")), numbers(args.dense_steps),
                                              numbers(args.densities)):
            rule = rule_for_density(measured, density, stages, dense_steps=share)
            judge(f"tiny-{text}-d{density:g}-w{share:g}-s{stages}", plan_of(found.state, rule, stages), rule)
        for lam, eps in product(numbers(args.lam), numbers(args.eps)):
            rule = Rule(lam, eps, dense_steps=numbers(args.dense_steps)[0])
            judge(f"tiny-{text}-lam{lam:g}-eps{eps:g}", plan_of(found.state, rule, 3), rule)


if __name__ == "__main__":
    main()
