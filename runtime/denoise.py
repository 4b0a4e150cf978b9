"""The denoising loop over any runner.

Shape letters: P prompts, C f h w latent channels, frames, height, width, L text tokens, E text width,
R rows that the denoiser must evaluate in a step (P, or 2P with classifier-free guidance).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

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
    steps      number of steps;  guidance: classifier-free guidance scale, used when > 1
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

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, (int, np.integer)) or self.steps < 1:
            raise complain("steps", repr(self.steps), "an integer >= 1")
        if not (isinstance(self.guidance, (int, float)) and np.isfinite(self.guidance) and self.guidance >= 0):
            raise complain("guidance", repr(self.guidance), "a finite number >= 0")
        if self.text.shape[0] != self.latents.shape[0]:
            raise complain("prompts", f"{self.text.shape[0]} embeddings", f"{self.latents.shape[0]}, one per latent")
        self.scheduler.set_timesteps(int(self.steps))
        self.latents = self.latents.float() * getattr(self.scheduler, "init_noise_sigma", 1.0)

    @property
    def guided(self) -> bool:
        return self.guidance > 1

    @property
    def done(self) -> bool:
        return self.position == self.steps

    def resume(self, position: int, latents: torch.Tensor) -> None:
        """Stand before step `position` with these latents; the scheduler's state is the caller's to restore."""
        assert 0 <= position <= self.steps and latents.shape == self.latents.shape
        self.position, self.latents = position, latents

    def step(self) -> StepRecord:
        """Advance by one step. Raises SvditError when the runner refuses its inputs."""
        assert not self.done
        number = self.position
        stage = self.stage_of(number, self.steps)
        timestep = self.scheduler.timesteps[number]
        model_input = (
            self.scheduler.scale_model_input(self.latents, timestep)
            if hasattr(self.scheduler, "scale_model_input")
            else self.latents
        )
        prompts = self.latents.shape[0]
        if self.guided:
            rows = torch.cat([model_input, model_input])
            text = torch.cat([self.uncond.expand(prompts, -1, -1), self.text])
            # NOTE the two rows of a prompt go into one call: [uncond, cond] when the batch is 2.
            order = [half * prompts + i for i in range(prompts) for half in (0, 1)]
        else:
            rows, text, order = model_input, self.text, list(range(prompts))
        predicted, seconds = self._evaluate(rows[order], text[order], float(timestep), stage)
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
        self.position += 1
        self.records.append(StepRecord(number, stage, seconds))
        return self.records[-1]

    def _evaluate(
        self, rows: torch.Tensor, text: torch.Tensor, timestep: float, stage: int
    ) -> tuple[torch.Tensor, float]:
        """Evaluate [R, ...] rows in calls of the runner's batch, the last one filled up with its last row."""
        total = rows.shape[0]
        batch = self.runner.batch or total
        kinds = {name: self.runner.input(name).dtype for name in ("hidden_states", "timestep", "encoder_hidden_states")}
        parts, seconds = [], 0.0
        for start in range(0, total, batch):
            take = [min(start + i, total - 1) for i in range(batch)]
            feed: Feed = {
                "hidden_states": rows[take].numpy().astype(kinds["hidden_states"]),
                "timestep": np.full((batch,), timestep, kinds["timestep"]),
                "encoder_hidden_states": text[take].numpy().astype(kinds["encoder_hidden_states"]),
            }
            if self.watch is not None:
                self.watch(self.position, stage, feed)
            began = time.perf_counter()
            out = self.runner.infer(feed, stage)["noise_pred"]
            seconds += time.perf_counter() - began
            parts.append(torch.from_numpy(np.asarray(out, dtype=np.float32))[: total - start])
        return torch.cat(parts), seconds


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
