#!/usr/bin/env python3
"""ONNX Runtime's CUDA provider with the operator, end to end on one GPU: the shipped tiny model, dense beside sparse.

    check_onnxruntime_cuda.py prepare FOLDER [--reference]       # anywhere; exports with svdit installed
    check_onnxruntime_cuda.py check FOLDER --library build/libsvdit_onnxruntime.so --json out.json    # on the GPU

`prepare` writes four plugin bundles (bf16 and fp16; the plan, and all heads full) and one copy of their weights. With
--reference also the float32 video of the portable bundle, made by ONNX Runtime's CPU provider in a few minutes. FOLDER
can be carried to another machine.

`check` needs onnxruntime-gpu, torch for CUDA, diffusers, onnx-ir and this repository; svdit need not be installed.
A loop is svdit-run's: the checkpoint's scheduler and steps, the plan's first prompt, seed 0. Parts, each whatever
became of the others:
  golden   the operator's golden cases in both types against float64 brute force
  loops    the denoising loop, both types, dense and sparse, with a CUDA graph and without: one loop to warm up, then
           --loops of each in turn; median step and median loop in ms, PSNR of the video against the reference
  profile  one call by ONNX Runtime's own profiler: nodes by operator and provider, copies and casts by name; one loop
           with a CUDA graph by torch's: time of the GPU by kind of kernel, the host's waits; and how far the sparse
           loop is from the dense one less the attention that it saves
  memory   100 loops with a CUDA graph: device memory in use before and after
--try-cpu runs the same code on the CPU provider with the fp16 bundles, to test this script; the times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
GOLDEN_SECONDS = 20


def make_importable() -> None:
    """Let `import svdit` find the repository where svdit is not installed."""
    sys.path.insert(0, str(ROOT))
    try:
        import svdit.runtime  # noqa: F401
    except ImportError:
        folder = Path(tempfile.mkdtemp()) / "svdit"
        folder.mkdir()
        for package in ("plans", "exporter", "runtime", "trt_plugins"):
            (folder / package).symlink_to(ROOT / package)
        sys.path.insert(0, str(folder.parent))


def prepare(folder: Path, reference: bool, checkpoint: Path | None, plan_file: Path) -> None:
    from svdit.exporter.export import export
    from svdit.plans.schema import read_plan, template

    plan = read_plan(plan_file)
    weights = folder / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    for name, which in (("sparse", plan), ("dense", template("tiny", plan.geometry, plan.tile))):
        for precision in PRECISIONS:
            bundle = export("tiny", which, folder / f"{precision}-{name}", checkpoint=checkpoint, precision=precision)
            for weight in bundle.manifest.weights:
                (bundle.path / weight.file).replace(weights / weight.file)
    if reference:
        from svdit.runtime.pipeline import Request, run_bundle
        from svdit.runtime.runner import make_runner

        with tempfile.TemporaryDirectory(dir=folder) as place:
            bundle = export("tiny", plan, Path(place) / "portable", checkpoint=checkpoint, variant="portable")
            with make_runner(bundle, "onnxrt") as runner:
                made = run_bundle(runner, bundle, Request((prompt_of(plan),), 0))
        np.savez_compressed(folder / "reference.npz", video=made.videos[0])


def prompt_of(plan) -> str:
    return (plan.provenance.get("prompts") or ["red circle moving right"])[0]


class Check:
    """What all parts share: the folder, unpacked, and how a session or a runner is made."""

    def __init__(self, folder: Path, work: Path, library: Path, precisions: list[str], on_cpu: bool) -> None:
        self.library, self.on_cpu, self.work = library, on_cpu, work
        self.precisions = ["fp16"] if on_cpu else precisions
        if not on_cpu:
            from svdit.runtime.ort_cuda_runner import require_cuda

            require_cuda()
        for bundle in folder.glob("*-*/manifest.json"):
            target = work / bundle.parent.name
            shutil.copytree(bundle.parent, target)
            for weight in (folder / "weights").iterdir():
                place(weight, target / weight.name)

    def bundle(self, name: str):
        from svdit.plans.bundle import read_bundle

        return read_bundle(self.work / name)

    def runner(self, name: str, graph: bool):
        from svdit.runtime.ort_cuda_runner import BoundGraph, OrtCudaRunner, open_session

        if not self.on_cpu:
            return OrtCudaRunner(self.bundle(name), cuda_graph=graph)

        class OnTheCpu(OrtCudaRunner):
            def _activate(self) -> None:
                session = open_session(self.bundle.path / "dit.onnx", library, "CPUExecutionProvider", {})
                self.tensor_device = "cpu"
                self._graph = BoundGraph(session, self.bundle.manifest.inputs, self.outputs, torch.device("cpu"))

        library = self.library
        return OnTheCpu(self.bundle(name))

    def session(self, source: str | bytes, profile: Path | None = None):
        """A plain session of all nodes on the provider; `profile` is the prefix of the profiler's file."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library(str(self.library))
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        if self.on_cpu:
            return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        return ort.InferenceSession(source, options, providers=["CUDAExecutionProvider"], enable_fallback=0)

    def start(self, runner):
        """A denoising run before its first step."""
        from svdit.runtime.pipeline import Model, Request, prepare, stages_for

        plan = runner.bundle.plan
        return prepare(runner, Model.of(runner.bundle), Request((prompt_of(plan),), 0), stages_for(runner, plan))

    def loop(self, runner) -> list[float]:
        """Seconds of each step of one denoising loop."""
        with torch.inference_mode():
            run = self.start(runner)
            while not run.done:
                run.step()
        return [record.seconds for record in run.records]

    def video(self, runner) -> np.ndarray:
        """uint8 [frames, height, width, 3]"""
        from svdit.runtime.pipeline import Request, run_bundle

        plan = runner.bundle.plan
        return run_bundle(runner, runner.bundle, Request((prompt_of(plan),), 0), show=False).videos[0]


