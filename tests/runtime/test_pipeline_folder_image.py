"""`svdit-run --pipeline --image` on small random image-to-video pipelines, beside the same pipelines with the plan."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import diffusers
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from svdit.exporter.export import export
from svdit.plans import registry
from svdit.plans.bundle import read_bundle
from svdit.runtime import cli
from svdit.runtime.pipeline import Request
from svdit.runtime.pipeline_folder import Wish, run_folder
from svdit.runtime.sparsify import sparsify
from tests.runtime.pipelines import BUILDERS
from tests.runtime.test_drop_in_image import IMAGE, MADE
from tests.runtime.test_sparsify import CASES, two_stages

PROMPT = "a red cat on a boat"
CONDITION_FRAMES = 4
"""Frames at the beginning that diffusers' pipeline cuts off in a latent_concat model."""


def save_cogvideox(folder: Path):
    case, text = MADE["cogvideox"](), BUILDERS["cogvideox"](CASES["cogvideox"]())
    case.pipe.register_modules(tokenizer=text.tokenizer, text_encoder=text.text_encoder)
    case.pipe.save_pretrained(folder)
    return case


def save_wan(folder: Path):
    """With a CLIP encoder that makes 257 tokens of width 20."""
    case, text = MADE["wan"](), BUILDERS["wan"](CASES["wan"]())
    config = transformers.CLIPVisionConfig(
        hidden_size=20, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14
    )
    pipe = diffusers.WanImageToVideoPipeline(
        tokenizer=text.tokenizer, text_encoder=text.text_encoder, vae=case.pipe.vae, scheduler=case.pipe.scheduler,
        transformer=case.pipe.transformer, image_encoder=transformers.CLIPVisionModel(config),
        image_processor=transformers.CLIPImageProcessor(),
    )
    pipe.save_pretrained(folder)
    return case


def words_and_marks() -> transformers.PreTrainedTokenizerFast:
    """A token a word, a mark, a space, two line feeds, and a header mark: the image is token 5 as with Llama's."""
    marks = ["<bos>", "<image>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", *marks, *PROMPT.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(marks)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|\w+|\s|[^\w\s]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def save_hunyuan(folder: Path, condition: str):
    """With a LLaVA encoder that makes 576 tokens of an image."""
    case, text = MADE[f"hunyuan-{condition}"](), BUILDERS["hunyuan"](CASES["hunyuan"]())
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=336
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text.text_encoder.config, image_token_index=3, projector_hidden_act="gelu",
        pad_token_id=0,
    )
    pipe = diffusers.HunyuanVideoImageToVideoPipeline(
        text_encoder=transformers.LlavaForConditionalGeneration(config), tokenizer=words_and_marks(),
        transformer=case.pipe.transformer, vae=case.pipe.vae, scheduler=case.pipe.scheduler,
        text_encoder_2=text.text_encoder_2, tokenizer_2=text.tokenizer_2,
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336),
    )
    pipe.save_pretrained(folder)
    tokens = registry.adapter("hunyuan").geometry(folder).text_tokens
    case.geometry = replace(case.geometry, text_tokens=tokens)
    return case


class Made:
    """A pipeline folder, its first frame, and a bundle of its transformer."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.name = name
        self.pipeline, self.bundle, self.image = folder / "pipeline", folder / "bundle", folder / "first.png"
        self.case = SAVE[name](self.pipeline)
        IMAGE.save(self.image)
        self.plan = replace(two_stages(self.case.geometry), model=self.case.model)
        export(self.plan.model, self.plan, self.bundle, checkpoint=self.pipeline, variant="portable", batch="1-2")


SAVE = {
    "cogvideox": save_cogvideox,
    "hunyuan-concat": partial(save_hunyuan, condition="concat"),
    "hunyuan-replace": partial(save_hunyuan, condition="replace"),
    "wan": save_wan,
}


@pytest.fixture(scope="module", params=sorted(SAVE))
def made(request, tmp_path_factory):
    return Made(request.param, tmp_path_factory.mktemp(request.param))


def test_the_video_is_the_one_of_the_pipeline_with_the_plan(made):
    request, case = Request((PROMPT,), seed=4, steps=3), made.case
    _, found = run_folder(read_bundle(made.bundle), made.pipeline, request, Wish(made.image), threads=1, show=False)
    pipe = diffusers.DiffusionPipeline.from_pretrained(made.pipeline, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    tokens = case.geometry.text_tokens if made.plan.model == "cogvideox1.5" else 0
    with sparsify(pipe, made.plan):
        truth = pipe(
            image=IMAGE, prompt=PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(4),
            output_type="np", num_frames=case.frames, height=case.height, width=case.width,
            **({"max_sequence_length": tokens} if tokens else {}),
        ).frames[0]
    assert np.abs(found.videos[0] / 255 - truth).max() <= 1 / 255
    assert [record.stage for record in found.records] == [0, 0, 1]


def test_the_command(made, tmp_path):
    command = [made.bundle, "--pipeline", made.pipeline, "--prompt", PROMPT, "--steps", 1, "-o", tmp_path / "v.mp4"]
    done = CliRunner().invoke(cli.run, [str(part) for part in (*command, "--image", made.image)])
    assert done.exit_code == 0, done.output
    conditions = CONDITION_FRAMES if made.name == "hunyuan-concat" else 0
    assert sum(1 for _ in imageio.get_reader(tmp_path / "v.mp4")) == made.case.frames - conditions
    done = CliRunner().invoke(cli.run, [str(part) for part in command])
    assert done.exit_code == 2 and "--image: got none; expected an image file" in done.output
