"""How much an attention error counts in the finished latents, measured for every step and head.

Every head gets a probe, a sparse pattern. (1) At one step all heads run under their probes, at all others they are
dense: the change of the final latents is what that step counts, and the product of two such changes says how far errors
of two steps add up. (2) At a few steps each head runs under its probe alone: the change of the next latents is what
that head counts in the step; between those steps it is interpolated.

Videos differ in how much they magnify an error, by a factor of 5 to 4000 among eight of `tiny`, so an arithmetic mean
would say what the oddest one does. Weights are geometric means over videos, and (1) is kept for each video, so that a
plan can be chosen by the geometric mean of its own errors: a mean PSNR goes by that.

Letters: P prompts (one video each), S steps, L layers, H heads, M modes, nT tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from svdit.plans.numbers import SILENT, geometric_mean
from svdit.plans.search import errors_at, probes
from svdit.plans.search_state import SearchState
from svdit.plans.tiles import Tiling
from svdit.runtime.denoise import Denoising
from svdit.runtime.mode_masks import ModeMasks
from svdit.runtime.pipeline import Model, Request, dense_stage, prepare
from svdit.runtime.progress import progress
from svdit.runtime.scheduler_state import load_scheduler, save_scheduler
from svdit.runtime.search_attention import Attention, attend_by_masks, full_attention
from svdit.runtime.torch_runner import TorchRunner

HEAD_STEPS = 6
"""Steps at which heads are tried one by one."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """weights [S, L, H]: squared error of the final latents for one unit of a head's relative error at a step.

    It is a mean over elements and a geometric mean over videos. coherence [P, S, S]: scalar products of the final
    errors that two steps make in each video, 0 where negative, over the geometric mean sizes of both steps' own. So
    its diagonal says how much more a step counts in that video than in a typical one.
    """

    weights: np.ndarray
    coherence: np.ndarray


class ProbeAttention:
    """Dense attention, except for every head (`place` True) or one (layer, head) under its probe."""

    def __init__(self, tiling: Tiling, masks: np.ndarray, device: str, dense: Attention) -> None:
        """masks bool [L, H, nT, nT]."""
        self.tiling, self.masks = tiling, torch.from_numpy(masks).to(device)
        self.dense = dense
        self.place: bool | tuple[int, int] = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, stage: Tensor, text_len: Tensor) -> Tensor:
        if self.place is True:
            return attend_by_masks(self.tiling, q, k, v, self.masks[layer], text_len)
        out = self.dense(q, k, v, layer, stage, text_len)
        if self.place and self.place[0] == layer:
            head = slice(self.place[1], self.place[1] + 1)
            one = (x[:, :, head].contiguous() for x in (q, k, v))
            out = out.clone()
            out[:, :, head] = attend_by_masks(self.tiling, *one, self.masks[layer, head], text_len)
        return out


class Track:
    """Where a run stood before each of its steps and after the last: latents [P, C, f, h, w] and scheduler."""

    def __init__(self) -> None:
        self.latents: list[Tensor] = []
        self.schedulers: list[dict[str, np.ndarray]] = []

    def keep(self, run: Denoising) -> None:
        """Remember where `run` stands: to be called at its first step and after every one."""
        assert run.position == len(self.latents), f"step {run.position} after {len(self.latents)} that were kept"
        self.latents.append(run.latents.clone())
        self.schedulers.append(save_scheduler(run.scheduler))


class Trajectory:
    """The dense run of a search, which can be left at any step and gone to its end from there."""

    def __init__(self, run: Denoising, track: Track | None = None) -> None:
        """`run` stands at its first step. track: of the same run, once it was walked (None: walk it now)."""
        self.run = run
        if track is None:
            track = Track()
            track.keep(run)
            while not run.done:
                run.step()
                track.keep(run)
        self.latents, self.schedulers = track.latents, track.schedulers

    def leave(self, step: int, attention: ProbeAttention, place: bool | tuple[int, int]) -> np.ndarray:
        """float32 [P, ...]: what the latents after step `step` gain when `place` is sparse there."""
        run = self.run
        run.resume(step, self.latents[step])
        load_scheduler(run.scheduler, self.schedulers[step])
        attention.place = place
        run.step()
        attention.place = False
        return self._gained()

    def finish(self) -> np.ndarray:
        """float32 [P, ...]: what the final latents have gained after `leave` and dense steps to the end."""
        while not self.run.done:
            self.run.step()
        return self._gained()

    def _gained(self) -> np.ndarray:
        return (self.run.latents.cpu() - self.latents[self.run.position].cpu()).numpy()


def measure_sensitivity(
    runner: TorchRunner,
    model: Model,
    request: Request,
    state: SearchState,
    *,
    heads_too: bool = True,
    track: Track | None = None,
    show: bool = True,
) -> Sensitivity:
    """What errors count along the dense trajectory of a finished search; `request` is that search's own.

    `runner` is active and dense. S (S + 1) / 2 denoiser passes and, with heads_too, HEAD_STEPS * L * H more; else all
    heads of a step count alike. track: of the search's own walk, if that was dense; None: S passes more.
    """
    measured, tiling = state.measurement(), model.tiling
    steps, layers, heads = measured.power.shape
    chosen = probes(measured)
    kept = ModeMasks(state.patterns, tiling)
    masks = np.stack([[kept.mask(n, h, chosen[n, h]) for h in range(heads)] for n in range(layers)])
    error = errors_at(measured, chosen)
    dense = full_attention(tiling, runner.device, runner.dtype)
    attention = ProbeAttention(tiling, masks, runner.device, dense)
    before, runner.model.attention = runner.model.attention, attention
    with torch.inference_mode():
        trajectory = Trajectory(prepare(runner, model, request, dense_stage, walk=True), track)
        final, after = [], np.zeros(steps)
        for step in progress(range(steps), "weighing steps", "step", show=show):
            after[step] = geometric_mean(_mean_squares(trajectory.leave(step, attention, True)))
            final.append(trajectory.finish())
        ratio = by_head(error, after, *_heads_alone(trajectory, attention, error.shape, show)) if heads_too else 1.0
    runner.model.attention = before
    products = scalar_products(np.stack(final, 1))
    counts = geometric_mean(np.diagonal(products, axis1=1, axis2=2))
    return Sensitivity(by_step(error, counts) * ratio, coherences(products))


def _heads_alone(
    trajectory: Trajectory, attention: ProbeAttention, shape: tuple[int, int, int], show: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Steps that were tried [T], and errors [T, L, H] of the next latents with one head under its probe."""
    steps, layers, heads = shape
    tried = np.unique(np.linspace(0, steps - 1, min(HEAD_STEPS, steps)).round().astype(int))
    alone = np.zeros((len(tried), layers, heads))
    for number, step in enumerate(progress(tried, "weighing heads", "step", show=show)):
        for layer, head in np.ndindex(layers, heads):
            changed = _mean_squares(trajectory.leave(step, attention, (layer, head)))
            alone[number, layer, head] = geometric_mean(changed)
    return tried, alone


