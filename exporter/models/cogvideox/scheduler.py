"""CogVideoX's DPM scheduler with the interface that diffusers' other schedulers have."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXDPMScheduler
from torch import Tensor


def with_memory(scheduler: object) -> object:
    """The scheduler itself, or a DpmSteps around it where its steps need to be told of the one before."""
    return DpmSteps(scheduler) if isinstance(scheduler, CogVideoXDPMScheduler) else scheduler


class DpmSteps:
    """Keeps what the scheduler wants to be given back: the picture that the last step predicted, and its timestep.

    Noise is drawn for each row and step from a seed of its own, so that a run can be left and gone on with at any step.
    """

    def __init__(self, scheduler: CogVideoXDPMScheduler) -> None:
        self.scheduler = scheduler
        self.init_noise_sigma = scheduler.init_noise_sigma
        self.alphas_cumprod = scheduler.alphas_cumprod
        self.timesteps = scheduler.timesteps
        self.position = 0
        self.predicted: Tensor | None = None

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Start again, with so many steps."""
        self.scheduler.set_timesteps(num_inference_steps)
        self.timesteps, self.position, self.predicted = self.scheduler.timesteps, 0, None

    def scale_model_input(self, latents: Tensor, timestep: Any) -> Tensor:
        return self.scheduler.scale_model_input(latents, timestep)

    def step(self, output: Tensor, timestep: Any, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Latents before and after one step."""
        before = self.timesteps[self.position - 1] if self.position else None
        seeds = [row << 32 | self.position for row in range(len(latents))]
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        predicted = None if self.predicted is None else self.predicted.to(latents.device)
        latents, self.predicted = self.scheduler.step(
            output, predicted, timestep, before, latents, generator=noise, return_dict=False
        )
        self.position += 1
        return (latents,)
