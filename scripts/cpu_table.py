#!/usr/bin/env python3
"""Measure the latency table of a CPU for ONNX Runtime's CPU provider (portable variant, docs/export.md).

    cpu_table.py -o cpu.json [--model tiny] [--rounds 9]

Every case is a graph with one attention layer of the model's size and random inputs: one head with a pattern beside
heads that skip, since the heads of a plan's layer seldom share one, or mixed heads. Cases take turns, `--rounds` of
them after one to warm up, and medians count. A pass outside attention is a pass whose heads all keep next to nothing,
without what its layers take alone. The dense variant is timed as well. Run it on an idle machine.
At the end: what the table predicts for its own mixed layers when it is fitted without them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from svdit.exporter import portable
from svdit.exporter.export import export
from svdit.exporter.graph import drop_unused
from svdit.exporter.models import registry
from svdit.exporter.op_model import op_model
from svdit.plans.cost import cost_model, head_work, read_hardware
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, Full, MultiDiagonal, Pattern, Skip, Stripe, Union
from svdit.plans.schema import Plan, Stage, template
from svdit.plans.tables import tables_of
from svdit.plans.tiles import Tiling
from svdit.runtime.bench_runners import processor, step_call, time_calls, timed
from svdit.runtime.ort_runner import OrtRunner, cpu_options

MIXED = "mixed"
LEAST = MultiDiagonal(rows=0, cols=0)
"""Keeps next to nothing, so that a layer of it costs little beside what is outside attention."""
Heads = tuple[Pattern, ...]


def cases(tiling: Tiling) -> dict[str, Heads]:
    """One head each of kinds and sizes whose densities and numbers of key lists differ widely; mixed layers."""
    plane = tiling.tile_grid[1] * tiling.tile_grid[2]
    alone: dict[str, Pattern] = {
        "full": Full(),
        "multi-0-0": LEAST,
        "multi-1-1": MultiDiagonal(rows=1, cols=1),
        "multi-all-0": MultiDiagonal(rows=None, cols=0),
        "multi-all-1": MultiDiagonal(rows=None, cols=1),
        "diagonal-0": Diagonal(frames=0),
        "diagonal-1": Diagonal(frames=1),
        "window-0-1-1": Diagonal(frames=0, rows=1, cols=1),
        "window-0-1-all": Diagonal(frames=0, rows=1),
        "window-1-1-1": Diagonal(frames=1, rows=1, cols=1),
        "window-1-2-2": Diagonal(frames=1, rows=2, cols=2),
        "first-0": Stripe(columns=((0, plane),), frames=0),
        "cross-0-0-0": Union((Diagonal(frames=0), MultiDiagonal(rows=0, cols=0))),
        "cross-0-1-1": Union((Diagonal(frames=0), MultiDiagonal(rows=1, cols=1))),
    }
    heads = tiling.geometry.heads
    found = {name: (pattern, *(Skip(),) * (heads - 1)) for name, pattern in alone.items()}
    layers = [
        (Skip(), Full(), alone["diagonal-0"], alone["cross-0-0-0"]),
        (Skip(), alone["window-1-1-1"], alone["multi-1-1"], alone["first-0"]),
        (alone["window-0-1-all"], alone["multi-1-1"], alone["window-1-1-1"], alone["multi-all-0"]),
        (alone["multi-1-1"], Union((Diagonal(frames=0), MultiDiagonal(rows=None, cols=0))), alone["first-0"], Full()),
    ]
    for number, layer in enumerate(layers):
        found[f"{MIXED}-{number}"] = tuple(layer[head % len(layer)] for head in range(heads))
    return found


def one_layer(geometry: Geometry, tile: tuple[int, int, int], heads: Heads) -> Plan:
    """A plan of one layer and stage."""
    names = [pattern.kind if isinstance(pattern, (Full, Skip)) else f"p{i}" for i, pattern in enumerate(heads)]
    known: dict[Pattern, str] = {}
    names = [known.setdefault(pattern, name) for pattern, name in zip(heads, names, strict=True)]
    patterns = {name: pattern for pattern, name in known.items() if not isinstance(pattern, (Full, Skip))}
    return Plan("cpu", geometry, tile, patterns, (Stage(1.0, (tuple(names),)),), {"method": "template"})


def session(plan: Plan, threads: int) -> ort.InferenceSession:
    tables = tables_of(plan)
    model = drop_unused(portable.expand_sparse(op_model(tables, 1, plan.geometry.head_dim), tables, 0))
    content, options = ir.to_proto(model).SerializeToString(), cpu_options(threads)
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def medians(calls: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Milliseconds of calls that take turns."""
    return {timing.name: timing.median for timing in time_calls(calls, rounds, 0.0)}


