#!/usr/bin/env python3
"""Models of published width on ONNX Runtime's CUDA provider, random weights: dense and sparse attention in one engine.

    bench_wide_models.py export FOLDER [--model NAME ...]      # anywhere, with svdit installed; some megabytes
    bench_wide_models.py run FOLDER --library libsvdit_onnxruntime.so --json out.json [--model NAME ...]

`export` makes checkpoints of holes with true headers and plugin bundles of them. The plan has one stage for each
attention that is compared, so that one session, one copy of the weights and one captured CUDA graph run them all:
  dense    all heads full
  mixed    Wan: a quarter of the heads full, the others diagonal (frames=1) and multi-diagonal (rows=cols=1) in turn
  bands    Wan: no head full
  template whole models: the plan of speed_full_size.py
`run` fills the holes with normal numbers scaled to keep activations finite, and times one denoiser call in every
stage: the stages in turn for --rounds rounds, wall time of a call that ends when the GPU has finished, median. Then one
call of each stage under torch's profiler: time of the GPU by kind of kernel, the share of the attention, and what the
dense time less the saved attention would be. Memory is what the whole GPU has in use, looked at every few milliseconds.
Inputs are normal numbers, timestep 500, all text tokens valid.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from svdit.exporter.models import registry
from svdit.plans.bundle import Bundle, read_bundle, weight_file
from svdit.plans.flops import mean_density
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, MultiDiagonal
from svdit.plans.schema import Plan, Stage
from svdit.runtime.cuda import memory_in_use


@dataclasses.dataclass(frozen=True)
class Wide:
    """A model to time: what differs from the published 14B or 5B, and the latent frames, rows and columns."""

    model: str
    changes: dict[str, int]
    latent: tuple[int, int, int]
    batch: int = 1
    stages: tuple[str, ...] = ("dense", "template")
    """The attentions that are compared."""

    def config(self) -> Any:
        return dataclasses.replace(registry.adapter(self.model).published, **self.changes)


SMALL_COG = {"num_layers": 2, "attention_head_dim": 16, "text_embed_dim": 64, "sample_height": 4, "sample_width": 4}
SMALL_HUNYUAN = {
    "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "attention_head_dim": 16,
    "rope_axes_dim": (4, 6, 6), "text_embed_dim": 64, "pooled_projection_dim": 32,
}  # fmt: skip
PARTS = ("dense", "mixed", "bands")
MODELS = {
    "wan-1.3b-480p": Wide(
        "wan2.1", {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}, (21, 60, 104), stages=PARTS
    ),
    "wan-14b-720p-4-layers": Wide("wan2.1", {"num_layers": 4}, (21, 90, 160), stages=PARTS),
    "cogvideox1.5": Wide("cogvideox1.5", {}, (22, 96, 170), batch=2),
    "wan-14b-720p": Wide("wan2.1", {}, (21, 90, 160)),
    "hunyuan": Wide("hunyuan", {}, (33, 90, 160)),
    "small": Wide(
        "wan2.1", {"num_layers": 2, "num_attention_heads": 4, "ffn_dim": 512, "text_dim": 64}, (5, 16, 32), stages=PARTS
    ),
    "small-cogvideox1.5": Wide("cogvideox1.5", SMALL_COG, (66, 4, 4), batch=2),
    "small-hunyuan": Wide("hunyuan", SMALL_HUNYUAN, (91, 4, 4)),
}
"""The small ones are for trying this script."""


def plan_of(wide: Wide) -> Plan:
    """An equal share of the loop in each of the stages."""
    geometry = wide.config().geometry(wide.latent)
    if wide.stages == PARTS:
        return wan_plan(geometry)
    from full_size_models import template_plan

    plan = template_plan(wide.model, geometry)
    dense = Stage(0.5, (("full",) * geometry.heads,) * geometry.layers)
    return dataclasses.replace(plan, stages=(dense, *plan.stages))


def wan_plan(geometry: Geometry) -> Plan:
    """All layers alike."""
    heads = range(geometry.heads)
    rows = (
        ("full",) * geometry.heads,
        tuple("full" if head % 4 == 0 else "dm"[head % 2] for head in heads),
        tuple("dm"[head % 2] for head in heads),
    )
    patterns = {"d": Diagonal(frames=1), "m": MultiDiagonal(rows=1, cols=1)}
    stages = tuple(Stage((i + 1) / len(rows), (row,) * geometry.layers) for i, row in enumerate(rows))
    tile = registry.adapter("wan2.1").default_tile()
    return Plan("wan2.1", geometry, tile, patterns, stages, {"method": "template"})


def export_model(name: str, folder: Path, precision: str) -> None:
    """A checkpoint of holes and the bundle of it."""
    from svdit.exporter.export import export
    from tests.exporter.sparse_files import save_sparse

    wide = MODELS[name]
    config = wide.config()
    checkpoint = save_sparse(folder / name / "checkpoint", config.class_name, dataclasses.asdict(config))
    out, plan = folder / name / "bundle", plan_of(wide)
    bundle = export(wide.model, plan, out, checkpoint=checkpoint, precision=precision, batch=wide.batch)
    for weight in bundle.manifest.weights:
        (bundle.path / weight.file).unlink()


def fill(path: Path, device: str) -> None:
    """Random bfloat16 values for every tensor of a safetensors file whose header is there: matrices keep the size of
    what they multiply, factors of norms are 1, biases 0."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, entry in header.items():
            value = tensor_for(name, entry["shape"], device).view(torch.uint8).cpu().numpy()
            file.seek(8 + length + entry["data_offsets"][0])
            file.write(memoryview(value.reshape(-1)))


