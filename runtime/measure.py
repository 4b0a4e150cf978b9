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
from svdit.plans.fields import integer, one_of
from svdit.plans.maps import map_bins
from svdit.plans.schema import Plan
from svdit.plans.search import Measurement, Rule, plan_from, plan_of_segments
from svdit.plans.search_state import (
    ModePattern,
    SearchState,
    check_settings,
    noise_levels,
    read_state,
    write_state,
)
from svdit.plans.tiles import Tiling
from svdit.runtime.candidates import (
    MAP_PARTS,
    check_candidates,
    default_candidates,
    is_measured,
    needs_rows,
    resolve,
)
from svdit.runtime.denoise import Denoising
from svdit.runtime.mode_masks import ModeMasks
from svdit.runtime.pipeline import Model, Request, dense_stage, prepare
from svdit.runtime.progress import progress
from svdit.runtime.projections import output_weights
from svdit.runtime.scheduler_state import load_scheduler, save_scheduler
from svdit.runtime.search_attention import ChoosingAttention, MapRecorder, full_attention
from svdit.runtime.sensitivity import Track, measure_sensitivity
from svdit.runtime.tile_errors import TileErrorMeter
from svdit.runtime.torch_runner import TorchRunner, check_device, checkpoint_of

CALIBRATED = "calibrated"
"""Key of a state's record: which of CALIBRATIONS was measured."""
CALIBRATIONS = ("steps", "steps and heads")
"""What `--calibrate-steps` and `--calibrate` weigh; the second includes the first."""
MAP_STEPS = 6
"""Steps of the dense run that measures attention maps, when a candidate asks for them."""
SAMPLED_MAP_STEPS = 2
"""The same where a sample of query tiles and of its first prompt is enough."""


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
    size: tuple[int | None, int | None, int | None] = (None, None, None),
    tile: tuple[int, int, int] | None = None,
    candidates: Mapping[str, dict] | SearchState | None = None,
    query_tiles: int | None = None,
    projected: bool = False,
    calibrate: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    state: Path | None = None,
    show: bool = True,
) -> Found:
    """Search a plan for one checkpoint.

    Errors are means over all prompts (and both guidance rows), which advance together in one batch.
    size          frames, height and width of the video in pixels; None: the model's reference video
    candidates    name to pattern (see `runtime.candidates`), or a state: the very patterns that it measures, so that
                  both searches can be joined (`plans.joined`); None: the default ladder
    query_tiles   measure errors on that many query tiles (None: all), drawn from the seed anew for each step and
                  layer; outputs fed forward are always complete
    projected     errors after the layer's output projection, as shares of the whole layer's output; else errors of
                  the heads' own outputs, as in the paper
    calibrate     one of CALIBRATIONS: also measure how much errors of each step, or of each step and head, count in
                  the end (`runtime.sensitivity`); a state that knows as much is not measured again
    state         file written after every step; an existing one is continued if its settings are the same
    Raises SvditError for settings that do not fit the checkpoint, the device or an existing state file.
    """
    rule = Rule() if rule is None else rule
    check_device(device)
    integer(max_stages, "max_stages", low=1)
    if calibrate is not None:
        one_of(calibrate, "calibrate", CALIBRATIONS)
    folder = checkpoint_of(adapter, checkpoint)
    geometry = adapter.geometry_for(size, folder)
    adapter.check_geometry(folder, geometry)
    tiling = Tiling(geometry, tile or adapter.default_tile())
    patterns = None
    if isinstance(candidates, SearchState):
        specs = _specs_of(candidates, adapter.name, tiling)
        patterns = dict(zip(candidates.modes, candidates.patterns, strict=True))
    else:
        specs = default_candidates(tiling) if candidates is None else check_candidates(candidates, tiling)
    if query_tiles is not None:
        integer(query_tiles, "query_tiles", min(2, tiling.num_tiles), tiling.num_tiles)
    request = Request(tuple(prompts), seed, steps, guidance)
    model = Model(adapter, folder, tiling, device)
    model.texts(request.prompts)  # text encoders are gone before the denoiser comes
    with TorchRunner(adapter, folder, tiling, None, device=device, dtype=dtype) as runner, torch.inference_mode():
        run = prepare(runner, model, request, dense_stage, walk=True)
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
            "projected": projected,
            "device": torch.device(device).type,
            "dtype": dtype,
        }
        meter = TileErrorMeter(tiling, device)
        if state is not None and state.exists():
            found = read_state(state)
            check_settings(state, found.settings, settings)
            if patterns is not None and found.patterns != tuple(patterns.values()):
                step = "name another --state, or delete the file"
                raise complain(f"{state}: patterns", "others", "those of the state in --candidates", step)
        else:
            if patterns is None:
                measured = any(is_measured(spec) for spec in specs.values())
                maps = _maps(runner, model, request, meter, specs, query_tiles, show) if measured else None
                patterns = _resolved(specs, tiling, maps)
            found = _first_state(settings, patterns, tiling, run, device)
        hook = ChoosingAttention(
            meter,
            tiling,
            ModeMasks(found.patterns, tiling),
            rule,
            full_attention(tiling, device, dtype),
            query_tiles=query_tiles,
            seed=request.seed,
            weights=output_weights(runner.model) if projected else None,
        )
        fresh = calibrate is not None and not found.done and rule.is_dense(int(run.steps) - 1, int(run.steps))
        track = Track() if fresh else None
        final = _walk(found, runner, run, hook, path=state, track=track, show=show)
        heads_too = calibrate == CALIBRATIONS[1]
        known = final.sensitivity is not None and not (heads_too and final.record.get(CALIBRATED) == CALIBRATIONS[0])
        if calibrate is not None and not known:
            counted = measure_sensitivity(runner, model, request, final, heads_too=heads_too, track=track, show=show)
            record = {**final.record, CALIBRATED: calibrate}
            final = replace(final, sensitivity=counted.weights, coherence=counted.coherence, record=record)
            if state is not None:
                write_state(state, final)
    return Found(plan_of(final, rule, max_stages), final)


