"""Times of single denoiser calls and of whole loops: bundles and backends side by side.

Method: every candidate is active from the start and warmed up once; then rounds follow in which each candidate runs
back to back for a given time, at least once, in an order that rotates from round to round. The median over all calls
counts. Latents, text and timestep of a call are normal numbers of seed 0; a loop starts from the noise of seed 0. A
call ends when its result is there: for a backend with tensors on a GPU, when the GPU has finished.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from svdit.plans.bundle import Bundle, read_bundle
from svdit.plans.errors import complain
from svdit.plans.flops import mean_density
from svdit.runtime.bench_attention import Timing, turns
from svdit.runtime.runner import Runner, make_runner, resolve_backend


@dataclass(frozen=True)
class Candidate:
    """A bundle on a backend, by the name it has in the table."""

    name: str
    bundle: Bundle
    runner: Runner

    def stage_of(self, step: int, steps: int) -> int:
        """The runner's stage at a step; dense attention has one."""
        return self.bundle.plan.stage_of(step, steps) if self.runner.num_stages > 1 else 0

    def stage_at(self, position: float) -> int:
        """The runner's stage at a place in the loop, 0 <= position < 1."""
        if self.runner.num_stages == 1:
            return 0
        return next(i for i, stage in enumerate(self.bundle.plan.stages) if stage.until > position)

    def density(self, steps: int) -> float:
        """Mean share of kept query-key pairs over a loop."""
        return 1.0 if self.bundle.manifest.variant == "dense" else mean_density(self.bundle.plan, steps)


def candidates(
    folders: Sequence[Path], backends: Sequence[str], *, device: str = "cpu", threads: int | None = None
) -> list[Candidate]:
    """Every folder on every backend, not yet active. Raises SvditError for a pair that cannot run."""
    found = []
    for folder in folders:
        bundle = read_bundle(folder)
        for backend in backends or ("auto",):
            resolved = resolve_backend(bundle, backend)
            on = "cpu" if resolved == "onnxrt" else device
            runner = make_runner(bundle, resolved, device=on, threads=threads)
            found.append(Candidate(f"{folder.name}:{resolved}", bundle, runner))
    names = [c.name for c in found]
    if len(set(names)) < len(names):
        raise complain("bundles and backends", ", ".join(names), "names that differ", "rename a folder")
    return found


def stage_beginnings(found: Sequence[Candidate]) -> list[float]:
    """Where in the loop a stage of any plan begins: 0 first."""
    return sorted({0.0, *(stage.until for c in found for stage in c.bundle.plan.stages[:-1])})


def time_steps(found: Sequence[Candidate], position: float, rounds: int, seconds: float) -> list[dict[str, object]]:
    """Rows of one denoiser call each, in the stage in force at `position` of the loop, 0 <= position < 1."""
    calls = {c.name: step_call(c.runner, c.stage_at(position)) for c in found}
    return _rows(found, time_calls(calls, rounds, seconds))


def time_loops(found: Sequence[Candidate], steps: int | None, rounds: int, seconds: float) -> list[dict[str, object]]:
    """Rows of one whole denoising loop of one prompt each, with the density that it had."""
    calls = {c.name: _loop_call(c, steps) for c in found}
    return _rows(found, time_calls(calls, rounds, seconds))


def time_calls(calls: Mapping[str, Callable[[], float]], rounds: int, seconds: float) -> list[Timing]:
    """Interleaved timings of calls that return the seconds they took."""
    timings = {name: Timing(name) for name in calls}
    for call in calls.values():
        call()
    for name in turns(list(calls), rounds):
        begin = time.perf_counter()
        timings[name].milliseconds.append(1e3 * calls[name]())
        while time.perf_counter() - begin < seconds:
            timings[name].milliseconds.append(1e3 * calls[name]())
    return list(timings.values())


def _rows(found: Sequence[Candidate], timings: Sequence[Timing]) -> list[dict[str, object]]:
    return [
        {**timing.summary(), "backend": c.runner.backend, "variant": c.bundle.manifest.variant}
        for c, timing in zip(found, timings, strict=True)
    ]


def step_call(runner: Runner, stage: int) -> Callable[[], float]:
    """A denoiser call of as many rows as fit, on normal numbers of seed 0. It returns the seconds that it took."""
    rng = np.random.default_rng(0)
    rows = 1 if runner.batch is None else runner.batch.most
    feed = {
        spec.name: rng.standard_normal(spec.sizes(rows), dtype=np.float32).astype(spec.dtype)
        for spec in runner.inputs
    }
    if runner.tensor_device is None:
        return timed(lambda: runner.infer(feed, stage))
    import torch

    tensors = {name: torch.from_numpy(array).to(runner.tensor_device) for name, array in feed.items()}

    def call() -> None:
        runner.infer_tensors(tensors, stage)
        if torch.device(runner.tensor_device).type == "cuda":
            torch.cuda.synchronize(runner.tensor_device)

    return timed(call)


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """The same call, which returns the seconds that it took: for `time_calls`."""

    def measured() -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return measured


def _loop_call(candidate: Candidate, steps: int | None) -> Callable[[], float]:
    import torch

    from svdit.runtime.pipeline import Model, Request, prepare

    model = Model.of(candidate.bundle)
    prompts = candidate.bundle.plan.provenance.get("prompts") or ["red circle moving right"]
    request = Request(tuple(prompts[:1]), 0, steps)

    def loop() -> float:
        with torch.inference_mode():
            run = prepare(candidate.runner, model, request, candidate.stage_of)
            begin = time.perf_counter()
            while not run.done:
                run.step()
            return time.perf_counter() - begin

    return loop


def processor() -> str:
    """The CPU's name and its widest vectors, where Linux says them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = said.get("model name") or platform.processor() or platform.machine()
    wide = next((f for f in ("avx512f", "avx2") if f in said.get("flags", "").split()), None)
    return f"{name} ({wide})" if wide else name


def machine() -> dict[str, object]:
    """What ran: the GPU if torch sees one, the processor, and versions."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_properties(0).name if on_gpu else None,
        "cpu": processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def activated(found: Sequence[Candidate]) -> ExitStack:
    """All of them active until the stack is left."""
    with ExitStack() as stack:
        for candidate in found:
            stack.enter_context(candidate.runner)
        return stack.pop_all()


def steps_of(found: Sequence[Candidate], steps: int | None) -> int:
    """The number of steps of a loop: what was asked for, or the first bundle's own."""
    from svdit.runtime.pipeline import Model

    if steps is not None:
        return steps
    model: Any = Model.of(found[0].bundle)
    return int(model.adapter.sampling(model.checkpoint).steps)
