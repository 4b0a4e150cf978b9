#!/usr/bin/env python3
"""Time one step of error estimation for a model's shape, with random queries, keys and values (no weights needed).

    time_search.py --json DIR/estimate.json [--model hunyuan] [--query-tiles 16] [--device cuda]

Runs the search's own measuring hook once for each layer, on one sequence, and beside it the dense attention of a layer.
Prints seconds and memory, and what the whole search takes: --steps sampled steps of --prompts prompts, the forward
pass outside attention as given by --rest-seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from svdit.exporter.models import registry
from svdit.plans.search import Rule
from svdit.plans.tiles import Tiling
from svdit.runtime.candidates import MAP_PARTS, default_candidates, is_measured, needs_rows, resolve
from svdit.runtime.measure import SAMPLED_MAP_STEPS
from svdit.runtime.mode_masks import ModeMasks
from svdit.runtime.search_attention import ChoosingAttention, MapRecorder, full_attention
from svdit.runtime.tile_errors import TileErrorMeter


def candidate_masks(tiling: Tiling, seconds: dict[str, float]) -> ModeMasks:
    """Masks of the default candidates; measured columns come from a random map of each head."""
    random = np.random.default_rng(0)
    geometry, side = tiling.geometry, tiling.num_video_tiles
    specs = default_candidates(tiling)
    parts = MAP_PARTS if any(needs_rows(spec) for spec in specs.values()) else 1
    began = time.perf_counter()
    maps = random.random((geometry.layers, geometry.heads, parts, side, side), dtype=np.float32)
    patterns = tuple(
        tuple(tuple(resolve(spec, tiling, head) for head in layer) for layer in maps)
        if is_measured(spec)
        else resolve(spec, tiling, maps[0][0])
        for spec in specs.values()
    )
    masks = ModeMasks(patterns, tiling)
    seconds["masks"] = time.perf_counter() - began
    return masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hunyuan")
    parser.add_argument("--layers", type=int, help="time fewer layers (default: the model's) and scale up")
    parser.add_argument("--query-tiles", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--rest-seconds", type=float, help="forward pass outside attention, one row, if known")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    adapter = registry.adapter(args.model)
    packaged = adapter.packaged_checkpoint()
    whole = adapter.published.geometry(adapter.latent) if packaged is None else adapter.geometry(packaged)
    layers = args.layers or whole.layers
    tiling = Tiling(replace(whole, layers=layers), adapter.default_tile())
    geometry, device, seconds = tiling.geometry, args.device, {}
    masks = candidate_masks(tiling, seconds)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    shape = (1, geometry.tokens, geometry.heads, geometry.head_dim)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
    width = geometry.heads * geometry.head_dim
    weight = torch.randn(width, width, generator=generator, device=device, dtype=dtype) * width**-0.5
    hook = ChoosingAttention(
        TileErrorMeter(tiling, device),
        tiling,
        masks,
        Rule(dense_steps=1.0),
        full_attention(tiling, device, "bfloat16" if device.startswith("cuda") else "float32"),
        query_tiles=args.query_tiles,
        weights=[weight] * layers,
    )
    hook.dense = True
    stage = torch.zeros(1, dtype=torch.int32, device=device)
    text_len = torch.full((1,), geometry.text_tokens, dtype=torch.int32, device=device)
    cuda = device.startswith("cuda")

    def timed(name: str, call) -> None:
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - began
        print(f"{name}: {seconds[name]:.3f} s", flush=True)

    timed("first layer, warming up", lambda: hook(q, k, v, 0, stage, text_len))
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    timed("dense attention of a layer", lambda: hook.full(q, k, v, 0, stage, text_len))
    dense = hook.full(q, k, v, 0, stage, text_len)
    timed("all layers", lambda: [hook.measure(q, k, v, n, text_len, dense) for n in range(layers)])
    recorder = MapRecorder(hook.meter, tiling, hook.full, 1, args.query_tiles)
    timed("columns of all layers", lambda: [recorder(q, k, v, n, stage, text_len) for n in range(layers)])
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else None
    scale, rest = whole.layers / layers, args.rest_seconds or 0.0
    step = seconds["all layers"] * scale
    one = step + whole.layers * seconds["dense attention of a layer"] + rest
    once = seconds["masks"] * scale + SAMPLED_MAP_STEPS * (seconds["columns of all layers"] * scale + rest)
    found = {
        "model": args.model,
        "tokens": geometry.tokens,
        "candidates": hook.sparsity.shape[2],
        "query_tiles": args.query_tiles,
        "query_tiles_of": tiling.num_tiles,
        "layers_timed": layers,
        "seconds": seconds,
        "estimation_of_a_step_s": step,
        "peak_gib": peak,
        "rest_s": args.rest_seconds,
        "once_s": once,
        "search_s": one * args.steps * args.prompts + once,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
