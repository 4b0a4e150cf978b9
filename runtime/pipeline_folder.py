"""A diffusers pipeline from a folder, run with a bundle in the place of its transformer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from svdit.plans import registry
from svdit.plans.bundle import Bundle
from svdit.plans.errors import complain
from svdit.plans.fields import shown
from svdit.plans.files import read_json
from svdit.runtime.denoise import StepRecord
from svdit.runtime.drop_in import BundleTransformer, config_of, load
from svdit.runtime.pipeline import Request, Videos
from svdit.runtime.progress import progress
from svdit.runtime.runner import Runner
from svdit.runtime.torch_runner import check_device, checkpoint_of
from svdit.runtime.video import to_uint8

PIPELINES = {
    "WanTransformer3DModel": ("WanPipeline", "WanImageToVideoPipeline"),
    "CogVideoXTransformer3DModel": ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"),
    "HunyuanVideoTransformer3DModel": ("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
}
"""Pipelines that call a transformer class, text-to-video first."""
INDEX = "model_index.json"


@dataclass(frozen=True)
class Wish:
    """What is asked of a pipeline besides prompts; sizes left out are the bundle's."""

    image: Path | None = None
    """First frame, for image-to-video."""
    frames: int | None = None
    height: int | None = None
    width: int | None = None


def run_folder(
    bundle: Bundle,
    pipeline_dir: str | Path,
    request: Request,
    wish: Wish | None = None,
    *,
    backend: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    show: bool = True,
) -> tuple[Runner, Videos]:
    """Make videos with the pipeline in `pipeline_dir`; `bundle` evaluates its transformer.

    Scheduler, text encoders, VAE and guidance are the pipeline's; its transformer's weights are not read. On a GPU
    everything but the VAE is bfloat16. Returns what ran the bundle, closed, and the videos. Raises SvditError, before
    anything large is loaded, for a folder that is no pipeline or one of another model, and for sizes that are not the
    bundle's.
    """
    wish = Wish() if wish is None else wish
    check_device(device)
    check_folder(Path(pipeline_dir), bundle, wish)
    size = _size(Path(pipeline_dir), bundle, wish)
    image = _image(wish)
    pipe = load_pipeline(Path(pipeline_dir), device)
    with load(bundle.path, scheduler=pipe.scheduler, backend=backend, device=device, threads=threads) as transformer:
        pipe.transformer = transformer.to(device)
        options = {**size, **_text_tokens(pipe, bundle), **image}
        return transformer.runner, run_pipeline(pipe, transformer, request, options, show=show)


def check_folder(folder: Path, bundle: Bundle, wish: Wish) -> None:
    """Raise SvditError unless `folder` holds a pipeline for the transformer that `bundle` was made from."""
    if not (folder / INDEX).is_file():
        got = f"no {INDEX}" if folder.is_dir() else "no such folder"
        raise complain(f"pipeline {folder}", got, "a folder that a diffusers pipeline was saved or downloaded to")
    config = config_of(bundle)
    names = PIPELINES[config["_class_name"]]
    index = read_json(folder / INDEX, "a pipeline's list of components")
    name = index.get("_class_name")
    if name not in names:
        expected = f"{' or '.join(names)}, for a bundle of {bundle.manifest.model}"
        raise complain(f"{folder / INDEX}: $._class_name", shown(name), expected)
    if (index.get("transformer_2") or [None])[0] is not None:
        raise complain(f"{folder / INDEX}: $.transformer_2", shown(index["transformer_2"]), "none", "Wan 2.1 has one")
    takes_image = name == names[1]
    if takes_image != (wish.image is not None):
        raise complain("--image", wish.image or "none", "an image file" if takes_image else f"none: {name} takes none")
    path = folder / "transformer" / "config.json"
    if path.is_file():
        own = read_json(path, "a transformer's config")
        for key, expected in config.items():
            if not key.startswith("_") and key in own and _plain(own[key]) != _plain(expected):
                hint = "the bundle was made from another checkpoint of this model: use that one's pipeline"
                raise complain(f"{path}: $.{key}", shown(own[key]), f"{shown(expected)}, as in {bundle.path}", hint)


