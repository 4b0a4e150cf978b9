"""Parts of a diffusers pipeline's folder: loaded where they are needed, used, and freed."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from svdit.plans.errors import complain
from svdit.plans.fields import shown
from svdit.plans.files import read_json
from svdit.plans.geometry import Geometry
from svdit.runtime.video import to_uint8

PIPELINES = {
    "WanTransformer3DModel": ("WanPipeline", "WanImageToVideoPipeline"),
    "CogVideoXTransformer3DModel": ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"),
    "HunyuanVideoTransformer3DModel": ("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
}
"""Pipelines that call a transformer class, text-to-video first."""
INDEX = "model_index.json"
TEXT = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
"""Components that only encode prompts."""


def pipeline_name(folder: Path, names: Sequence[str], of: str) -> str:
    """The class of the pipeline in `folder`, one of `names`; `of` says whose pipelines these are.

    Raises SvditError for a folder that holds another one or none.
    """
    if not (folder / INDEX).is_file():
        got = f"no {INDEX}" if folder.is_dir() else "no such folder"
        raise complain(f"pipeline {folder}", got, "a folder that a diffusers pipeline was saved or downloaded to")
    name = read_json(folder / INDEX, "a pipeline's list of components").get("_class_name")
    if name not in names:
        raise complain(f"{folder / INDEX}: $._class_name", shown(name), f"{' or '.join(names)}, for {of}")
    return str(name)


def load_pipeline(folder: Path, device: str, without: Sequence[str] = ()) -> diffusers.DiffusionPipeline:
    """The pipeline of a folder on `device`, some components left out. Raises SvditError for one that is broken.

    On a GPU everything but the VAE is bfloat16, on a CPU float32.
    """
    index = read_json(folder / INDEX, "a pipeline's list of components")
    kinds = {"default": torch.bfloat16, "vae": torch.float32} if torch.device(device).type == "cuda" else torch.float32
    try:
        # NOTE the class itself, since DiffusionPipeline would load components that the class may do without.
        absent = {name: None for name in without if name in index or name == "transformer"}
        made = getattr(diffusers, index["_class_name"])
        pipe = made.from_pretrained(folder, torch_dtype=kinds, local_files_only=True, **absent)
    except Exception as error:  # diffusers, transformers and safetensors have no common class
        first = (str(error) or type(error).__name__).splitlines()[0]
        hint = f"only {' and '.join(without)} may be missing" if without else ""
        raise complain(f"pipeline {folder}", first, "a complete pipeline", hint) from error
    if hasattr(pipe.vae, "enable_tiling"):
        pipe.vae.enable_tiling()
    return pipe.to(device)


def call_options(pipe: Any, adapter: Any, geometry: Geometry, checkpoint: Path | None) -> dict[str, int]:
    """Arguments of a pipeline's call for the video and the text tokens of `geometry`."""
    size = adapter.coder(checkpoint).video(geometry.grid)
    options = {"num_frames": size.frames, "height": size.height, "width": size.width}
    # where images add to the text tokens the pipeline decides their number
    if geometry.text_tokens and type(pipe).__name__ != "HunyuanVideoImageToVideoPipeline":
        options["max_sequence_length"] = geometry.text_tokens
    return options


def encode(adapter: Any, checkpoint: Path, prompts: Sequence[str], tokens: int, device: str) -> dict[str, torch.Tensor]:
    """What the denoiser takes of prompts, by input name, a row each, on the CPU; "" is the unconditional prompt.

    Models without a text encoder of their own get that of the pipeline in `checkpoint`, which is on `device` meanwhile.
    tokens: text tokens in self-attention. Raises SvditError for a checkpoint that is no text-to-video pipeline.
    """
    if adapter.pipeline_class is None:
        return {"encoder_hidden_states": adapter.encode_prompts(checkpoint, list(prompts)).float().cpu()}
    with _part(adapter, checkpoint, device, ("transformer", "vae")) as pipe, torch.inference_mode():
        found = adapter.texts(pipe, list(prompts), tokens)
        return {name: (x.float() if x.is_floating_point() else x).cpu() for name, x in found.items()}


def decode(adapter: Any, checkpoint: Path, latents: torch.Tensor, device: str) -> np.ndarray:
    """Latents [B, C, f, h, w] to uint8 videos [B, frames, height, width, 3], by the VAE of the pipeline.

    Models whose latents are pixels need none.
    """
    if adapter.pipeline_class is None:
        return np.asarray(adapter.decode(checkpoint, latents))
    with _part(adapter, checkpoint, device, ("transformer", *TEXT)) as pipe, torch.inference_mode():
        frames = [adapter.frames(pipe, row.to(device)[None], checkpoint) for row in latents]
        videos = pipe.video_processor.postprocess_video(torch.cat(frames), output_type="np")
    return np.stack([to_uint8(video) for video in videos])


@contextmanager
def _part(adapter: Any, checkpoint: Path, device: str, without: Sequence[str]) -> Iterator[Any]:
    name, image = PIPELINES[adapter.pipeline_class]
    if pipeline_name(checkpoint, (name, image), adapter.name) == image:
        raise complain(f"checkpoint {checkpoint}", image, name, "image-to-video runs with svdit-run --pipeline only")
    pipe = load_pipeline(checkpoint, device, without)
    try:
        yield pipe
    finally:
        del pipe
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
