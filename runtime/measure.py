"""The measuring half of the search: walk the denoising trajectory, try every pattern on every head.

At each step, layer and head the outputs of all candidates are compared with full attention
(arXiv 2506.03065, Algorithm 1), the rule of `plans.search` picks one, and its output is fed forward,
so that later layers and steps see the errors that earlier choices make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from svdit.plans import baselines
from svdit.plans.budget import Target, budget_plan
from svdit.plans.bundle import HEADER_BYTES, sha256_of
from svdit.plans.cost import CostModel
from svdit.plans.dynamics import DEFAULT_SPREAD, step_weights
from svdit.plans.errors import complain
from svdit.plans.fields import integer
from svdit.plans.patterns import Pattern
from svdit.plans.schema import Plan
from svdit.plans.search import Measurement, Rule, plan_from, plan_of_segments
from svdit.plans.tiles import Tiling
from svdit.runtime.candidates import check_candidates, default_candidates, is_measured, resolve
from svdit.runtime.denoise import Denoising
from svdit.runtime.pipeline import Model, Request, dense_stage, prepare
from svdit.runtime.progress import progress
from svdit.runtime.scheduler_state import load_scheduler, save_scheduler
from svdit.runtime.search_attention import ChoosingAttention, MapRecorder
from svdit.runtime.search_state import ModePattern, SearchState, check_settings, read_state, write_state
from svdit.runtime.tile_errors import TileErrorMeter
from svdit.runtime.torch_runner import TorchRunner, check_device, checkpoint_of

MAP_STEPS = 6
"""Steps of the dense run that measures attention maps, when a candidate asks for them."""


@dataclass(frozen=True, eq=False)
class Found:
    """A finished search."""

    plan: Plan
    state: SearchState

    @property
    def measurement(self) -> Measurement:
        return self.state.measurement()


def search(
    adapter: Any,
    checkpoint: str | Path | None,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    rule: Rule | None = None,
    max_stages: int = 3,
    tile: tuple[int, int, int] | None = None,
    candidates: Mapping[str, dict] | None = None,
    query_tiles: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    state: Path | None = None,
    show: bool = True,
) -> Found:
    """Search a plan for one checkpoint.

    Errors are means over all prompts (and both guidance rows), which advance together in one batch.
    candidates    name to pattern (see `runtime.candidates`); None: the default ladder
    query_tiles   measure errors on that many evenly spaced query tiles (None: all); outputs fed forward are
                  always complete
    state         file written after every step; an existing one is continued if its settings are the same
    Raises SvditError for settings that do not fit the checkpoint, the device or an existing state file.
    """
    rule = Rule() if rule is None else rule
    check_device(device)
    integer(max_stages, "max_stages", low=1)
    folder = checkpoint_of(adapter, checkpoint)
    tiling = Tiling(adapter.geometry(folder), tile or adapter.default_tile())
    specs = default_candidates(tiling) if candidates is None else check_candidates(candidates, tiling)
    sampled = _sampled(query_tiles, tiling)
    request = Request(tuple(prompts), seed, steps, guidance)
    model = Model(adapter, folder, tiling)
    with TorchRunner(adapter, folder, tiling, None, device=device, dtype=dtype) as runner, torch.inference_mode():
        run = prepare(runner, model, request, dense_stage)
        settings = {
            "model": adapter.name,
            "checkpoint": fingerprint(folder),
            "geometry": tiling.geometry.to_json(),
            "tile": list(tiling.tile),
            "candidates": specs,
            "rule": asdict(rule),
            "prompts": list(request.prompts),
            "seed": request.seed,
            "steps": int(run.steps),
            "guidance": run.guidance,
            "query_tiles": query_tiles,
            "device": torch.device(device).type,
            "dtype": dtype,
        }
        meter = TileErrorMeter(tiling, device)
        if state is not None and state.exists():
            found = read_state(state)
            check_settings(state, found.settings, settings)
        else:
            measured = any(is_measured(spec) for spec in specs.values())
            maps = attention_maps(runner, model, request, meter, show) if measured else None
            found = _first_state(settings, _resolved(specs, tiling, maps), tiling, run, device)
        hook = ChoosingAttention(meter, tiling, _masks(found.patterns, tiling), found.sparsity, rule, sampled)
        final = _walk(found, runner, run, hook, path=state, show=show)
    return Found(plan_of(final, rule, max_stages), final)


def plan_of(state: SearchState, rule: Rule, max_stages: int) -> Plan:
    """Choose a plan from a finished state, with any rule and any number of stages.

    With another rule than the one that was fed forward while measuring, the choice is "open loop": the errors
    were measured behind other choices. The provenance says which.
    """
    settings = state.settings
    return plan_from(
        state.measurement(),
        model=settings["model"],
        geometry=state.geometry,
        tile=tuple(settings["tile"]),
        rule=rule,
        max_stages=max_stages,
        provenance=_origin(state, rule),
    )


def _origin(state: SearchState, rule: Rule | None) -> dict[str, object]:
    """Provenance of a choice: what was measured, and whether behind the choices of this very rule."""
    settings = state.settings
    taken = ("prompts", "seed", "guidance", "query_tiles", "device", "dtype", "checkpoint", "candidates")
    closed = rule is not None and asdict(rule) == settings["rule"]
    return {
        "choice": "closed loop" if closed else "open loop",
        "measured_with": settings["rule"],
        **{name: settings[name] for name in taken},
        **state.record,
    }


def noise_levels(state: SearchState) -> tuple[np.ndarray, np.ndarray]:
    """Share of picture and of noise in the latents before each step and at the end, float64 [S + 1] each.

    Read from the scheduler of a finished search: `sigmas` of flow matching, or `alphas_cumprod`.
    """
    state.measurement()
    stored = {name.removeprefix("scheduler/").partition("|")[0]: value for name, value in state.scheduler.items()}
    sigmas = stored.get("sigmas")
    if sigmas is not None and len(sigmas) == state.steps + 1 and sigmas.max() <= 1:
        noise = np.asarray(sigmas, dtype=np.float64)
        return 1.0 - noise, noise
    if "alphas_cumprod" in stored and len(stored.get("timesteps", ())) == state.steps:
        power = np.append(stored["alphas_cumprod"][stored["timesteps"].astype(np.int64)].astype(np.float64), 1.0)
        return np.sqrt(power), np.sqrt(1.0 - power)
    raise complain(
        "search state",
        "a scheduler with neither flow matching's sigmas nor alphas_cumprod",
        "one of them",
        "choose with --method sparse-vdit, or call svdit.plans.budget with weights of your own",
    )


def budget_plan_of(
    state: SearchState,
    target: Target,
    *,
    max_stages: int,
    cost: CostModel | None = None,
    spread: float = DEFAULT_SPREAD,
    normaliser: str = "layer",
) -> Plan:
    """The best plan for a target from a finished state, open loop; `cost` may be None for a density."""
    weights = step_weights(*noise_levels(state), spread)
    settings = state.settings
    return budget_plan(
        state.measurement(),
        target,
        weights,
        cost,
        model=settings["model"],
        geometry=state.geometry,
        tile=tuple(settings["tile"]),
        normaliser=normaliser,
        max_stages=max_stages,
        provenance={"spread": spread, **_origin(state, None)},
    )


def baseline_plan_of(state: SearchState, method: str, density: float, dense_steps: float) -> Plan:
    """What another method chooses (`plans.baselines`) from a state measured on that method's candidates.

    Raises SvditError for a state with other candidates than this method has at this density.
    """
    measured, settings = state.measurement(), state.settings
    tiling = Tiling(state.geometry, tuple(settings["tile"]))
    dense = sum(Rule(dense_steps=dense_steps).is_dense(step, state.steps) for step in range(state.steps))
    within = baselines.sparse_density(density, dense, state.steps)
    if settings["candidates"] != baselines.candidates(method, tiling, within):
        raise complain(
            "search state",
            "other candidates",
            f"those of {method} at density {density:g}",
            f"measure them: svdit-search --method {method} --density {density:g}",
        )
    segments = baselines.choice(method, measured, dense, within)
    return plan_of_segments(
        measured,
        segments,
        model=settings["model"],
        geometry=state.geometry,
        tile=tiling.tile,
        normaliser="layer",
        record={
            "method": method,
            "target": {"density": density},
            "dense_steps": dense_steps,
            "steps": state.steps,
            **{name: value for name, value in _origin(state, None).items() if name != "candidates"},
        },
        results={},
    )


def attention_maps(
    runner: TorchRunner, model: Model, request: Request, meter: TileErrorMeter, show: bool = False
) -> np.ndarray:
    """Mean dense attention [L, H, nV, nV] between video tiles, over prompts and at most MAP_STEPS steps."""
    recorder = MapRecorder(meter, model.tiling)
    before, runner.model.attention = runner.model.attention, recorder
    short = replace(request, steps=min(request.steps or MAP_STEPS, MAP_STEPS))
    run = prepare(runner, model, short, dense_stage)
    for _ in progress(range(int(run.steps)), "measuring attention maps", "step", show=show):
        run.step()
    runner.model.attention = before
    video = model.tiling.video_slice
    return recorder.mass[:, :, video, video] / int(run.steps)


def _walk(
    state: SearchState, runner: TorchRunner, run: Denoising, hook: ChoosingAttention, *, path: Path | None, show: bool
) -> SearchState:
    """Measure the steps that are missing, one after another; `path` is rewritten after each."""
    runner.model.attention = hook
    if state.done:
        run.resume(state.done, torch.from_numpy(state.latents))
        load_scheduler(run.scheduler, state.scheduler)
    steps = range(state.done, state.steps)
    for step in progress(steps, "searching", "step", show=show, total=state.steps, initial=state.done):
        hook.dense = hook.rule.is_dense(step, state.steps)
        run.step()
        state.error[step], state.power[step] = hook.error, hook.power
        now = {"latents": run.latents.numpy(), "scheduler": save_scheduler(run.scheduler)}
        state = replace(state, done=step + 1, **now)
        if path is not None:
            write_state(path, state)
    return state


def _resolved(specs: Mapping[str, dict], tiling: Tiling, maps: np.ndarray | None) -> dict[str, ModePattern]:
    """One pattern per candidate, or [L][H] of them where the candidate is measured on the maps [L, H, nV, nV]."""
    nothing = np.zeros((0, 0))
    return {
        name: tuple(tuple(resolve(spec, tiling, head) for head in layer) for layer in maps)
        if is_measured(spec) and maps is not None
        else resolve(spec, tiling, nothing)
        for name, spec in specs.items()
    }


def _first_state(
    settings: dict, patterns: Mapping[str, ModePattern], tiling: Tiling, run: Denoising, device: str
) -> SearchState:
    shape = (tiling.geometry.layers, tiling.geometry.heads, len(patterns))
    masks = _masks(tuple(patterns.values()), tiling)
    kept = [[[tiling.density(mask) for mask in modes] for modes in heads] for heads in masks]
    steps = int(run.steps)
    return SearchState(
        settings=settings,
        record=hardware(device),
        modes=tuple(patterns),
        patterns=tuple(patterns.values()),
        done=0,
        error=np.zeros((steps, *shape)),
        power=np.zeros((steps, *shape[:2])),
        sparsity=np.broadcast_to(1.0 - np.array(kept), shape).copy(),
        latents=run.latents.numpy(),
        scheduler={},
    )


def _masks(patterns: tuple[ModePattern, ...], tiling: Tiling) -> np.ndarray:
    """bool [L or 1, H, M, nT, nT]; one layer stands for all when nothing was measured per head."""
    geometry = tiling.geometry
    per_head = any(isinstance(p, tuple) for p in patterns)
    layers = geometry.layers if per_head else 1
    known: dict[Pattern, np.ndarray] = {}

    def mask(pattern: Pattern) -> np.ndarray:
        if pattern not in known:
            known[pattern] = tiling.mask(pattern)
        return known[pattern]

    return np.stack(
        [
            np.stack(
                [
                    np.stack([mask(p[layer][head] if isinstance(p, tuple) else p) for p in patterns])
                    for head in range(geometry.heads)
                ]
            )
            for layer in range(layers)
        ]
    )


def _sampled(query_tiles: int | None, tiling: Tiling) -> np.ndarray | None:
    if query_tiles is None:
        return None
    count = integer(query_tiles, "query_tiles", 1, tiling.num_tiles)
    return np.unique(np.linspace(0, tiling.num_tiles - 1, count).round().astype(np.int64))


def fingerprint(folder: Path) -> dict[str, str]:
    """Weight files of a checkpoint with the sha256 of their first MiB (bundles use the same)."""
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise complain("checkpoint", f"{folder} without *.safetensors files", "a checkpoint in diffusers' layout")
    return {str(file.relative_to(folder)): sha256_of(file, HEADER_BYTES)[:16] for file in files}


def hardware(device: str) -> dict[str, str]:
    """What the search ran on, for the provenance."""
    gpu = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    return {"hardware": name, "torch": torch.__version__}


__all__ = ["Found", "Rule", "baseline_plan_of", "budget_plan_of", "noise_levels", "plan_of", "search"]