def load_pipeline(folder: Path, device: str, *, transformer: bool = False) -> diffusers.DiffusionPipeline:
    """The pipeline of a folder on `device`, with or without its transformer. Raises SvditError for one that is broken.

    On a GPU everything but the VAE is bfloat16, on a CPU float32.
    """
    name = read_json(folder / INDEX, "a pipeline's list of components")["_class_name"]
    kinds = {"default": torch.bfloat16, "vae": torch.float32} if torch.device(device).type == "cuda" else torch.float32
    try:
        # NOTE the class itself, since DiffusionPipeline would load a transformer that the class may do without.
        without = {} if transformer else {"transformer": None}
        pipe = getattr(diffusers, name).from_pretrained(folder, torch_dtype=kinds, local_files_only=True, **without)
    except Exception as error:  # diffusers, transformers and safetensors have no common class
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise complain(
            f"pipeline {folder}",
            first,
            "a complete pipeline",
            "" if transformer else "only the transformer may be missing",
        ) from error
    if hasattr(pipe.vae, "enable_tiling"):
        pipe.vae.enable_tiling()
    return pipe.to(device)


def run_pipeline(
    pipe: Any, transformer: BundleTransformer, request: Request, options: Mapping[str, Any], *, show: bool = True
) -> Videos:
    """Videos of a pipeline whose transformer is `transformer`; `options` are further arguments of its call.

    A step's time is that of its transformer calls; with several prompts, of the calls of all.
    """
    defaults = {name: p.default for name, p in inspect.signature(pipe.__call__).parameters.items()}
    steps = defaults["num_inference_steps"] if request.steps is None else request.steps
    guidance = defaults["guidance_scale"] if request.guidance is None else request.guidance
    pipe.set_progress_bar_config(disable=not show)
    records = [StepRecord(step, 0, 0.0) for step in range(steps)]

    def note(_: Any, step: int, timestep: Any, tensors: dict) -> dict:
        records[step].stage = transformer.stage
        records[step].seconds += transformer.take_seconds()
        return tensors

    videos = []
    for prompt, seed in progress(list(zip(request.prompts, request.seeds, strict=True)), "videos", "video", show=show):
        found = pipe(
            prompt=prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            callback_on_step_end=note,
            **options,
        ).frames[0]
        videos.append(to_uint8(found))
    return Videos(np.stack(videos), tuple(records), steps, float(guidance))


def _size(folder: Path, bundle: Bundle, wish: Wish) -> dict[str, int]:
    """The pipeline's arguments for the size of the bundle. Raises SvditError where another one is wished."""
    adapter = registry.adapter(bundle.manifest.model)
    has_config = (folder / "transformer" / "config.json").is_file()
    coder = adapter.coder(folder if has_config else checkpoint_of(adapter, bundle.manifest.checkpoint))
    size = coder.video(bundle.manifest.geometry.grid)
    for name, own in zip(("frames", "height", "width"), size, strict=True):
        wished = getattr(wish, name)
        if wished is not None and wished != own:
            hint = f"leave it out, or export a bundle with --{name} {wished} and a plan for that size"
            raise complain(f"--{name}", wished, f"{own}: {bundle.path} is for {size}", hint)
    return {"num_frames": size.frames, "height": size.height, "width": size.width}


def _text_tokens(pipe: Any, bundle: Bundle) -> dict[str, int]:
    """As many text tokens as the bundle has in self-attention; where images add to them the pipeline decides."""
    tokens = bundle.manifest.geometry.text_tokens
    if tokens and type(pipe).__name__ != "HunyuanVideoImageToVideoPipeline":
        return {"max_sequence_length": tokens}
    return {}


def _image(wish: Wish) -> dict[str, Any]:
    if wish.image is None:
        return {}
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(wish.image) as image:
            return {"image": image.convert("RGB")}
    except (OSError, UnidentifiedImageError) as error:
        raise complain(f"--image {wish.image}", str(error), "an image file") from None


def _plain(value: object) -> object:
    """Tuples and lists alike."""
    return list(value) if isinstance(value, (tuple, list)) else value
