"""The measuring half of the search: walk the denoising trajectory, try every pattern on every head.

At each step, layer and head the outputs of all candidates are compared with full attention
(arXiv 2506.03065, Algorithm 1), the rule of `plans.search` picks one, and its output is fed forward,
so that later layers and steps see the errors that earlier choices make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svdit.plans.bundle import HEADER_BYTES, sha256_of
from svdit.plans.errors import complain
from svdit.plans.fields import integer
from svdit.plans.patterns import Pattern
from svdit.plans.schema import Plan
from svdit.plans.search import Measurement, Rule, choose, losses, plan_from, relative_error
from svdit.plans.tiles import Tiling
from svdit.runtime.attention import DenseAttention, OpAttention, masked_attention, text_bias
from svdit.runtime.candidates import check_candidates, default_candidates, is_measured, resolve
from svdit.runtime.denoise import Denoising
from svdit.runtime.pipeline import Request, prepare
from svdit.runtime.progress import progress
from svdit.runtime.scheduler_state import load_scheduler, save_scheduler
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


class MapRecorder:
    """Dense attention that adds up tile maps: mass [L, H, nT, nT], mean over calls when divided by `calls`."""

    def __init__(self, tiling: Tiling, meter: TileErrorMeter) -> None:
        geometry = tiling.geometry
        self.dense, self.meter = DenseAttention(tiling), meter
        self.mass = np.zeros((geometry.layers, geometry.heads, tiling.num_tiles, tiling.num_tiles))
        self.none = torch.zeros(
            geometry.heads, 0, tiling.num_tiles, tiling.num_tiles, dtype=torch.bool, device=meter.device
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, stage: Tensor, text_len: Tensor) -> Tensor:
        self.mass[layer] += self.meter.measure(q, k, v, self.none, text_len).mass
        return self.dense(q, k, v, layer, stage, text_len)


class ChoosingAttention:
    """Measures all modes of a layer, applies the rule and returns the chosen outputs.

    masks bool [L or 1, H, M, nT, nT] on the host; sparsity [L, H, M]. After a step, `error` [L, H, M] and
    `power` [L, H] hold what was measured in it.
    """

    def __init__(
        self,
        tiling: Tiling,
        meter: TileErrorMeter,
        masks: np.ndarray,
        sparsity: np.ndarray,
        rule: Rule,
        query_tiles: np.ndarray | None,
    ) -> None:
        self.tiling, self.meter, self.rule, self.sparsity = tiling, meter, rule, sparsity
        self.masks = torch.from_numpy(masks).to(meter.device)
        self.query_tiles = None if query_tiles is None else torch.from_numpy(query_tiles).to(meter.device)
        self.error, self.power = np.zeros(sparsity.shape), np.zeros(sparsity.shape[:2])
        sizes = torch.as_tensor(tiling.sizes, dtype=torch.int64)
        self.tile_of = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(meter.device)
        self._ops: dict[bytes, OpAttention] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, stage: Tensor, text_len: Tensor) -> Tensor:
        masks = self.masks[layer if len(self.masks) > 1 else 0]
        found = self.meter.measure(q, k, v, masks, text_len, self.query_tiles)
        self.error[layer], self.power[layer] = found.error / found.count, found.power / found.count
        error = relative_error(self.error[layer], self.power[layer], self.rule.normaliser) * self.rule.error_scale
        chosen = choose(losses(error, self.sparsity[layer], self.rule.lam), self.rule.eps)
        full = torch.ones(1, *masks.shape[2:], dtype=torch.bool, device=masks.device)
        picked = torch.stack([torch.cat([masks[h], full])[m] for h, m in enumerate(chosen.tolist())])
        return self._attend(q, k, v, picked, text_len)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, head_masks: Tensor, text_len: Tensor) -> Tensor:
        if q.is_cuda:
            return masked_attention(q, k, v, head_masks, self.tile_of, text_bias(self.tiling, text_len))
        return gathered_attention(self.tiling, q, k, v, head_masks, text_len)


def gathered_attention(tiling: Tiling, q: Tensor, k: Tensor, v: Tensor, head_masks: Tensor, text_len: Tensor) -> Tensor:
    """The reference op under one tile mask per head ([H, nT, nT] bool): reads kept keys only."""
    from svdit.trt_plugins.reference import sparse_attention

    distinct, index = np.unique(head_masks.numpy().reshape(len(head_masks), -1), axis=0, return_inverse=True)
    num_tiles = tiling.num_tiles
    ids, rows, tiles, total = [], [np.zeros((2, num_tiles + 1), np.int64)], [np.zeros(0, np.int64)], 0
    for number, flat in enumerate(distinct):
        mask = flat.reshape(num_tiles, num_tiles)
        ids.append(0 if mask.all() else 1 if not mask.any() else number + 2)
        rows.append((total + np.concatenate([[0], np.cumsum(mask.sum(1))]))[None])
        tiles.append(np.nonzero(mask)[1])
        total += len(tiles[-1])
    if not total:
        tiles.append(np.zeros(1, np.int64))

    def table(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))

    head_pattern = table(np.array([ids[i] for i in index.reshape(-1)])[None])
    return sparse_attention(
        q,
        k,
        v,
        torch.zeros(1, dtype=torch.int32),
        text_len,
        head_pattern,
        table(tiling.tile_offsets),
        table(np.concatenate(rows)),
        table(np.concatenate(tiles)),
        torch.full((1, 1), -1, dtype=torch.int32),
        q.shape[-1] ** -0.5,
        tiling.geometry.text_tokens,
        tiling.text_first,
    )


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
    with TorchRunner(adapter, folder, tiling, None, device=device, dtype=dtype) as runner, torch.inference_mode():
        run = prepare(runner, adapter, folder, tiling, request, lambda step, steps: 0)
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
        found = read_state(state) if state is not None and state.exists() else None
        if found is not None:
            check_settings(state, found.settings, settings)
        else:
            patterns = _resolved(specs, runner, adapter, folder, tiling, request, meter, show)
            found = _empty_state(settings, specs, patterns, tiling, run, device)
        final = _walk(found, runner, run, tiling, meter, rule, sampled, state, show)
    return Found(plan_of(final, rule, max_stages, "closed loop"), final)


def plan_of(state: SearchState, rule: Rule, max_stages: int, choice: str = "open loop") -> Plan:
    """Choose a plan from a finished state, with any rule and any number of stages.

    With another rule than the one that was fed forward while measuring, the choice is "open loop": the errors
    were measured behind other choices. The provenance says which.
    """
    settings = state.settings
    if choice != "closed loop" and asdict(rule) == settings["rule"]:
        choice = "closed loop"
    taken = ("prompts", "seed", "guidance", "query_tiles", "device", "dtype", "checkpoint", "candidates")
    provenance = {
        "choice": choice,
        "measured_with": settings["rule"],
        **{n: settings[n] for n in taken},
        **state.record,
    }
    return plan_from(
        state.measurement(), settings["model"], state.geometry, tuple(settings["tile"]), rule, max_stages, provenance
    )


def _walk(
    state: SearchState,
    runner: TorchRunner,
    run: Denoising,
    tiling: Tiling,
    meter: TileErrorMeter,
    rule: Rule,
    sampled: np.ndarray | None,
    path: Path | None,
    show: bool,
) -> SearchState:
    hook = ChoosingAttention(tiling, meter, _masks(state.patterns, tiling), state.sparsity, rule, sampled)
    runner.model.attention = hook
    if state.done:
        run.resume(state.done, torch.from_numpy(state.latents))
        load_scheduler(run.scheduler, state.scheduler)
    bar = progress(
        range(state.done, state.steps), "searching", "step", show=show, total=state.steps, initial=state.done
    )
    for step in bar:
        record = run.step()
        state.error[step], state.power[step] = hook.error, hook.power
        state = SearchState(
            state.settings,
            state.record,
            state.modes,
            state.patterns,
            step + 1,
            state.error,
            state.power,
            state.sparsity,
            run.latents.numpy(),
            save_scheduler(run.scheduler),
        )
        if path is not None:
            write_state(path, state)
        bar.set_postfix_str(f"{record.seconds:.1f} s", refresh=False)
    return state


def _resolved(
    specs: Mapping[str, dict],
    runner: TorchRunner,
    adapter: Any,
    folder: Path,
    tiling: Tiling,
    request: Request,
    meter: TileErrorMeter,
    show: bool,
) -> tuple[ModePattern, ...]:
    """One pattern per candidate, or [L][H] of them where the candidate is measured."""
    geometry = tiling.geometry
    mass = None
    if any(is_measured(spec) for spec in specs.values()):
        recorder = MapRecorder(tiling, meter)
        dense, runner.model.attention = runner.model.attention, recorder
        short = Request(request.prompts, request.seed, min(request.steps or MAP_STEPS, MAP_STEPS), request.guidance)
        run = prepare(runner, adapter, folder, tiling, short, lambda step, steps: 0)
        for _ in progress(range(run.steps), "measuring attention maps", "step", show=show):
            run.step()
        runner.model.attention = dense
        mass = recorder.mass[:, :, tiling.video_slice, tiling.video_slice]
    return tuple(
        tuple(
            tuple(resolve(spec, tiling, mass[layer, head]) for head in range(geometry.heads))
            for layer in range(geometry.layers)
        )
        if is_measured(spec)
        else resolve(spec, tiling, np.zeros((0, 0)))
        for spec in specs.values()
    )


def _empty_state(
    settings: dict,
    specs: Mapping[str, dict],
    patterns: tuple[ModePattern, ...],
    tiling: Tiling,
    run: Denoising,
    device: str,
) -> SearchState:
    geometry, steps = tiling.geometry, int(run.steps)
    shape = (geometry.layers, geometry.heads, len(specs))
    masks = _masks(patterns, tiling)
    kept = [[[tiling.density(mask) for mask in modes] for modes in heads] for heads in masks]
    sparsity = np.broadcast_to(1.0 - np.array(kept), shape).copy()
    return SearchState(
        settings,
        hardware(device),
        tuple(specs),
        patterns,
        0,
        np.zeros((steps, *shape)),
        np.zeros((steps, *shape[:2])),
        sparsity,
        run.latents.numpy(),
        {},
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


__all__ = ["Found", "Rule", "plan_of", "search"]
