"""A bundle as the `transformer` of a diffusers pipeline.

    from svdit.runtime.drop_in import load

    with load("DIR", scheduler=pipe.scheduler) as transformer:
        pipe.transformer = transformer
        video = pipe(prompt).frames
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from svdit.plans import registry
from svdit.plans.batch import Batch
from svdit.plans.bundle import Bundle, read_bundle
from svdit.plans.errors import complain, rooted
from svdit.plans.files import parse_json, read_text
from svdit.runtime.runner import Runner, make_runner
from svdit.runtime.sparsify import step_of
from svdit.runtime.torch_runner import DTYPE_OF, checkpoint_of

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

CLASSES = ("WanTransformer3DModel", "CogVideoXTransformer3DModel", "HunyuanVideoTransformer3DModel")
FRAMES_FIRST = "CogVideoXTransformer3DModel"
"""Takes and gives [B, f, C, h, w]; bundles have [B, C, f, h, w]."""
IMPLIED = ("return_dict", "image_rotary_emb")
"""Arguments that the graphs need not be given: CogVideoX's angles follow from the size of the video."""


def load(
    folder: str | Path,
    *,
    scheduler: Any = None,
    backend: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
) -> BundleTransformer:
    """The bundle in `folder`, loaded, as an object that a diffusers pipeline takes as its transformer.

    The config is that of the checkpoint the bundle was made from. `scheduler` is the pipeline's: its `timesteps`
    say which step a call belongs to. WanPipeline tells the step itself, so there it may be left out.
    `backend`, `device`, `threads` as in `make_runner`. Raises SvditError for a folder that is no bundle, or whose
    checkpoint is gone.
    """
    bundle = read_bundle(folder)
    config = config_of(bundle)
    runner = make_runner(bundle, backend, device=device, threads=threads)
    transformer = BundleTransformer(bundle, runner, config, scheduler)
    runner.activate()
    return transformer