def _mean_squares(values: np.ndarray) -> np.ndarray:
    """[P] from [P, ...]."""
    return np.square(values, dtype=np.float64).reshape(len(values), -1).mean(1)


def scalar_products(changes: np.ndarray) -> np.ndarray:
    """float64 [P, S, S] of changes [P, S, ...] with each other, a mean over elements."""
    flat = changes.reshape(*changes.shape[:2], -1)
    return np.stack([video @ video.T for video in flat]).astype(np.float64) / flat.shape[-1]


def coherences(products: np.ndarray) -> np.ndarray:
    """float64 [P, S, S] of `Sensitivity` from scalar products [P, S, S]; 1 where a step makes no error at all."""
    own = np.diagonal(products, axis1=1, axis2=2)
    usual = geometric_mean(own)
    size = np.sqrt(np.outer(usual, usual))
    found = np.divide(products, size, out=np.zeros_like(products), where=size > 0).clip(min=0.0)
    places = np.arange(len(usual))
    found[:, places, places] = np.where(usual > 0, np.maximum(found[:, places, places], SILENT), 1.0)
    return found


def by_step(error: np.ndarray, final: np.ndarray) -> np.ndarray:
    """[S, L, H] weights, equal in a step: final [S] over the sum of the probes' relative errors [S, L, H].

    final [S]: errors of the last latents with all heads under probes at one step.
    """
    share = final / np.maximum(error, SILENT).sum((1, 2))
    return np.broadcast_to(share[:, None, None], error.shape)


def by_head(error: np.ndarray, after: np.ndarray, tried: np.ndarray, alone: np.ndarray) -> np.ndarray:
    """[S, L, H] how much more a head counts than one on average: interpolated in its logarithm between steps.

    error [S, L, H] relative errors of the probes; after [S] errors of the next latents with all heads under probes;
    alone [T, L, H] the same with one, at the steps `tried` [T].
    """
    error = np.maximum(error, SILENT)
    apart = alone / error[tried] / (after / error.sum((1, 2)))[tried][:, None, None]
    logs = np.log(np.maximum(apart, SILENT)).reshape(len(tried), -1)
    every = np.arange(len(error))
    return np.exp(np.stack([np.interp(every, tried, column) for column in logs.T], 1)).reshape(error.shape)