def place(file: Path, target: Path) -> None:
    """A hard link, or a copy on another disk."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copy(file, target)


def golden(check: Check) -> dict:
    """Worst relative L2 error of each type over the cases that fit into the time."""
    from tests.cases import CASES
    from tests.reference import expected_of
    from tests.tolerance import LIMITS, check_attention
    from tests.trt_plugins.test_onnxruntime_op import case_model, feed_of

    began, found = time.perf_counter(), {}
    for dtype in PRECISIONS.values():
        errors = {}
        for case in CASES:
            if time.perf_counter() - began > GOLDEN_SECONDS * (1 + len(found)) / 2:
                break
            session = check.session(case_model(case, dtype).SerializeToString())
            got = session.run(None, feed_of(case, dtype))[0]
            errors[case.name] = check_attention(got, expected_of(case, *case.qkv(dtype)), dtype, case)
        found[dtype] = {"cases": len(errors), "of": len(CASES), "worst": max(errors.values()), "limit": LIMITS[dtype]}
    return found


def loops(check: Check, count: int, reference: np.ndarray | None) -> list[dict]:
    from svdit.runtime.metrics import psnr

    rows = []
    for precision in check.precisions:
        for graph in (True, False):
            both = [check.runner(f"{precision}-{form}", graph) for form in ("dense", "sparse")]
            with both[0], both[1]:
                videos = [check.video(runner) for runner in both]
                times: list[list[list[float]]] = [[], []]
                for turn in range(count):
                    for i in (0, 1) if turn % 2 == 0 else (1, 0):
                        times[i].append(check.loop(both[i]))
            for form, video, runs in zip(("dense", "sparse"), videos, times, strict=True):
                row = {
                    "precision": precision,
                    "attention": form,
                    "cuda_graph": graph,
                    "latency_ms": round(1e3 * statistics.median(s for run in runs for s in run), 4),
                    "total_ms": round(1e3 * statistics.median(sum(run) for run in runs), 3),
                    "total_ms_range": [round(1e3 * f(sum(run) for run in runs), 3) for f in (min, max)],
                    "steps": len(runs[0]),
                }
                if form == "sparse":
                    row["speedup"] = round(rows[-1]["total_ms"] / row["total_ms"], 4)
                    row["psnr"] = None if reference is None else round(psnr(reference, video), 3)
                rows.append(row)
    return rows


def random_feed(bundle) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feed = {
        spec.name: rng.standard_normal(spec.shape, dtype=np.float32)
        for spec in bundle.manifest.inputs
        if spec.name != "stage"
    }
    return {**feed, "timestep": np.full_like(feed["timestep"], 500.0)}


def profile(check: Check) -> dict:
    precision = check.precisions[0]
    found = {form: nodes_of(check, f"{precision}-{form}") for form in ("dense", "sparse")}
    if not check.on_cpu:
        seen = {form: loop_profile(check, f"{precision}-{form}") for form in found}
        for form, times in seen.items():
            found[form]["loop"] = times.to_json()
        dense, sparse = seen["dense"], seen["sparse"]
        saved = dense.of("attention") - sparse.of("attention")
        found["gpu_ms_beyond_dense_less_saved_attention"] = round((sparse.total - (dense.total - saved)) / 1e3, 3)
    return found


def nodes_of(check: Check, name: str) -> dict:
    """What ONNX Runtime ran in one call, by its own profiler."""
    import onnx

    bundle = check.bundle(name)
    feed = {**random_feed(bundle), "stage": np.array([len(bundle.plan.stages) - 1], np.int32)}
    session = check.session(str(bundle.path / "dit.onnx"), check.work / f"profile-{name}")
    session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    by_op = Counter((e["args"]["op_name"], e["args"]["provider"]) for e in nodes)
    casts = [e["name"].removesuffix("_kernel_time") for e in nodes if e["args"]["op_name"] == "Cast"]
    exported = {node.name for node in onnx.load(bundle.path / "dit.onnx", load_external_data=False).graph.node}
    found = {
        "layers": bundle.plan.geometry.layers,
        "sparse_attention_nodes": sum(n for (op, _), n in by_op.items() if op.endswith("SparseAttention")),
        "nodes": {f"{op} on {provider}": n for (op, provider), n in sorted(by_op.items())},
        "copies": [e["name"] for e in nodes if e["args"]["op_name"].startswith("Memcpy")],
        "casts": len(casts),
        "casts_that_the_export_has_not": [name for name in casts if name not in exported],
    }
    assert found["sparse_attention_nodes"] == found["layers"], found
    return found


def loop_profile(check: Check, name: str):
    """The GPU's time in one loop with a CUDA graph."""
    from svdit.runtime.gpu_profile import profile_gpu

    with check.runner(name, True) as runner, torch.inference_mode():
        check.loop(runner)
        run = check.start(runner)

        def steps() -> None:
            while not run.done:
                run.step()

        return profile_gpu(steps)


