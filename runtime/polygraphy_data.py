"""A data-loader script for Polygraphy: denoiser inputs as the loop makes them, one set for each stage of a plan.

    SVDIT_BUNDLE=DIR polygraphy run DIR/dit.onnx ... --data-loader-script runtime/polygraphy_data.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from svdit.plans.bundle import read_bundle
from svdit.plans.errors import complain
from svdit.runtime.denoise import noise_for
from svdit.runtime.pipeline import Model

VARIABLE = "SVDIT_BUNDLE"
"""Environment variable with the bundle's folder."""


def load_data() -> Iterator[dict[str, np.ndarray]]:
    """Noise of seed 0, the timestep of the stage's first step, and the empty prompt beside the plan's first one."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise complain(VARIABLE, "nothing", "the folder of a bundle", f"{VARIABLE}=DIR polygraphy run DIR/dit.onnx ...")
    bundle = read_bundle(folder)
    model, plan, batch = Model.of(bundle), bundle.plan, bundle.manifest.batch.most
    sampling: Any = model.adapter.sampling(model.checkpoint)
    scheduler, levels = sampling.scheduler(), {}
    if sampling.sigmas is not None:
        levels = {"sigmas": sampling.sigmas(sampling.steps)}
    scheduler.set_timesteps(**(levels or {"num_inference_steps": sampling.steps}))
    prompt = (plan.provenance.get("prompts") or ["red circle moving right"])[0]
    rows = {name: np.concatenate([empty, given]) for name, (given, empty) in model.texts((prompt,)).items()}
    inputs = {
        "hidden_states": noise_for([0] * batch, bundle.manifest.latent_shape).numpy(),
        "guidance": np.full((batch,), 1000 * sampling.guidance_scale, np.float32),
        **{name: np.resize(array, (batch, *array.shape[1:])) for name, array in rows.items()},
    }
    stages = [plan.stage_of(step, sampling.steps) for step in range(sampling.steps)]
    for stage in sorted(set(stages)):
        timestep = float(scheduler.timesteps[stages.index(stage)])
        now = {**inputs, "timestep": np.full((batch,), timestep, np.float32)}
        taken = [spec.name for spec in bundle.manifest.inputs if spec.name != "stage"]
        yield {**{name: now[name] for name in taken}, "stage": np.array([stage], np.int32)}
