#!/usr/bin/env python3
"""Time one self-attention layer on ONNX Runtime's CPU provider: the custom operator beside the portable graph.

    bench_onnxruntime_op.py [--threads 2] [--calls 6] [--only NAME ...]

Shape and patterns are those of bench_portable.py. The two forms are called in turn, and the least of each counts.
Wall time is what a user waits for; CPU time (all threads) hardly changes when other processes share the machine.
Needs the custom-op library (docs/onnxruntime.md).
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from bench_portable import BATCH, GEOMETRY, HEAD_DIM, HEADS, random_tiles, sparse

from svdit.exporter.op_model import op_model
from svdit.plans.patterns import Diagonal, Full, MultiDiagonal, Stripe
from svdit.plans.schema import template
from svdit.plans.tables import tables_of
from svdit.trt_plugins import onnxruntime_library

FLOPS = 4 * BATCH * HEADS * GEOMETRY.tokens**2 * HEAD_DIM


def session(model: onnx.ModelProto, threads: int, library: str | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if library:
        options.register_custom_ops_library(library)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def seconds(runner: ort.InferenceSession, feed: dict[str, np.ndarray]) -> tuple[float, float]:
    """(wall, CPU) of one call."""
    wanted = {x.name for x in runner.get_inputs()}
    given = {name: value for name, value in feed.items() if name in wanted}
    cpu, wall = time.process_time(), time.perf_counter()
    runner.run(None, given)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=6)
    parser.add_argument("--only", nargs="*", default=[], help="run patterns whose name contains one of these")
    args = parser.parse_args()
    library = onnxruntime_library.find()
    if library is None:
        sys.exit(f"{onnxruntime_library.FILE_NAME}: not found; build it: {onnxruntime_library.BUILD}")
    print(f"onnxruntime {ort.__version__}, {args.threads} threads, batch {BATCH}, {HEADS} x {HEAD_DIM}")
    rng = np.random.default_rng(0)
    shape = (BATCH, GEOMETRY.tokens, HEADS, HEAD_DIM)
    feed = {name: rng.standard_normal(shape, dtype=np.float32) for name in "QKV"}
    feed |= {"stage": np.zeros(1, np.int32), "text_len": np.zeros(BATCH, np.int32)}
    for tile in ((1, 8, 8), (1, 8, 16)):
        num_tiles = template("t", GEOMETRY, tile).tiling().num_tiles
        patterns = {"full": Full(), "diagonal frames=1": Diagonal(frames=1), "diagonal frames=3": Diagonal(frames=3),
                    "multi_diagonal rows=0 cols=1": MultiDiagonal(rows=0, cols=1),
                    "stripe 9 tiles, frames=1": Stripe(columns=((0, 9),), frames=1),
                    "random .25": random_tiles(num_tiles, 0.25)}  # fmt: skip
        for name, pattern in patterns.items():
            label = f"{'x'.join(map(str, tile))} {name}"
            if args.only and not any(part in label for part in args.only):
                continue
            plan = template("t", GEOMETRY, tile, pattern)
            density = plan.tiling().density(plan.tiling().mask(pattern))
            operator = session(ir.to_proto(op_model(tables_of(plan), BATCH, HEAD_DIM)), args.threads, str(library))
            portable = session(sparse(plan), args.threads)
            seconds(operator, feed), seconds(portable, feed)
            pairs = [(seconds(operator, feed), seconds(portable, feed)) for _ in range(args.calls)]
            (op_wall, op_cpu), (wall, cpu) = (tuple(min(p[i][j] for p in pairs) for j in (0, 1)) for i in (0, 1))
            print(f"{label:38s} {density:.3f}  operator {op_wall * 1e3:7.1f} ms wall {op_cpu * 1e3:7.1f} ms CPU  "
                  f"{FLOPS * density / op_cpu / 1e9:5.1f} GFLOP/s a core  portable {wall * 1e3:7.1f} ms "
                  f"wall {cpu * 1e3:7.1f} ms CPU  "
                  f"ratio {wall / op_wall:.2f} wall {cpu / op_cpu:.2f} CPU", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