def memory(check: Check, count: int = 100) -> dict:
    """MiB of device memory in use, by the driver, after 2 loops, every tenth, and at the end."""
    from svdit.runtime.cuda import memory_in_use

    def used() -> float:
        return 0.0 if check.on_cpu else memory_in_use()[0] / 2**20

    with check.runner(f"{check.precisions[0]}-sparse", True) as runner:
        for _ in range(2):
            check.loop(runner)
        seen = [used()]
        for number in range(1, (3 if check.on_cpu else count) + 1):
            check.loop(runner)
            if number % 10 == 0:
                seen.append(used())
    growth = seen[-1] - seen[0]
    assert growth <= 1, seen
    return {"loops": count, "growth_mib": round(growth, 2), "used_mib": [round(x, 1) for x in seen]}


def versions() -> dict:
    import onnxruntime as ort

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"gpu": gpu, "onnxruntime": ort.__version__, "torch": torch.__version__, "cuda": torch.version.cuda}


def run_check(args: argparse.Namespace) -> int:
    os.environ["SVDIT_ORT_OPS"] = str(args.library.resolve())
    file = args.reference or args.folder / "reference.npz"
    reference = np.load(file)["video"] if file.is_file() else None
    report, failed = versions(), 0
    print(json.dumps(report), flush=True)
    with tempfile.TemporaryDirectory() as work:
        check = Check(args.folder, Path(work), args.library.resolve(), args.precision, args.try_cpu)
        parts: dict[str, Callable[[], object]] = {
            "golden": lambda: golden(check),
            "loops": lambda: loops(check, args.loops, reference),
            "profile": lambda: profile(check),
            "memory": lambda: memory(check),
        }
        for name in args.only or parts:
            began = time.perf_counter()
            try:
                report[name] = parts[name]()
            except Exception as error:  # the other parts still count
                traceback.print_exc()
                report[name], failed = {"error": f"{type(error).__name__}: {error}"}, 1
            print(f"== {name}, {time.perf_counter() - began:.1f} s", json.dumps(report[name], indent=1), flush=True)
            args.json.write_text(json.dumps(report, indent=1))
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare")
    first.add_argument("folder", type=Path)
    first.add_argument("--reference", action="store_true")
    first.add_argument("--checkpoint", type=Path, help="folder of another tiny checkpoint, with --plan")
    first.add_argument("--plan", type=Path, default=ROOT / "plans" / "library" / "tiny.plan.json")
    second = commands.add_parser("check")
    second.add_argument("folder", type=Path)
    second.add_argument("--library", type=Path, required=True)
    second.add_argument("--reference", type=Path, help="npz with `video` (default: FOLDER/reference.npz)")
    second.add_argument("--json", type=Path, required=True)
    second.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    second.add_argument("--loops", type=int, default=3)
    second.add_argument("--only", nargs="*", help="golden, loops, profile, memory")
    second.add_argument("--try-cpu", action="store_true")
    args = parser.parse_args()
    make_importable()
    if args.command == "prepare":
        prepare(args.folder, args.reference, args.checkpoint, args.plan)
    else:
        sys.exit(run_check(args))


if __name__ == "__main__":
    main()