def _specs_of(state: SearchState, model: str, tiling: Tiling) -> dict[str, dict]:
    """Candidates of another search, if it is of the same model, size and tile."""
    for what, own, other in (
        ("model", model, state.settings["model"]),
        ("geometry", tiling.geometry, state.geometry),
        ("tile", list(tiling.tile), state.settings["tile"]),
    ):
        if own != other:
            raise complain("candidates", f"a search with {what} {other}", f"one with {own}", "name a JSON file instead")
    return {name: state.settings["candidates"][name] for name in state.modes}


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
    changed = {"without", "joined"} & set(state.record)
    closed = rule is not None and asdict(rule) == settings["rule"] and not changed
    return {
        "choice": "closed loop" if closed else "open loop",
        "measured_with": settings["rule"],
        **{name: settings[name] for name in taken},
        "projected": settings.get("projected", False),
        **{name: value for name, value in state.record.items() if name != CALIBRATED},
    }


def budget_plan_of(
    state: SearchState,
    target: Target,
    *,
    max_stages: int,
    cost: CostModel | None = None,
    spread: float | None = None,
    normaliser: str = "layer",
) -> Plan:
    """The best plan for a target from a finished state, open loop; `cost` may be None for a density.

    Errors weigh as the state measured them; where it did not, or for a given `spread`, as the noise schedule says.
    """
    measured = spread is None and state.sensitivity is not None
    spread = DEFAULT_SPREAD if spread is None else spread
    weights = state.sensitivity if measured else step_weights(*noise_levels(state), spread)
    settings = state.settings
    return budget_plan(
        state.measurement(),
        target,
        weights,
        cost,
        coherence=state.coherence if measured else None,
        model=settings["model"],
        geometry=state.geometry,
        tile=tuple(settings["tile"]),
        normaliser=normaliser,
        max_stages=max_stages,
        provenance={
            "weights": "measured" if measured else "schedule",
            **({CALIBRATED: state.record.get(CALIBRATED, "steps and heads")} if measured else {}),
            "spread": spread,
            **_origin(state, None),
        },
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
    runner: TorchRunner,
    model: Model,
    request: Request,
    meter: TileErrorMeter,
    show: bool = False,
    *,
    most_steps: int = MAP_STEPS,
    parts: int = 1,
    query_tiles: int | None = None,
) -> np.ndarray:
    """Mean dense attention [parts, L, H, nV, nV] between video tiles, over prompts and at most so many steps.

    parts: of the trajectory, each with a map of its own; a part without a step has that of the part before.
    query_tiles: of so many query tiles alone, drawn anew for each step and layer (None: all of them).
    """
    full = full_attention(model.tiling, runner.device, runner.dtype)
    recorder = MapRecorder(meter, model.tiling, full, parts, query_tiles)
    before, runner.model.attention = runner.model.attention, recorder
    short = replace(request, steps=min(request.steps or most_steps, most_steps))
    run = prepare(runner, model, short, dense_stage, walk=True)
    steps = int(run.steps)
    part_of = np.arange(steps) * parts // steps
    for step in progress(range(steps), "measuring attention maps", "step", show=show):
        recorder.part = part_of[step]
        run.step()
    runner.model.attention = before
    video = model.tiling.video_slice
    mass = recorder.mass[..., video, video]
    counts = np.bincount(part_of, minlength=parts)
    measured = np.maximum.accumulate(np.where(counts > 0, np.arange(parts), 0))
    return mass[measured] / counts[measured][:, None, None, None, None]


