"""The denoising loop over any runner.

Shape letters: P prompts, C f h w latent channels, frames, height, width, L text tokens, E text width,
R rows that the denoiser must evaluate in a step (P, or 2P with classifier-free guidance).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from svdit.plans.batch import Batch
from svdit.plans.errors import complain
from svdit.runtime.progress import progress
from svdit.runtime.runner import Runner

Feed = dict[str, np.ndarray]


def check_seed(seed: object) -> int:
    """A seed for torch's generator: an integer in [0, 2^63)."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
        raise complain("seed", repr(seed), "an integer in 0..2^63-1")
    return int(seed)


def noise_for(seeds: Sequence[int], latent_shape: Sequence[int]) -> torch.Tensor:
    """Standard normal start latents, float32 [P, C, f, h, w], one CPU generator per seed.

    Drawn on the CPU whatever runs the model, so that a seed means the same video everywhere.
    """
    rows = [
        torch.randn(tuple(latent_shape), generator=torch.Generator().manual_seed(check_seed(seed))) for seed in seeds
    ]
    return torch.stack(rows)


@dataclass
class StepRecord:
    """One step of the loop: the stage it ran in and the wall-clock time of its denoiser calls."""

    step: int
    stage: int
    seconds: float


@dataclass
class Denoising:
    """A denoising run that is advanced step by step, so that two runs can be interleaved.

    runner     active runner
    scheduler  a diffusers scheduler of its own (state is kept in it)
    latents    [P, C, f, h, w] float32 start noise; afterwards the current latents
    text       [P, L, E] prompt embeddings;  uncond [1, L, E] of the empty prompt
    more       further inputs of the denoiser that prompts make: name to (rows of the prompts, row of the empty one)
    steps      number of steps;  guidance: classifier-free guidance scale, used when > 1
    embedded   the scale is the denoiser's input `guidance`, 1000 times, where it has one; there is no unconditional row
    sigmas     noise levels for the scheduler, one a step (None: its own)
    stage_of   (step, steps) -> stage of the runner
    watch      called with (step, stage, feed) before each denoiser call
    position   the next step
    """

    runner: Runner
    scheduler: Any
    latents: torch.Tensor
    text: torch.Tensor
    uncond: torch.Tensor
    steps: int
    guidance: float
    stage_of: Callable[[int, int], int]
    records: list[StepRecord] = field(default_factory=list)
    watch: Callable[[int, int, Feed], None] | None = None
    position: int = 0
    more: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    embedded: bool = False
    sigmas: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, (int, np.integer)) or self.steps < 1:
            raise complain("steps", repr(self.steps), "an integer >= 1")
        if not (isinstance(self.guidance, (int, float)) and np.isfinite(self.guidance) and self.guidance >= 0):
            raise complain("guidance", repr(self.guidance), "a finite number >= 0")
        if self.text.shape[0] != self.latents.shape[0]:
            raise complain("prompts", f"{self.text.shape[0]} embeddings", f"{self.latents.shape[0]}, one per latent")
        if self.sigmas is None:
            self.scheduler.set_timesteps(int(self.steps))
        else:
            self.scheduler.set_timesteps(sigmas=list(self.sigmas))
        device = self.runner.tensor_device or "cpu"
        self.latents = self.latents.to(device).float() * getattr(self.scheduler, "init_noise_sigma", 1.0)
        given = {"encoder_hidden_states": (self.text, self.uncond), **self.more}
        self._conditions = {name: self._rows(*pair).to(device) for name, pair in given.items()}
        if self.embedded and any(spec.name == "guidance" for spec in self.runner.inputs):
            self._conditions["guidance"] = self.text.new_full((len(self.text),), 1000 * self.guidance).to(device)

    def _rows(self, text: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
        """[P, ...] and [1, ...] to [R, ...]."""
        if not self.guided:
            return text
        # NOTE the two rows of a prompt go into one call: [uncond, cond] when the batch is 2.
        return torch.stack([uncond.expand(text.shape), text], dim=1).flatten(0, 1)

    @property
    def guided(self) -> bool:
        return self.guidance > 1 and not self.embedded

    @property
    def done(self) -> bool:
        return self.position == self.steps

    def resume(self, position: int, latents: torch.Tensor) -> None:
        """Stand before step `position` with these latents; the scheduler's state is the caller's to restore."""
        assert 0 <= position <= self.steps and latents.shape == self.latents.shape
        self.position, self.latents = position, latents.to(self.latents.device)

    def step(self) -> StepRecord:
        """Advance by one step. Raises SvditError when the runner refuses its inputs."""
        assert not self.done
        number, began = self.position, time.perf_counter()
        stage = self.stage_of(number, self.steps)
        timestep = self.scheduler.timesteps[number]
        model_input = (
            self.scheduler.scale_model_input(self.latents, timestep)
            if hasattr(self.scheduler, "scale_model_input")
            else self.latents
        )
        rows = model_input.repeat_interleave(2, dim=0) if self.guided else model_input
        predicted, seconds = self._evaluate(rows, float(timestep), stage)
        if self.guided:
            uncond, cond = predicted[0::2], predicted[1::2]
            predicted = uncond + self.guidance * (cond - uncond)
        self.latents = self.scheduler.step(predicted, timestep, self.latents, return_dict=False)[0]
        if not bool(torch.isfinite(self.latents).all()):
            raise complain(
                f"{self.runner.name}: step {number}",
                "latents that are not finite",
                "finite values",
                "compare with another backend: svdit-compare DIR --against torch",
            )
        if self.runner.tensor_device is not None:  # only now, after the one wait of the step, everything is done
            seconds = time.perf_counter() - began
        self.position += 1
        if self.done:
            self.latents = self.latents.cpu()
        self.records.append(StepRecord(number, stage, seconds))
        return self.records[-1]

    def _evaluate(self, rows: torch.Tensor, timestep: float, stage: int) -> tuple[torch.Tensor, float]:
        """Evaluate [R, ...] rows in calls of the runner's batch, the last one filled up with its last row."""
        total = rows.shape[0]
        batch = self.runner.batch or Batch(1, total)
        parts, seconds = [], 0.0
        for piece in batch.cut(total):
            size = max(piece.stop - piece.start, batch.least)
            feed = {
                "hidden_states": _filled(rows[piece], size),
                "timestep": rows.new_full((size,), timestep),
                **{name: _filled(x[piece], size) for name, x in self._conditions.items()},
            }
            call = self._prepared(feed, stage)
            began = time.perf_counter()
            out = call()
            seconds += time.perf_counter() - began
            parts.append(out[: total - piece.start])
        return torch.cat(parts), seconds

    def _prepared(self, feed: Mapping[str, torch.Tensor], stage: int) -> Callable[[], torch.Tensor]:
        """One call of the denoiser, to be made: on the runner's device, or over arrays."""
        runner = self.runner
        arrays: Feed = {}
        if self.watch is not None or runner.tensor_device is None:
            arrays = {name: x.cpu().numpy().astype(runner.input(name).dtype) for name, x in feed.items()}
        if self.watch is not None:
            self.watch(self.position, stage, arrays)

        def call() -> torch.Tensor:
            if runner.tensor_device is not None:
                return runner.infer_tensors(feed, stage)["noise_pred"].float()
            return torch.from_numpy(np.asarray(runner.infer(arrays, stage)["noise_pred"], dtype=np.float32))

        return call


def _filled(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Rows [b, ...] with the last one repeated up to [batch, ...]."""
    missing = batch - rows.shape[0]
    return rows if missing == 0 else torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])


def run_all(runs: Sequence[Denoising], label: str, show: bool = True) -> None:
    """Advance all runs to the end, one step each in turn; every second round goes in reverse order.

    Interleaving spreads the machine's slow and fast moments evenly over the runs that are compared.
    """
    steps = runs[0].steps
    bar = progress(range(steps), label, "step", show=show)
    for number in bar:
        for run in runs if number % 2 == 0 else list(reversed(runs)):
            run.step()
        last = runs[-1].records[-1]
        bar.set_postfix_str(
            f"stage {last.stage}, {', '.join(f'{r.records[-1].seconds * 1000:.0f} ms' for r in runs)}", refresh=False
        )
