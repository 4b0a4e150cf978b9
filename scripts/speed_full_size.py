#!/usr/bin/env python3
"""Time of one denoising step of a published transformer at full size on one GPU, by a plan and dense.

    speed_full_size.py --model hunyuan --json out.json
    speed_full_size.py --model wan2.1 --plan mine.plan.json --dense fa4 --dense cudnn --json out.json

Random bfloat16 weights and inputs, no download; the reference video (docs/models.md). Without --plan a template of
the mean density that the paper's FLOP figure implies, through `sparsify`. One forward of the transformer is timed with
CUDA events, after a warm-up of a few layers.

Both sides are the same code but for the attention function: the processors of svdit.runtime.processors with tensors
[B, N, H, D], no mask (all text tokens are valid), every block compiled by torch.compile without graph breaks. So the
dense side has no mask, no transposed copies and no slower norm or RoPE to carry. The dense kernels are
FlashAttention-4 (fa4), cuDNN (cudnn) and FlashAttention-2 (flash, torch's own). Those given with --short are timed on
one and on three units of layers and continued in a straight line to all layers; the figures say so.

Before timing, an all-full plan through `sparsify` is compared with diffusers' own attention on a small grid.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import diffusers
import torch
from full_size_models import MODELS, Depth, build, inputs, published_config, reference_latent, template_plan
from torch import Tensor, nn

from svdit.plans.command import json_option, reports_mistakes, write_json
from svdit.plans.errors import complain
from svdit.plans.flops import flops_of, mean_density
from svdit.plans.schema import Plan, read_plan, template
from svdit.runtime.bench_attention import Board, gpu_description
from svdit.runtime.families import family_of
from svdit.runtime.sparsify import sparsify
from svdit.trt_plugins import cuda_library

WARM_UNITS, SHORT_UNITS = 2, (1, 3)
"""Units of layers: of a warm-up, after which every variant of a block is compiled; of a short timing."""
SHORT_SECONDS = 1.5
"""Each depth of a short timing runs at least so long; the later half of the calls counts."""
SMALL_GRID = (3, 10, 12)
"""Tokens of the comparison with diffusers: no tile divides it."""
SAME = 0.02
"""Relative L2 distance of two bfloat16 outputs that differ in rounding alone."""
KINDS = {
    "attention": r"^(?!triton).*(flash|fmha|sparse_attention|sdpa)",
    "linear": r"^(?!triton).*(gemm|nvjet|cutlass|cublas|splitk|gemv|xmma)",
    "norms": r"norm|rsqrt|var_mean|reduce|_mean",
}
"""Kernel names of each part of a step, first match; what matches none is RoPE, activations, residuals and the rest.
torch.compile names its kernels (triton_...) after all that they are fused from, and after what reads their output."""
REST = "RoPE and rest"


# Dense attention behind one operator, so that one compiled block serves every kernel.


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute.interface import _flash_attn_fwd

    return _flash_attn_fwd(q, k, v)[0]


def fused(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch's scaled_dot_product_attention on one backend, by its name in SDPBackend."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2)

    return attend


DENSE = {"fa4": flash_attention_4, "cudnn": fused("CUDNN_ATTENTION"), "flash": fused("FLASH_ATTENTION")}
selected = ["flash"]


@torch.library.custom_op(
    "svdit_speed::dense_attention", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> Tensor"
)
def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, N, H, D] by the selected kernel."""
    return DENSE[selected[0]](q, k, v).contiguous()


@dense_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


class Dense:
    """A transformer with our processors and dense attention, as a context manager."""

    def __init__(self, transformer: nn.Module) -> None:
        self.family = family_of(transformer)
        self.modules = self.family.attentions(transformer)

    def __enter__(self) -> None:
        self.originals = [module.processor for module in self.modules]
        for module in self.modules:
            module.set_processor(self.family.processor(dense_attention))

    def __exit__(self, *_: object) -> None:
        for module, processor in zip(self.modules, self.originals, strict=True):
            module.set_processor(processor)