def pass_ms(args: argparse.Namespace, tiling: Tiling) -> dict[str, float]:
    """One pass of one row with LEAST in every head (portable), and dense."""
    plan = template(args.model, tiling.geometry, tiling.tile, LEAST)
    with ExitStack() as stack:
        folder, calls = Path(stack.enter_context(tempfile.TemporaryDirectory())), {}
        for variant in ("portable", "dense"):
            given = {"checkpoint": args.checkpoint, "variant": variant, "batch": 1}
            bundle = export(args.model, plan, folder / variant, **given)
            calls[variant] = step_call(stack.enter_context(OrtRunner(bundle, args.threads)), 0)
        return medians(calls, args.rounds)


def row(case: str, tiling: Tiling, heads: Heads, latency: float) -> dict:
    geometry, work = tiling.geometry, head_work(tiling, [tiling.mask(pattern) for pattern in heads])
    density = float(work.density.mean())
    operations = 4.0 * geometry.heads * geometry.head_dim * geometry.tokens**2 * density
    return {
        "case": case,
        "batch": 1,
        "tokens": geometry.tokens,
        "heads": geometry.heads,
        "head_dim": geometry.head_dim,
        "density": round(density, 6),
        "gathered": round(float(work.gathered.mean()), 4),
        "lists": float(work.lists.mean()),
        "latency_ms": round(latency, 4),
        "tflops": round(operations / latency / 1e9, 4),
    }


def check_mixed(table: dict, tiling: Tiling, found: dict[str, Heads]) -> None:
    """Print predicted and measured time of the mixed layers, fitted without them."""
    rows = table["attention"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "without.json"
        path.write_text(json.dumps({**table, "attention": [r for r in rows if not r["case"].startswith(MIXED)]}))
        cost = cost_model(read_hardware(path), "cpu", tiling.geometry)
    print(f"worst row of the fit: {100 * cost.residual:.1f} %")
    for name in (name for name in found if name.startswith(MIXED)):
        masks = [tiling.mask(pattern) for pattern in found[name]]
        predicted = cost.launch_ms + cost.heads_ms(head_work(tiling, masks)).sum()
        measured = next(r["latency_ms"] for r in rows if r["case"] == name)
        off = 100 * (predicted / measured - 1)
        print(f"{name}: predicted {predicted:.1f} ms, measured {measured:.1f} ms, {off:+.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()

    adapter = registry.adapter(args.model)
    geometry = adapter.geometry(args.checkpoint or adapter.packaged_checkpoint())
    tiling = Tiling(geometry, adapter.default_tile())
    layer = Tiling(replace(geometry, layers=1), tiling.tile)
    found = cases(layer)
    random = np.random.default_rng(0)
    feed = {
        name: random.standard_normal((1, geometry.tokens, geometry.heads, geometry.head_dim), dtype=np.float32)
        for name in "QKV"
    }
    least = {"least": (LEAST,) * geometry.heads}
    calls = {
        name: timed(partial(session(one_layer(layer.geometry, layer.tile, heads), args.threads).run, None, feed))
        for name, heads in (found | least).items()
    }
    latency = medians(calls, args.rounds)
    calls.clear()
    whole = pass_ms(args, tiling)
    rest = whole["portable"] - geometry.layers * latency["least"]
    table = {
        "format": "svdit-hardware",
        "version": 1,
        "gpu": f"{processor()}, {args.threads} threads, ONNX Runtime {ort.__version__}",
        "status": "measured",
        "how": f"scripts/cpu_table.py, portable variant, float32, tile {' x '.join(map(str, tiling.tile))}, "
        f"median of {args.rounds} rounds",
        "attention": [row(name, layer, heads, latency[name]) for name, heads in found.items()],
        "rest": [
            {
                "model": args.model,
                "tokens": geometry.tokens,
                "rest_ms": round(rest, 3),
                "dense_ms": round(whole["dense"], 3),
            }
        ],
    }
    args.output.write_text(json.dumps(table, indent=2) + "\n")
    check_mixed(table, layer, found)


if __name__ == "__main__":
    main()
