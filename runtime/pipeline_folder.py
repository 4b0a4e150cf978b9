"""A diffusers pipeline from a folder, run with a bundle in the place of its transformer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from svdit.runtime.pipeline_parts import INDEX, PIPELINES, call_options, load_pipeline, pipeline_name
from svdit.runtime.progress import progress
from svdit.runtime.runner import Runner
from svdit.runtime.torch_runner import check_device, checkpoint_of
from svdit.runtime.video import to_uint8


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
    adapter = registry.adapter(bundle.manifest.model)
    has_config = (Path(pipeline_dir) / "transformer" / "config.json").is_file()
    checkpoint = Path(pipeline_dir) if has_config else checkpoint_of(adapter, bundle.manifest.checkpoint)
    _check_size(adapter, checkpoint, bundle, wish)
    image = _image(wish)
    pipe = load_pipeline(Path(pipeline_dir), device, without=("transformer",))
    with load(bundle.path, scheduler=pipe.scheduler, backend=backend, device=device, threads=threads) as transformer:
        pipe.transformer = transformer.to(device)
        options = {**call_options(pipe, adapter, bundle.manifest.geometry, checkpoint), **image}
        return transformer.runner, run_pipeline(pipe, transformer, request, options, show=show)


def check_folder(folder: Path, bundle: Bundle, wish: Wish) -> None:
    """Raise SvditError unless `folder` holds a pipeline for the transformer that `bundle` was made from."""
    config = config_of(bundle)
    names = PIPELINES[config["_class_name"]]
    name = pipeline_name(folder, names, f"a bundle of {bundle.manifest.model}")
    index = read_json(folder / INDEX, "a pipeline's list of components")
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


def _check_size(adapter: Any, checkpoint: Path, bundle: Bundle, wish: Wish) -> None:
    """Raise SvditError where another size than the bundle's is wished."""
    size = adapter.coder(checkpoint).video(bundle.manifest.geometry.grid)
    for name, own in zip(("frames", "height", "width"), size, strict=True):
        wished = getattr(wish, name)
        if wished is not None and wished != own:
            hint = f"leave it out, or export a bundle with --{name} {wished} and a plan for that size"
            raise complain(f"--{name}", wished, f"{own}: {bundle.path} is for {size}", hint)


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
