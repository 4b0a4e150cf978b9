#!/usr/bin/env python3
"""Time svdit-export of a published model at its full size, without its weights.

    export_full_size.py [--model hunyuan ...] [--precision bf16] [--batch 1] [--folder DIR]

Makes a checkpoint folder of sparse files: true safetensors headers with the keys and shapes of diffusers' class at
the published sizes, bf16, shards of at most 5 GB, and holes for the weights, so that it takes next to no disk. Then
runs `svdit-export --variant plugin` on it as a process of its own, at the reference resolution, with a plan of two
stages (all full; then every second head diagonal, the others multi-diagonal), and prints wall and CPU seconds, peak
resident memory of that process, and the sizes of graph and weights. Run it from the repository.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path

import onnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from svdit.exporter.models import registry
from svdit.plans.bundle import read_bundle
from svdit.plans.patterns import Diagonal, MultiDiagonal
from svdit.plans.schema import Plan, Stage, write_plan
from tests.exporter.sparse_files import save_sparse

CLASSES = {
    "cogvideox1.5": "CogVideoXTransformer3DModel",
    "hunyuan": "HunyuanVideoTransformer3DModel",
    "wan2.1": "WanTransformer3DModel",
}


def two_stages(name: str, checkpoint: Path) -> Plan:
    """Dense first, then a mix of two patterns in every layer."""
    adapter = registry.adapter(name)
    geometry = adapter.geometry(checkpoint)
    patterns = {"d": Diagonal(frames=2), "m": MultiDiagonal(rows=1, cols=1)}
    full = (("full",) * geometry.heads,) * geometry.layers
    mixed = (tuple("dm"[head % 2] for head in range(geometry.heads)),) * geometry.layers
    stages = (Stage(0.2, full), Stage(1.0, mixed))
    return Plan(name, geometry, adapter.default_tile(), patterns, stages, {"method": "template"})


def measure(name: str, precision: str, batch: str, folder: Path) -> str:
    """One row of the table."""
    config = dataclasses.asdict(registry.adapter(name).published)
    checkpoint = save_sparse(folder / name / "transformer", CLASSES[name], config)
    plan = folder / name / "full.plan.json"
    write_plan(plan, two_stages(name, checkpoint))
    bundle = folder / name / "bundle"
    command = [sys.executable, "-c", "from svdit.exporter.cli import main; main()"]
    command += ["--model", name, "--plan", str(plan), "--checkpoint", str(checkpoint)]
    command += ["--precision", precision, "--batch", batch, "-o", str(bundle)]
    start = time.perf_counter()
    child = os.posix_spawn(sys.executable, command, os.environ)
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"export_full_size: svdit-export of {name} failed")
    manifest = read_bundle(bundle).manifest
    operators = [node.op_type for node in onnx.load(bundle / "dit.onnx", load_external_data=False).graph.node]
    if operators.count("SparseAttention") != manifest.geometry.layers:
        sys.exit(f"export_full_size: {name}: {operators.count('SparseAttention')} SparseAttention nodes")
    graph = sum((bundle / g.file).stat().st_size for g in manifest.graphs)
    weights = sum(w.size for w in manifest.weights)
    return (
        f"| {name} | {manifest.geometry.tokens} | {manifest.geometry.layers} | {weights / 1e9:.1f} GB in "
        f"{len(manifest.weights)} | {len(operators)} nodes, {graph / 1e6:.1f} MB | {seconds:.0f} | "
        f"{usage.ru_utime + usage.ru_stime:.0f} | {usage.ru_maxrss / 1e6:.2f} GB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["hunyuan"], choices=sorted(CLASSES))
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder, removed at the end")
    options = parser.parse_args()
    print("| model | tokens | layers | weights | graph | wall s | CPU s | peak memory |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name in options.model:
            print(measure(name, options.precision, options.batch, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
