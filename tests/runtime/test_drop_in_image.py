"""Bundles of image-to-video models in diffusers' image-to-video pipelines, beside the plan in the same pipelines."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from svdit.exporter.export import export
from svdit.plans.geometry import Geometry
from svdit.runtime.drop_in import load
from svdit.runtime.sparsify import sparsify
from tests.exporter.checkpoints import WAN, WAN_I2V, reference_model
from tests.exporter.models.hunyuan import checkpoints as hunyuan
from tests.runtime.pipelines import BUILDERS
from tests.runtime.test_sparsify import CASES, Case, HunyuanVideoCase, normal, two_stages
from tests.tolerance import rel_l2

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 112, 3), dtype=np.uint8))


class WanImageCase(Case):
    model, batch = "wan2.1", 1
    geometry = Geometry((3, 5, 7), 0, "none", 2, 3, 64)

    def __init__(self) -> None:
        base = CASES["wan"]()
        self.pipe = diffusers.WanImageToVideoPipeline(
            tokenizer=None, text_encoder=None, vae=BUILDERS["wan"](base).vae, scheduler=base.pipe.scheduler,
            transformer=reference_model({**WAN, **WAN_I2V}),
        )
        self.pipe.encode_image = lambda image, device=None: normal(1, 257, 20)
        self.inputs = {
            "image": IMAGE, "guidance_scale": 3.0,
            "prompt_embeds": normal(1, 512, 48), "negative_prompt_embeds": normal(1, 512, 48, seed=6),
        }


class CogVideoXImageCase(Case):
    model, batch = "cogvideox1.5", 2
    frames = 17
    geometry = Geometry((3, 5, 7), 7, "before", 2, 3, 64)

    def __init__(self) -> None:
        base = CASES["cogvideox"]()
        own = {name: value for name, value in base.pipe.transformer.config.items() if not name.startswith("_")}
        torch.manual_seed(0)
        model = diffusers.CogVideoXTransformer3DModel(**{**own, "in_channels": 8, "ofs_embed_dim": 24}).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.15)
        self.pipe = diffusers.CogVideoXImageToVideoPipeline(
            tokenizer=None, text_encoder=None, vae=BUILDERS["cogvideox"](base).vae, transformer=model,
            scheduler=base.pipe.scheduler,
        )
        self.inputs = {
            "image": IMAGE, "prompt_embeds": normal(1, 7, 40), "negative_prompt_embeds": normal(1, 7, 40, seed=6)
        }


class HunyuanVideoImageCase(Case):
    model, batch = "hunyuan", 1
    geometry = hunyuan.geometry()

    def __init__(self, changes: dict) -> None:
        base = HunyuanVideoCase()
        parts = BUILDERS["hunyuan"](base)
        self.pipe = diffusers.HunyuanVideoImageToVideoPipeline(
            text_encoder=None, tokenizer=None, transformer=hunyuan.reference_model(**changes), vae=parts.vae,
            scheduler=base.pipe.scheduler, text_encoder_2=None, tokenizer_2=None, image_processor=None,
        )
        self.inputs = {**{name: x[:1] for name, x in base.inputs.items()}, "image": IMAGE}


MADE = {
    "wan": WanImageCase,
    "cogvideox": CogVideoXImageCase,
    "hunyuan-replace": lambda: HunyuanVideoImageCase({"image_condition_type": "token_replace"}),
    "hunyuan-concat": lambda: HunyuanVideoImageCase(
        {"image_condition_type": "latent_concat", "in_channels": 9, "guidance_embeds": False}
    ),
}


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_bundle_runs_in_its_image_to_video_pipeline(name, tmp_path):
    torch.manual_seed(0)
    case = MADE[name]()
    case.pipe.set_progress_bar_config(disable=True)
    case.pipe.transformer.save_pretrained(tmp_path / "checkpoint")
    plan = replace(two_stages(case.geometry), model=case.model)
    export(
        case.model, plan, tmp_path / "b", checkpoint=tmp_path / "checkpoint", variant="portable", batch=case.batch
    )
    dense = case.run()
    with sparsify(case.pipe, plan):
        truth = case.run()
    assert rel_l2(dense, truth) > 1e-3
    for backend in ("onnxrt", "torch"):
        with load(tmp_path / "b", scheduler=case.pipe.scheduler, backend=backend, threads=1) as transformer:
            case.pipe.transformer = transformer
            assert rel_l2(case.run(), truth) <= 1e-5
            assert transformer.stage == 1
