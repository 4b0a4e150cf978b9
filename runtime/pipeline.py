"""From prompts to videos: encode, draw noise, denoise, decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from svdit.plans import registry
from svdit.plans.bundle import Bundle
from svdit.plans.errors import complain
from svdit.plans.schema import Plan
from svdit.plans.tiles import Tiling
from svdit.runtime.denoise import Denoising, StepRecord, check_seed, noise_for, run_all
from svdit.runtime.pipeline_parts import decode, encode
from svdit.runtime.runner import Runner
from svdit.runtime.torch_runner import TorchRunner, checkpoint_of


@dataclass(frozen=True, eq=False)
class Request:
    """What to make: prompt i uses seed + i. None means the checkpoint's own default."""

    prompts: tuple[str, ...]
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        prompts = tuple(self.prompts)
        object.__setattr__(self, "prompts", prompts)
        if not prompts:
            raise complain("prompts", "none", "at least one prompt", "pass --prompt TEXT")
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise complain(f"prompts[{i}]", repr(prompt), "text")
        check_seed(self.seed)

    @property
    def seeds(self) -> list[int]:
        return [self.seed + i for i in range(len(self.prompts))]


@dataclass(frozen=True, eq=False)
class Videos:
    """Videos of one run.

    videos   uint8 [P, frames, height, width, 3]
    records  one StepRecord per step (the time covers all prompts)
    """

    videos: np.ndarray
    records: tuple[StepRecord, ...]
    steps: int
    guidance: float

    @property
    def step_seconds(self) -> np.ndarray:
        """float64 [steps]"""
        return np.array([record.seconds for record in self.records])


@dataclass(frozen=True, eq=False)
class Generated(Videos):
    """And the final latents, float32 [P, C, f, h, w]."""

    latents: np.ndarray


@dataclass(frozen=True, eq=False)
class Model:
    """A model at hand: its adapter, the folder of its weights, and the order of its tokens.

    device  where text encoders and VAE of a diffusers pipeline run, while they are needed
    """

    adapter: Any
    checkpoint: Path
    tiling: Tiling
    device: str = "cpu"
    _encoded: dict[tuple[str, ...], dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, bundle: Bundle, device: str = "cpu") -> Model:
        """The model of a bundle. Raises SvditError when its adapter or checkpoint is not there."""
        adapter = registry.adapter(bundle.manifest.model)
        return cls(adapter, checkpoint_of(adapter, bundle.manifest.checkpoint), bundle.plan.tiling(), device)

    def texts(self, prompts: tuple[str, ...]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What the denoiser takes of prompts, by input name: a row for each, and the row of the empty prompt.

        Text encoders are loaded for this and freed at once, and only the first time that it is asked for.
        """
        if prompts not in self._encoded:
            tokens = self.tiling.geometry.text_tokens
            self._encoded[prompts] = encode(self.adapter, self.checkpoint, [*prompts, ""], tokens, self.device)
        return {name: (rows[:-1], rows[-1:]) for name, rows in self._encoded[prompts].items()}


def prepare(
    runner: Runner, model: Model, request: Request, stage_of: Callable[[int, int], int], *, walk: bool = False
) -> Denoising:
    """A denoising run at its first step: text encoded, noise drawn, scheduler set.

    walk: it is a search's, whose steps stand for equal parts of a run of the model's own number of steps.
    """
    adapter, checkpoint = model.adapter, model.checkpoint
    sampling = adapter.sampling(checkpoint)
    more = model.texts(request.prompts)
    text, uncond = more.pop("encoder_hidden_states")
    steps = sampling.steps if request.steps is None else request.steps
    guidance = sampling.guidance_scale if request.guidance is None else request.guidance
    noise = noise_for(request.seeds, adapter.latent_shape(model.tiling.geometry, checkpoint))
    return Denoising(
        runner,
        sampling.scheduler(),
        noise,
        text,
        uncond,
        steps,
        float(guidance),
        stage_of,
        more=more,
        embedded=sampling.cfg == "input",
        sigmas=sampling.levels(steps, walk=walk),
    )


def finish(run: Denoising, model: Model) -> Generated:
    """Decode the latents of a finished run."""
    assert run.done
    with torch.inference_mode():
        videos = decode(model.adapter, model.checkpoint, run.latents, model.device)
    return Generated(videos, tuple(run.records), int(run.steps), float(run.guidance), run.latents.numpy())


def stages_for(runner: Runner, plan: Plan) -> Callable[[int, int], int]:
    """The plan's stage function, or stage 0 for a runner that has only one (dense attention)."""
    return plan.stage_of if runner.num_stages == len(plan.stages) else dense_stage


def dense_stage(step: int, steps: int) -> int:
    """Stage 0 at every step: for what has only one."""
    return 0


def run_bundle(runner: Runner, bundle: Bundle, request: Request, *, show: bool = True) -> Generated:
    """Make videos with an active runner of a bundle."""
    model = Model.of(bundle, runner.tensor_device or "cpu")
    run = prepare(runner, model, request, stages_for(runner, bundle.plan))
    with torch.inference_mode():
        run_all([run], f"denoising on {runner.name}", show)
    return finish(run, model)


def generate(
    adapter: Any,
    checkpoint: str | Path | None,
    prompts: Sequence[str],
    *,
    plan: Plan | None = None,
    tile: tuple[int, int, int] | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    attention: str = "auto",
    batch: int | None = None,
    show: bool = False,
) -> Generated:
    """Make videos in torch without a bundle: dense attention, or a plan's.

    All prompts advance together; `batch` limits the rows of one denoiser call (two rows a prompt with
    guidance; None: all at once). `attention` is "auto", "op" or "masked" (see `runtime.attention`).
    Without a plan, `tile` (default: the model's) only decides the order of tokens.
    """
    folder = checkpoint_of(adapter, checkpoint)
    if plan is not None:
        adapter.check_geometry(folder, plan.geometry)
    tiling = plan.tiling() if plan is not None else Tiling(adapter.geometry(folder), tile or adapter.default_tile())
    model = Model(adapter, folder, tiling, device)
    request = Request(tuple(prompts), seed, steps, guidance)
    with (
        TorchRunner(
            adapter, folder, tiling, plan, device=device, dtype=dtype, attention=attention, batch=batch
        ) as runner,
        torch.inference_mode(),
    ):
        run = prepare(runner, model, request, dense_stage if plan is None else plan.stage_of)
        run_all([run], f"denoising on {runner.name}", show)
        return finish(run, model)
