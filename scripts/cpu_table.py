"""Measure the latency table of a CPU: ONNX Runtime's time for one portable attention layer, by size and density.

Every case is a graph with one attention layer of the portable variant (docs/export.md), run on the CPU provider with
random inputs; cases take turns, `--rounds` of them after one to warm up, and the median counts. `--rest MODEL MS`
writes down the time of a denoiser pass outside attention, which you measured: a step of a bundle less its attention
layers.

Usage: python scripts/cpu_table.py -o cpu.json [--tokens-grid 16 24 24] [--tile 4 4 4] [--heads 4] [--head-dim 64]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from svdit.exporter import portable
from svdit.exporter.graph import drop_unused
from svdit.exporter.op_model import op_model
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, Full, MultiDiagonal, Pattern, Stripe, Union
from svdit.plans.schema import template
from svdit.plans.tables import tables_of


def patterns(tile_grid: tuple[int, int, int]) -> dict[str, Pattern]:
    """Kinds and sizes whose densities spread from a few per cent to all."""
    plane = tile_grid[1] * tile_grid[2]
    return {
        "full": Full(),
        "multi-0-0": MultiDiagonal(rows=0, cols=0),
        "multi-1-1": MultiDiagonal(rows=1, cols=1),
        "multi-2-2": MultiDiagonal(rows=2, cols=2),
        "diagonal-0": Diagonal(frames=0),
        "diagonal-1": Diagonal(frames=1),
        "window-1-1-1": Diagonal(frames=1, rows=1, cols=1),
        "first-0": Stripe(columns=((0, plane),), frames=0),
        "cross-0-1-1": Union((Diagonal(frames=0), MultiDiagonal(rows=1, cols=1))),
    }


def session(geometry: Geometry, tile: tuple[int, int, int], pattern: Pattern, threads: int) -> ort.InferenceSession:
    tables = tables_of(template("cpu", geometry, tile, pattern))
    model = drop_unused(portable.expand_sparse(op_model(tables, 1, geometry.head_dim), tables, 0))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens-grid", type=int, nargs=3, default=(16, 24, 24), metavar=("T", "H", "W"))
    parser.add_argument("--tile", type=int, nargs=3, default=(4, 4, 4), metavar=("T", "H", "W"))
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rest", nargs=2, metavar=("MODEL", "MS"), help="Measured ms of a pass outside attention.")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()

    geometry = Geometry(tuple(args.tokens_grid), 0, "none", 1, args.heads, args.head_dim)
    tiling = template("cpu", geometry, tuple(args.tile)).tiling()
    cases = patterns(tiling.tile_grid)
    random = np.random.default_rng(0)
    shape = (1, geometry.tokens, args.heads, args.head_dim)
    feed = {name: random.standard_normal(shape, dtype=np.float32) for name in "QKV"}
    sessions = {name: session(geometry, tiling.tile, pattern, args.threads) for name, pattern in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(args.rounds + 1):
        for name, run in sessions.items():
            began = time.perf_counter()
            run.run(None, feed)
            if number:
                times[name].append(1000 * (time.perf_counter() - began))
    rows = []
    for name, pattern in cases.items():
        density, latency = tiling.density(tiling.mask(pattern)), statistics.median(times[name])
        operations = 4.0 * args.heads * args.head_dim * geometry.tokens**2 * density
        rows.append(
            {
                "case": name,
                "batch": 1,
                "tokens": geometry.tokens,
                "heads": args.heads,
                "head_dim": args.head_dim,
                "density": round(density, 6),
                "latency_ms": round(latency, 4),
                "tflops": round(operations / latency / 1e9, 4),
            }
        )
    table = {
        "format": "svdit-hardware",
        "version": 1,
        "gpu": f"{platform.processor() or platform.machine()}, {args.threads} threads, ONNX Runtime {ort.__version__}",
        "status": "measured",
        "how": f"scripts/cpu_table.py, portable variant, float32, tile {' x '.join(map(str, args.tile))}, "
        f"median of {args.rounds} rounds",
        "attention": rows,
    }
    if args.rest:
        table["rest"] = [{"model": args.rest[0], "tokens": geometry.tokens, "rest_ms": float(args.rest[1])}]
    args.output.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
