#!/usr/bin/env python3
"""Time one self-attention layer on ONNX Runtime's CPU provider: portable sparse forms against dense forms.

    bench_portable.py [--threads 2] [--seconds 20] [--only NAME ...]

Shape: batch 2, 4 heads of 64, grid 16 x 24 x 24 = 9216 tokens. Random normal inputs, seed 0. Every form is called
once to warm up, then again and again for --seconds; the least wall time counts, because another process can only
add to it. Threads spin while they wait (ONNX Runtime's default). Prints a table; `eff` is the speed-up over the
first dense form, times the density: 1.00 means that the saved work is saved time.
"""
from __future__ import annotations

import argparse
import time

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper

from svdit.exporter import portable
from svdit.exporter.graph import drop_unused
from svdit.exporter.op_model import op_model
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, MultiDiagonal, Pattern, Stripe, Tiles
from svdit.plans.schema import template
from svdit.plans.tables import tables_of

BATCH, HEADS, HEAD_DIM, GRID = 2, 4, 64, (16, 24, 24)
GEOMETRY = Geometry(GRID, 0, "none", 1, HEADS, HEAD_DIM)


def random_tiles(num_tiles: int, density: float) -> Pattern:
    """Each query tile keeps its own random key tiles: the worst case, no two lists alike."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(num_tiles):
        kept = np.sort(rng.choice(num_tiles, max(1, round(num_tiles * density)), replace=False))
        rows.append([[int(t), int(t) + 1] for t in kept])
    return Tiles(tuple(tuple(tuple(r) for r in row) for row in rows))


def forms() -> dict[str, tuple]:
    """Name to (model maker, density)."""
    result = {"dense MatMul-Softmax-MatMul": (dense, 1.0), "dense MultiHeadAttention (com.microsoft)": (flash, 1.0),
              "dense Attention (opset 23)": (attention23, 1.0)}
    for tile in ((1, 8, 8), (1, 8, 16)):
        num_tiles = template("t", GEOMETRY, tile).tiling().num_tiles
        patterns = {"diagonal frames=1": Diagonal(frames=1), "diagonal frames=3": Diagonal(frames=3),
                    "multi_diagonal rows=0 cols=1": MultiDiagonal(rows=0, cols=1),
                    "stripe 9 tiles, frames=1": Stripe(columns=((0, 9),), frames=1),
                    "random .25": random_tiles(num_tiles, 0.25), "random .5": random_tiles(num_tiles, 0.5)}
        for name, pattern in patterns.items():
            plan = template("t", GEOMETRY, tile, pattern)
            density = plan.tiling().density(plan.tiling().mask(pattern))
            result[f"{'x'.join(map(str, tile))} {name}"] = (lambda plan=plan: sparse(plan), density)
    return result


def sparse(plan) -> onnx.ModelProto:
    tables = tables_of(plan)
    return ir.to_proto(drop_unused(portable.expand_sparse(op_model(tables, BATCH, HEAD_DIM), tables, 0)))


def dense() -> onnx.ModelProto:
    return sparse(template("t", GEOMETRY, (1, 8, 16)))


def flash() -> onnx.ModelProto:
    tokens = GEOMETRY.tokens
    shapes = [helper.make_tensor(n, TensorProto.INT64, [len(s)], s)
              for n, s in (("three", [BATCH, tokens, HEADS * HEAD_DIM]), ("four", [BATCH, tokens, HEADS, HEAD_DIM]))]
    nodes = [helper.make_node("Reshape", [x, "three"], [f"{x}3"]) for x in "QKV"]
    nodes += [helper.make_node("MultiHeadAttention", ["Q3", "K3", "V3"], ["O3"], domain="com.microsoft",
                               num_heads=HEADS),
              helper.make_node("Reshape", ["O3", "four"], ["O"])]
    return _model(nodes, shapes)


def attention23() -> onnx.ModelProto:
    nodes = [helper.make_node("Transpose", [x], [f"{x}h"], perm=[0, 2, 1, 3]) for x in "QKV"]
    nodes += [helper.make_node("Attention", ["Qh", "Kh", "Vh"], ["Oh"]),
              helper.make_node("Transpose", ["Oh"], ["O"], perm=[0, 2, 1, 3])]
    return _model(nodes, [])


def _model(nodes: list, initializers: list) -> onnx.ModelProto:
    shape = [BATCH, GEOMETRY.tokens, HEADS, HEAD_DIM]
    values = [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape) for x in "QKVO"]
    graph = helper.make_graph(nodes, "layer", values[:3], values[3:], initializers)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def measure(model: onnx.ModelProto, threads: int, seconds: float) -> float:
    """Least wall time of one call in milliseconds."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {x: rng.standard_normal((BATCH, GEOMETRY.tokens, HEADS, HEAD_DIM), dtype=np.float32) for x in "QKV"}
    session.run(None, feeds)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        session.run(None, feeds)
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--only", nargs="*", default=[], help="run forms whose name contains one of these")
    args = parser.parse_args()
    print(f"onnxruntime {ort.__version__}, {args.threads} threads, batch {BATCH}, {HEADS} x {HEAD_DIM}, {GRID}")
    first = None
    for name, (make, density) in forms().items():
        if args.only and not any(part in name for part in args.only):
            continue
        model = make()
        ms = measure(model, args.threads, args.seconds)
        first = ms if first is None else first
        print(f"{name:44s} density {density:.3f} nodes {len(model.graph.node):5d} {ms:8.1f} ms  "
              f"{first / ms:5.2f}x  eff {first / ms * density:.2f}", flush=True)


if __name__ == "__main__":
    main()