class Bench:
    """One transformer, the arguments of a call, and how often a timing calls it."""

    def __init__(self, transformer: nn.Module, given: dict[str, Any], depth: Depth, repeats: int) -> None:
        self.transformer, self.given, self.depth, self.repeats = transformer, given, depth, repeats
        self.board = Board()
        self.on_gpu = given["hidden_states"].is_cuda

    @torch.no_grad()
    def call(self) -> Tensor:
        return self.transformer(**self.given, return_dict=False)[0]

    def once(self) -> tuple[float, list[int]]:
        """Milliseconds of one call, and SM clocks read meanwhile."""
        if not self.on_gpu:
            begin = time.perf_counter()
            self.call()
            return 1000 * (time.perf_counter() - begin), []
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.call()
        stop.record()
        clocks = []
        while not stop.query():
            clocks += self.board.megahertz()
            time.sleep(0.02)
        return start.elapsed_time(stop), clocks

    def few(self) -> Tensor:
        """The output with a few layers, enough that every variant of a block is among them."""
        with self.depth.first(WARM_UNITS):
            return self.call().float()

    def warm(self, outputs: dict[str, Tensor], name: str, like: str | None) -> dict[str, object]:
        """A first call with a few layers, kept in `outputs`: seconds with compilation, and distance from `like`."""
        begin = time.perf_counter()
        outputs[name] = got = self.few()
        if not got.isfinite().all():
            raise complain("output", "infinite or undefined numbers", "finite ones")
        figures: dict[str, object] = {"seconds": round(time.perf_counter() - begin, 1)}
        if like is not None:
            figures["rel_l2_error"] = round(distance(got, outputs[like]), 5)
            figures["against"] = like
        return figures

    def full(self) -> dict[str, Any]:
        """All layers."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        energy, begin = self.board.joules(), time.perf_counter()
        times, clocks = zip(*(self.once() for _ in range(self.repeats)), strict=True)
        seconds = time.perf_counter() - begin
        read = [mhz for of_call in clocks for mhz in of_call]
        return {
            "latency_ms": round(median(times), 2),
            "latency_ms_all": [round(t, 2) for t in times],
            "timed_layers": len(self.depth.blocks),
            "sm_mhz": round(mean(read)) if read else None,
            "watts": round((self.board.joules() - energy) / seconds),
            "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if self.on_gpu else None,
        }

    def short(self) -> dict[str, Any]:
        """A straight line through two depths, continued to all layers."""
        units = [min(u, self.depth.units) for u in SHORT_UNITS]
        points = [self._sustained(u) for u in units]
        slope = (points[1] - points[0]) / (units[1] - units[0])
        return {
            "latency_ms": round(points[0] + slope * (self.depth.units - units[0]), 2),
            "timed_layers": [u * self.depth.unit_layers for u in units],
            "timed_ms": [round(p, 2) for p in points],
            "how": f"straight line through the timed depths, continued to {len(self.depth.blocks)} layers",
        }

    def _sustained(self, units: int) -> float:
        """Median milliseconds of a call with so many units, back to back until the clock has settled."""
        begin, times = time.perf_counter(), []
        with self.depth.first(units):
            while not times or time.perf_counter() - begin < SHORT_SECONDS:
                times.append(self.once()[0])
        return median(times[len(times) // 2 :])

    def breakdown(self) -> dict[str, Any]:
        """GPU time by kind of kernel, from profiles of one and of two units of layers."""
        return by_kind(self._trace(1), self._trace(2), self.depth.units)

    def _trace(self, units: int) -> list[dict[str, Any]]:
        """Events of a Chrome trace of one call with so many units."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with self.depth.first(units), torch.profiler.profile(activities=activities) as profile:
            self.once()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            return json.loads(path.read_text())["traceEvents"]


def kind_of(kernel: str) -> str:
    """The part of a step that a kernel belongs to."""
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel.lower())), REST)


