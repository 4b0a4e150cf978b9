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
    model, plan, batch = Model.of(bundle), bundle.plan, bundle.manifest.batch
    sampling: Any = model.adapter.sampling(model.checkpoint)
    scheduler = sampling.scheduler()
    scheduler.set_timesteps(sampling.steps)
    prompt = (plan.provenance.get("prompts") or ["red circle moving right"])[0]
    text = model.adapter.encode_prompts(model.checkpoint, ["", prompt]).float().numpy()
    noise = noise_for([0] * batch, bundle.manifest.latent_shape).numpy()
    stages = [plan.stage_of(step, sampling.steps) for step in range(sampling.steps)]
    for stage in sorted(set(stages)):
        timestep = float(scheduler.timesteps[stages.index(stage)])
        yield {
            "hidden_states": noise,
            "timestep": np.full((batch,), timestep, np.float32),
            "encoder_hidden_states": np.resize(text, (batch, *text.shape[1:])),
            "stage": np.array([stage], np.int32),
        }