def tensor_for(name: str, shape: list[int], device: str) -> torch.Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    scale = 0.1 if "scale_shift_table" in name else 1 / math.sqrt(math.prod(shape[1:]))
    return scale * torch.randn(shape, dtype=torch.bfloat16, device=device)


def filled_bundle(folder: Path, device: str) -> Bundle:
    """The bundle with weights: those of the checkpoint, filled and linked, with their hashes in the manifest."""
    torch.manual_seed(0)
    place = folder / "bundle"
    manifest = json.loads((place / "manifest.json").read_text())
    for weight in manifest["weights"]:
        source, link = folder / "checkpoint" / weight["file"], place / weight["file"]
        fill(source, device)
        if not link.exists():
            os.link(source, link)
    manifest["weights"] = [dataclasses.asdict(weight_file(place, weight["file"])) for weight in manifest["weights"]]
    (place / "manifest.json").write_text(json.dumps(manifest))
    return read_bundle(place)


def feed_of(runner: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    feed = {spec.name: torch.randn(spec.shape, generator=generator) for spec in runner.inputs}
    known = {"timestep": 500.0, "guidance": 6000.0, "encoder_attention_mask": 1}
    for name in feed.keys() & known.keys():
        feed[name].fill_(known[name])
    return {name: tensor.to(runner.tensor_device) for name, tensor in feed.items()}


def measure(runner: Any, bundle: Bundle, stages: Sequence[str], rounds: int) -> dict[str, Any]:
    """Times of all stages of an active runner."""
    feed = feed_of(runner)
    on_gpu = torch.device(runner.tensor_device).type == "cuda"

    def call(stage: int) -> torch.Tensor:
        out = runner.infer_tensors(feed, stage)["noise_pred"]
        if on_gpu:
            torch.cuda.synchronize()
        return out

    for stage in reversed(range(len(stages))):  # the sparsest makes the first call, which runs several times
        if not bool(torch.isfinite(call(stage)).all()):
            raise ValueError(f"stage {stage}: the prediction is not finite")
    times: list[list[float]] = [[] for _ in stages]
    for turn in range(rounds):
        for stage in range(len(stages)) if turn % 2 == 0 else reversed(range(len(stages))):
            begin = time.perf_counter()
            call(stage)
            times[stage].append(1e3 * (time.perf_counter() - begin))
    rows = [
        {
            "attention": name,
            "density": round(density_of(bundle.plan, stage), 4),
            "latency_ms": round(statistics.median(times[stage]), 2),
            "latency_ms_range": [round(f(times[stage]), 2) for f in (min, max)],
            "speedup": round(statistics.median(times[0]) / statistics.median(times[stage]), 4),
        }
        for stage, name in enumerate(stages)
    ]
    if on_gpu:
        add_profiles(rows, lambda stage: runner.infer_tensors(feed, stage))
    return {"rows": rows}


def density_of(plan: Plan, stage: int) -> float:
    return mean_density(dataclasses.replace(plan, stages=(dataclasses.replace(plan.stages[stage], until=1.0),)), 1)


def add_profiles(rows: list[dict[str, Any]], call: Any) -> None:
    """Where the time of one call of each stage goes, and what is left unexplained."""
    from svdit.runtime.gpu_profile import profile_gpu

    seen = [profile_gpu(lambda stage=stage: call(stage)) for stage in range(len(rows))]
    dense = seen[0]
    for row, profile in zip(rows, seen, strict=True):
        saved = dense.of("attention") - profile.of("attention")
        row["profile"] = profile.to_json()
        row["attention_ms"] = round(profile.of("attention") / 1e3, 3)
        row["dense_less_saved_attention_ms"] = round(rows[0]["latency_ms"] - saved / 1e3, 2)


class MemoryWatch:
    """Looks every five milliseconds at how much of the GPU's memory is in use, by anyone; GiB. Without a GPU, zeros."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu, self.peak = on_gpu, 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def used(self) -> float:
        return round(memory_in_use()[0] / 2**30, 1) if self.on_gpu else 0.0

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.peak = max(self.peak, self.used())

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def run_model(name: str, folder: Path, rounds: int, on_cpu: bool) -> dict[str, Any]:
    from svdit.runtime.ort_cuda_runner import OrtCudaRunner

    began = time.perf_counter()
    bundle = filled_bundle(folder / name, "cpu" if on_cpu else "cuda")
    made = time.perf_counter()
    runner = on_the_cpu(bundle) if on_cpu else OrtCudaRunner(bundle)
    with MemoryWatch(not on_cpu) as memory, runner, torch.inference_mode():
        loaded = time.perf_counter()
        weights = memory.used()
        found = measure(runner, bundle, MODELS[name].stages, rounds)
        after = memory.used()
    geometry = bundle.plan.geometry
    return {
        "tokens": geometry.tokens,
        "layers": geometry.layers,
        "heads": geometry.heads,
        "batch": MODELS[name].batch,
        "seconds": {"fill": round(made - began, 1), "load": round(loaded - made, 1)},
        "gib": {"weights": weights, "peak": memory.peak, "at_the_end": after},
        **found,
    }


def on_the_cpu(bundle: Bundle) -> Any:
    """The same runner on the CPU provider."""
    from svdit.runtime.ort_cuda_runner import BoundGraph, OrtCudaRunner, open_session
    from svdit.trt_plugins import onnxruntime_library

    class OnTheCpu(OrtCudaRunner):
        def _activate(self) -> None:
            library = onnxruntime_library.find()
            session = open_session(self.bundle.path / "dit.onnx", library, "CPUExecutionProvider", {})
            self.tensor_device = "cpu"
            self._graph = BoundGraph(session, self.bundle.manifest.inputs, self.outputs, torch.device("cpu"))

    return OnTheCpu(bundle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first, second = commands.add_parser("export"), commands.add_parser("run")
    for command in (first, second):
        command.add_argument("folder", type=Path)
        command.add_argument("--model", nargs="+", default=list(MODELS)[:3], choices=list(MODELS))
    first.add_argument("--precision", default="bf16", choices=["bf16", "fp16"])
    second.add_argument("--library", type=Path, required=True)
    second.add_argument("--json", type=Path, required=True)
    second.add_argument("--rounds", type=int, default=5)
    second.add_argument("--try-cpu", action="store_true", help="an fp16 export on the CPU, to test this script")
    args = parser.parse_args()
    if args.command == "export":
        for name in args.model:
            export_model(name, args.folder, args.precision)
        return
    os.environ["SVDIT_ORT_OPS"] = str(args.library.resolve())
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None, "models": {}}
    failed = 0
    for name in args.model:
        try:
            report["models"][name] = run_model(name, args.folder, args.rounds, args.try_cpu)
        except Exception as error:  # the other model still counts
            traceback.print_exc()
            report["models"][name], failed = {"error": f"{type(error).__name__}: {error}"}, 1
        print(name, json.dumps(report["models"][name], indent=1), flush=True)
        args.json.write_text(json.dumps(report, indent=1))
    sys.exit(failed)


if __name__ == "__main__":
    main()