def _maps(
    runner: TorchRunner,
    model: Model,
    request: Request,
    meter: TileErrorMeter,
    specs: Mapping[str, dict],
    query_tiles: int | None,
    show: bool,
) -> np.ndarray:
    """The attention maps that these candidates need, from fewer steps where errors are measured on a sample."""
    if not any(needs_rows(spec) for spec in specs.values()) and query_tiles is not None:
        one = replace(request, prompts=request.prompts[:1])
        return attention_maps(runner, model, one, meter, show, most_steps=SAMPLED_MAP_STEPS, query_tiles=query_tiles)
    steps = MAP_STEPS if query_tiles is None else MAP_PARTS
    return attention_maps(runner, model, request, meter, show, most_steps=steps, parts=MAP_PARTS)


def _walk(
    state: SearchState,
    runner: TorchRunner,
    run: Denoising,
    hook: ChoosingAttention,
    *,
    path: Path | None,
    track: Track | None,
    show: bool,
) -> SearchState:
    """Measure the steps that are missing, one after another; `path` is rewritten after each, `track` kept up."""
    runner.model.attention = hook
    if track is not None:
        track.keep(run)
    if state.done:
        run.resume(state.done, torch.from_numpy(state.latents))
        load_scheduler(run.scheduler, state.scheduler)
    steps = range(state.done, state.steps)
    for step in progress(steps, "searching", "step", show=show, total=state.steps, initial=state.done):
        hook.step, hook.dense = step, hook.rule.is_dense(step, state.steps)
        run.step()
        if track is not None:
            track.keep(run)
        state.error[step], state.power[step] = hook.error, hook.power
        if state.layer_power is not None:
            state.layer_power[step] = hook.layer_power
        if state.deviation is not None:
            state.deviation[step] = hook.deviation
        if state.maps is not None:
            state.maps[:] += hook.maps / state.steps
        now = {"latents": run.latents.cpu().numpy(), "scheduler": save_scheduler(run.scheduler)}
        state = replace(state, done=step + 1, **now)
        if path is not None:
            write_state(path, state)
    return state


def _resolved(specs: Mapping[str, dict], tiling: Tiling, maps: np.ndarray | None) -> dict[str, ModePattern]:
    """One pattern per candidate, or [L][H] of them where it is measured on the maps [parts, L, H, nV, nV]."""
    nothing = np.zeros((0, 0))
    by_head = None if maps is None else maps.transpose(1, 2, 0, 3, 4)
    return {
        name: tuple(tuple(resolve(spec, tiling, head) for head in layer) for layer in by_head)
        if is_measured(spec) and by_head is not None
        else resolve(spec, tiling, nothing)
        for name, spec in specs.items()
    }


def _first_state(
    settings: dict, patterns: Mapping[str, ModePattern], tiling: Tiling, run: Denoising, device: str
) -> SearchState:
    shape = (tiling.geometry.layers, tiling.geometry.heads, len(patterns))
    steps, num_bins = int(run.steps), len(map_bins(tiling))
    return SearchState(
        settings=settings,
        record=hardware(device),
        modes=tuple(patterns),
        patterns=tuple(patterns.values()),
        done=0,
        error=np.zeros((steps, *shape)),
        power=np.zeros((steps, *shape[:2])),
        sparsity=ModeMasks(tuple(patterns.values()), tiling).sparsity,
        latents=run.latents.cpu().numpy(),
        scheduler={},
        maps=np.zeros((*shape[:2], num_bins, num_bins), np.float32),
        layer_power=np.zeros((steps, shape[0])),
        deviation=np.zeros((steps, *shape)),
    )


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