def by_kind(one: Sequence[dict[str, Any]], two: Sequence[dict[str, Any]], units: int) -> dict[str, Any]:
    """Milliseconds by kind in all units, what is outside of them, and the largest kernels of one unit.

    one, two: traces of calls with one and with two units. A unit is their difference; what one call has beyond a unit
    is done once: patch embedding, reordering, output.
    """
    first, second = kernels_of(one), kernels_of(two)
    unit = {name: sum(second[name]) - sum(first.get(name, [])) for name in second}
    totals = dict.fromkeys((*KINDS, REST), 0.0)
    for name, ms in unit.items():
        totals[kind_of(name)] += ms * units
    once = sum(map(sum, first.values())) - sum(unit.values())
    return {
        "ms": {**{kind: round(total, 1) for kind, total in totals.items()}, "once": round(once, 1)},
        "kernels_of_one_unit": [
            {"name": name[:160], "kind": kind_of(name), "ms": round(ms, 3)}
            for name, ms in sorted(unit.items(), key=lambda item: -item[1])[:40]
        ],
    }


def kernels_of(events: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Milliseconds of every launch on the GPU by name."""
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels[event["name"]].append(event["dur"] / 1000)
    return kernels


def small_difference(model: str, transformer: nn.Module, config: Any, depth: Depth, device: str, dtype: Any) -> float:
    """Relative L2 distance between diffusers' own attention and an all-full plan, one unit of layers, a small grid."""
    latent = tuple(n * p for n, p in zip(SMALL_GRID, config.patch, strict=True))
    given = inputs(model, config, latent, device, dtype)
    with depth.first(1), torch.no_grad():
        expected = transformer(**given, return_dict=False)[0].float()
        layers = len(family_of(transformer).attentions(transformer))
        geometry = type(config).geometry(config, latent)
        plan = template("any", type(geometry)(**{**geometry.to_json(), "layers": layers}), (1, 4, 8))
        with sparsify(transformer, plan):
            got = transformer(**given, return_dict=False)[0].float()
    return distance(got, expected)


def distance(got: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    return float((got - expected).norm() / expected.norm())


def environment() -> dict[str, str]:
    """The GPU and what runs on it."""
    from importlib.metadata import PackageNotFoundError, version

    found = {**gpu_description(), "diffusers": diffusers.__version__, "cudnn": str(torch.backends.cudnn.version())}
    for package in ("flash-attn-4", "triton", "nvidia-cutlass-dsl"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return {**found, "date": date.today().isoformat(), "dtype": "bfloat16"}


def ratios(figures: dict[str, Any]) -> None:
    """Speed-ups against every dense kernel that ran, and against the fastest."""
    timed = {name: row["latency_ms"] for name, row in figures.get("dense", {}).items() if "latency_ms" in row}
    if timed and "latency_ms" in figures.get("sparse", {}):
        own = figures["sparse"]["latency_ms"]
        figures["speedup"] = {name: round(t / own, 3) for name, t in timed.items()}
        figures["fastest_dense"] = min(timed, key=timed.get)
        figures["speedup_over_fastest"] = figures["speedup"][figures["fastest_dense"]]


def one_stage(plan: Plan) -> Plan:
    """The stage in force in the middle of a denoising loop, for all of it."""
    middle = next(stage for stage in plan.stages if stage.until > 0.5)
    return replace(plan, stages=(replace(middle, until=1.0),))


class Report:
    """Figures as they come, on the terminal and in a file that is complete after every one of them."""

    def __init__(self, figures: dict[str, Any], path: Path | None) -> None:
        self.figures, self.path = figures, path

    def add(self, what: str, make: Callable[[], Any], *keys: str) -> bool:
        """Put what `make` returns at `keys`; a failure is noted there too, and the others still count."""
        begin = time.perf_counter()
        place = self.figures
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        try:
            place[keys[-1]] = make()
            failed = False
        except Exception as error:  # a peer or a profiler may fail in any way
            place[keys[-1]] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
            failed = True
        ratios(self.figures)
        write_json(self.path, self.figures)
        shown = place[keys[-1]]
        if isinstance(shown, dict):
            shown = {name: x for name, x in shown.items() if name != "kernels_of_one_unit"}
        click.echo(f"[{time.perf_counter() - begin:6.1f} s] {what}: {shown}")
        return not failed


def measure(bench: Bench, plan: Plan, dense: Sequence[str], short: Sequence[str], report: Report) -> None:
    """Sparse as diffusers runs without torch.compile, then sparse and dense compiled; these are timed."""
    outputs: dict[str, Tensor] = {}
    uncompiled = "sparse, not compiled"
    with sparsify(bench.transformer, plan):
        report.add(f"{uncompiled}: first call", lambda: bench.warm(outputs, uncompiled, None), "first_call", uncompiled)
        report.add(f"{uncompiled}, by kind", bench.breakdown, "breakdown", uncompiled)
    for block in bench.depth.blocks:
        block.compile(fullgraph=True, dynamic=False)
    with sparsify(bench.transformer, plan):
        report.add("sparse: first call", lambda: bench.warm(outputs, "sparse", uncompiled), "first_call", "sparse")
        report.add("sparse", bench.full, "sparse")
        report.add("sparse, by kind", bench.breakdown, "breakdown", "sparse")
    with Dense(bench.transformer):
        for name in dense:
            selected[0] = name
            like = next((other for other in dense if other in outputs), None)
            first = partial(bench.warm, outputs, name, like)
            if report.add(f"{name}: first call", first, "first_call", name):
                report.add(name, bench.short if name in short else bench.full, "dense", name)
                report.add(f"{name}, by kind", bench.breakdown, "breakdown", name)


def run(
    model: str,
    config: Any,
    latent: tuple[int, int, int],
    plan: Plan,
    dense: Sequence[str],
    short: Sequence[str],
    repeats: int,
    report: Report,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Build, compare on a small grid, measure."""
    operations = flops_of(plan)
    spec = MODELS[model]
    report.figures |= {
        "tokens": plan.geometry.tokens,
        "layers": plan.geometry.layers,
        "batch": spec.batch,
        "density": round(mean_density(plan), 4),
        "tile": list(plan.tile),
        "heads_by_pattern": dict(Counter(plan.stages[0].layers[0])),
        "plan": dict(plan.provenance),
        "published_plan": f"mean density {spec.density} over a run with {spec.published}",
        "pflop_dense": round(spec.batch * operations.dense / 1e15, 3),
        "pflop_sparse": round(spec.batch * operations.plan / 1e15, 3),
    }
    begin = time.perf_counter()
    transformer = build(config, device, dtype)
    click.echo(f"[{time.perf_counter() - begin:6.1f} s] {model} with random weights")
    depth = Depth(transformer, spec.blocks)
    report.add(
        "all-full plan against diffusers' own attention, small grid, relative L2",
        lambda: small_difference(model, transformer, config, depth, device, dtype),
        "rel_l2_error_all_full",
    )
    bench = Bench(transformer, inputs(model, config, latent, device, dtype), depth, repeats)
    measure(bench, plan, dense, short, report)


@click.command(help=__doc__.split("\n", maxsplit=1)[0])
@click.option("--model", type=click.Choice(sorted(MODELS)), required=True)
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    help="A plan for the reference video; of several stages the one in the middle of the loop is timed.",
)
@click.option("--dense", "dense", type=click.Choice(sorted(DENSE)), multiple=True, default=("fa4", "flash"))
@click.option("--short", type=click.Choice(sorted(DENSE)), multiple=True, help="Time these on a few layers only.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, help="Calls of a timing; the median counts.")
@json_option
@reports_mistakes
def main(
    model: str,
    plan_file: Path | None,
    dense: tuple[str, ...],
    short: tuple[str, ...],
    repeats: int,
    json_file: Path | None,
) -> None:
    report = Report({"model": model, "environment": environment()}, json_file)
    if cuda_library.find() is None:
        raise complain("kernel library", "none", "the built one", "run scripts/build_kernels.sh")
    config, latent = published_config(model), reference_latent(model)
    plan = template_plan(model, config.geometry(latent)) if plan_file is None else one_stage(read_plan(plan_file))
    run(model, config, latent, plan, dense, short, repeats, report)
    difference = report.figures["rel_l2_error_all_full"]
    if not isinstance(difference, float) or difference > SAME:
        raise complain("all-full plan against diffusers", difference, f"a relative L2 distance of at most {SAME}")


if __name__ == "__main__":
    sys.exit(main())