class BundleTransformer(torch.nn.Module):
    """Calls a runner with what a pipeline passes to its transformer; the runner is freed by `close()`.

    `device` is only where the pipeline wants tensors: it follows `.to()`, and the runner stays where it is.
    """

    def __init__(self, bundle: Bundle, runner: Runner, config: FrozenDict, scheduler: Any) -> None:
        super().__init__()
        self.bundle, self.runner, self.config, self.scheduler = bundle, runner, config, scheduler
        self.dtype = getattr(torch, DTYPE_OF[bundle.manifest.precision])
        self.step: int | None = None
        self.stage = 0
        self._seconds = 0.0
        self._told: tuple[int, int] | None = None
        self._signature = inspect.signature(getattr(diffusers, config["_class_name"]).forward)
        # NOTE a parameter, since accelerate's offloading takes the device of a module's first one.
        self._place = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    @property
    def device(self) -> torch.device:
        return self._place.device

    def take_seconds(self) -> float:
        """Time of the calls since this was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """Free graphs or weights."""
        self.runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def cache_context(
        self, name: str, step_index: int | None = None, num_inference_steps: int | None = None, **rest: Any
    ) -> Iterator[None]:
        """What pipelines of diffusers put around a call; some say the step here."""
        self._told = None if step_index is None or num_inference_steps is None else (step_index, num_inference_steps)
        try:
            yield
        finally:
            self._told = None

    def forward(self, *args: Any, **kwargs: Any) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Arguments and result of the diffusers class of this model. Raises SvditError for what the bundle cannot take.

        More rows than the bundle's batch are evaluated in several calls.
        """
        given = {k: v for k, v in self._signature.bind(self, *args, **kwargs).arguments.items() if k != "self"}
        latents = given["hidden_states"]
        feed = self._feed(given)
        self.stage = self._stage(given["timestep"])
        calls = (self.runner.batch or Batch(1, latents.shape[0])).cut(latents.shape[0])
        self.runner.check_rows(calls[-1].stop - calls[-1].start)
        began = time.perf_counter()
        parts = [self._call({name: x[rows] for name, x in feed.items()}) for rows in calls]
        out = torch.cat(parts)
        self._seconds += time.perf_counter() - began
        if self._frames_first:
            out = out.transpose(1, 2)
        out = out.to(latents.device, latents.dtype)
        return Transformer2DModelOutput(sample=out) if given.get("return_dict", True) else (out,)

    @property
    def _frames_first(self) -> bool:
        return self.config["_class_name"] == FRAMES_FIRST

    def _call(self, feed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        device = self.runner.tensor_device
        if device is None:
            arrays = {name: np.ascontiguousarray(x.cpu().numpy()) for name, x in feed.items()}
            return torch.from_numpy(self.runner.infer(arrays, self.stage)["noise_pred"])
        tensors = {name: x.to(device).contiguous() for name, x in feed.items()}
        out = self.runner.infer_tensors(tensors, self.stage)["noise_pred"]
        return out.to(torch.float32, copy=True)  # the runner may give its next result in the same memory

    def _feed(self, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        specs = {spec.name: spec for spec in self.runner.inputs}
        extra = [name for name, x in given.items() if name not in (*specs, *IMPLIED) and x is not None and x != {}]
        missing = [name for name in specs if given.get(name) is None]
        if extra or missing:
            parts = [f"{word} {', '.join(names)}" for word, names in (("with", extra), ("without", missing)) if names]
            hint = "this bundle, or its backend, has no such form of the model"
            raise complain(f"{self.runner.name}: inputs", " and ".join(parts), f"exactly {', '.join(specs)}", hint)
        feed = {}
        for name, spec in specs.items():
            x = given[name].detach()
            if x.shape[0] == 1:  # some pipelines leave what is the same for every row at one
                x = x.expand(given["hidden_states"].shape[0], *x.shape[1:])
            if name == "hidden_states" and self._frames_first:
                x = x.transpose(1, 2)
            if len(x.shape) != len(spec.shape) or any(n != m for n, m in zip(x.shape[1:], spec.shape[1:], strict=True)):
                raise complain(f"{self.runner.name}: {name} shape", str(tuple(x.shape)), str(spec.shape))
            feed[name] = x.to(getattr(torch, spec.dtype))
        return feed

    def _stage(self, timestep: Any) -> int:
        stages = len(self.bundle.plan.stages)
        if self.bundle.manifest.variant == "dense" or stages == 1:
            return 0
        if self._told is not None:
            self.step, steps = self._told
        elif self.scheduler is not None:
            timesteps = self.scheduler.timesteps
            self.step, steps = step_of(timestep, timesteps, getattr(self.scheduler, "step_index", None)), len(timesteps)
        else:
            hint = "use load(DIR, scheduler=pipe.scheduler)"
            raise complain("scheduler", "none", f"one, for a plan of {stages} stages", hint)
        return self.bundle.plan.stage_of(self.step, steps)


def config_of(bundle: Bundle) -> FrozenDict:
    """The transformer's config in the bundle's checkpoint, what it leaves out filled in by diffusers' defaults."""
    model = bundle.manifest.model
    checkpoint = checkpoint_of(registry.adapter(model), bundle.manifest.checkpoint)
    paths = [path for path in (checkpoint / "transformer/config.json", checkpoint / "config.json") if path.is_file()]
    if not paths:
        raise complain(f"checkpoint {checkpoint}", "no transformer/config.json", "a folder in diffusers' layout")
    text = read_text(paths[0], "a transformer's config")
    with rooted(f"{paths[0]}: "):
        given = parse_json(text, "$")
    name = given.get("_class_name") if isinstance(given, dict) else None
    if name not in CLASSES:
        raise complain(f"{paths[0]}: $._class_name", repr(name), "one of " + ", ".join(CLASSES))
    signature = inspect.signature(getattr(diffusers, name).__init__)
    defaults = {k: p.default for k, p in signature.parameters.items() if p.default is not inspect.Parameter.empty}
    return FrozenDict({**defaults, **given})
