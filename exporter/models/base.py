"""The questions every model answers, for the exporter, the runners and the search alike.

Shape letters used below: B batch, N tokens of self-attention, H heads, D head width, C latent channels,
f h w latent frames, rows and columns, L text tokens, E text width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.plans.bundle import TensorSpec
from svdit.plans.errors import complain
from svdit.plans.files import read_json
from svdit.plans.geometry import Geometry

if TYPE_CHECKING:
    import numpy as np
    import torch

    from svdit.exporter.models.video import VideoCoder, VideoSize
    from svdit.plans.tiles import Tiling

    AttentionFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor, torch.Tensor], torch.Tensor]
    """(q, k, v, layer, stage, text_len) -> output; q, k, v and output are [B, N, H, D] in tile order,
    stage is int32 [1] and text_len int32 [B]."""


@dataclass(frozen=True)
class Sampling:
    """How a model is sampled when the user says nothing else."""

    steps: int
    """Denoising steps."""
    guidance_scale: float
    """Classifier-free guidance scale; 1 means no guidance."""
    scheduler: Callable[[], Any]
    """Makes a fresh diffusers scheduler."""
    cfg: str = "batch"
    """"batch": one call on [unconditional, conditional]; "calls": one call each; "input": the scale is an input of the
    model, which then needs no unconditional row."""
    sigmas: Callable[[int], list[float]] | None = None
    """Noise levels for so many steps; None: the scheduler's own."""
    walk_sigmas: Callable[[int], list[float]] | None = None
    """Noise levels of a search in fewer steps than `steps`: those at which equal parts of a whole run begin, since each
    step of the search stands for such a part. None: the levels of a run of so few steps are that."""

    def levels(self, steps: int, *, walk: bool = False) -> list[float] | None:
        """Noise levels for a run, or for a search's walk, in so many steps; None: the scheduler's own."""
        of = self.walk_sigmas if walk and self.walk_sigmas is not None and steps < self.steps else self.sigmas
        return None if of is None else of(steps)


class ModelAdapter(ABC):
    """One model family: where its weights are, what its attention looks like, how it is sampled."""

    name: str
    """What users type after --model, and what plans carry as their model."""
    fixed_geometry: tuple[str, ...] = ("layers", "heads", "head_dim", "text_tokens", "text_position")
    """Fields of a plan's geometry that must be the checkpoint's own; the grid may differ in size."""
    pipeline_class: str | None = None
    """The transformer class whose diffusers pipeline encodes prompts and decodes latents; None: this class does."""

    def packaged_checkpoint(self) -> Path | None:
        """The checkpoint shipped with the package, or None where users bring their own."""
        return None

    @abstractmethod
    def geometry(self, checkpoint: Path) -> Geometry:
        """Attention geometry at the model's reference video size."""

    @abstractmethod
    def default_tile(self) -> tuple[int, int, int]:
        """The tile (tt, th, tw) that plans use unless told otherwise."""

    @abstractmethod
    def latent_shape(self, geometry: Geometry, checkpoint: Path | None = None) -> tuple[int, int, int, int]:
        """(C, f, h, w) of the denoiser's video input for this token grid, batch left out.

        Without a checkpoint: as the published models of this family have it.
        """

    def output_shape(self, geometry: Geometry, checkpoint: Path | None = None) -> tuple[int, int, int, int]:
        """(C, f, h, w) of the prediction; image-to-video models have fewer channels there than in `latent_shape`."""
        return self.latent_shape(geometry, checkpoint)

    @abstractmethod
    def coder(self, checkpoint: Path | None = None) -> VideoCoder:
        """How videos in pixels become tokens; without a checkpoint, as the published models have it."""

    @abstractmethod
    def reference_video(self, checkpoint: Path | None = None) -> VideoSize:
        """The video that `geometry` is for."""

    @abstractmethod
    def geometry_of(self, grid: tuple[int, int, int], checkpoint: Path | None = None) -> Geometry:
        """Attention geometry on this token grid; without a checkpoint, of the published model."""

    def geometry_for(self, size: Sequence[int | None], checkpoint: Path | None = None) -> Geometry:
        """Attention geometry of a video of (frames, height, width) in pixels; None is the reference video's.

        Raises SvditError naming a size that the model cannot have.
        """
        wanted = zip(size, self.reference_video(checkpoint), strict=True)
        grid = self.coder(checkpoint).grid(tuple(own if given is None else given for given, own in wanted))
        return self.geometry_of(grid, checkpoint)

    @abstractmethod
    def text_shape(self, checkpoint: Path) -> tuple[int, int]:
        """(L, E) of the denoiser's text input."""

    def inputs(self, checkpoint: Path, geometry: Geometry, batch: int | str) -> tuple[TensorSpec, ...]:
        """What the denoiser's forward takes, in its order. The first four are every model's; others follow `stage`.

        All but `stage` have `batch` rows: a number, or the name of a free dimension.
        """
        return (
            TensorSpec("hidden_states", "float32", (batch, *self.latent_shape(geometry, checkpoint))),
            TensorSpec("timestep", "float32", (batch,)),
            TensorSpec("encoder_hidden_states", "float32", (batch, *self.text_shape(checkpoint))),
            TensorSpec("stage", "int32", (1,)),
        )

    def denoiser(
        self, checkpoint: Path, tiling: Tiling, attention: AttentionFn, *, dtype: str = "float32", device: str = "cpu"
    ) -> torch.nn.Module:
        """The denoiser with its weights loaded, its self-attention through `attention`.

        Its forward takes what `inputs` lists: hidden_states [B, C, f, h, w], timestep [B], encoder_hidden_states
        [B, L, E], stage int32 [1] and whatever else the model has; it returns the prediction [B, C, f, h, w]. The
        attribute `attention` may be replaced later. Raises SvditError for a checkpoint that is not this model's or
        a tiling that contradicts it.
        """
        import torch

        from svdit.exporter import weights

        traced = self.traced_denoiser(checkpoint, tiling, attention, dtype=dtype)
        module = traced.module
        weights.load(module, traced.parameters, device)
        for name, value in traced.buffers.items():
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner).register_buffer(leaf, torch.from_numpy(value).to(device), persistent=False)
        return module.eval()

    @abstractmethod
    def traced_denoiser(
        self, checkpoint: Path, tiling: Tiling, attention: AttentionFn, *, dtype: str
    ) -> TracedDenoiser:
        """The same module on the meta device, with where each of its values is to be found. No weight is read."""

    @abstractmethod
    def sampling(self, checkpoint: Path) -> Sampling:
        """Steps, guidance and scheduler of this checkpoint."""

    def scheduler(self, checkpoint: Path) -> object:
        """The diffusers scheduler that the pipeline folder names. Raises SvditError when there is none."""
        import diffusers

        path = Path(checkpoint) / "scheduler" / "scheduler_config.json"
        if not path.is_file():
            raise complain(f"checkpoint {checkpoint}", "no scheduler/scheduler_config.json", "a pipeline folder")
        config = read_json(path, "a scheduler's config")
        cls = getattr(diffusers, str(config.get("_class_name")), None)
        if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
            raise complain(f"{path}: $._class_name", config.get("_class_name"), "a scheduler of diffusers")
        return cls.from_config(config)

    def encode_prompts(self, checkpoint: Path, prompts: list[str]) -> torch.Tensor:
        """Text embeddings float32 [B, L, E]; "" is the unconditional prompt. For models without a pipeline."""
        raise complain("prompts", f"a request to encode text for {self.name}", "embeddings made by diffusers' pipeline")

    def decode(self, checkpoint: Path, latents: torch.Tensor) -> np.ndarray:
        """Latents [B, C, f, h, w] to uint8 videos [B, frames, height, width, 3]. For models without a pipeline."""
        raise complain("latents", f"a request to decode video for {self.name}", "diffusers' pipeline and its VAE")

    def texts(self, pipe: Any, prompts: list[str], tokens: int) -> dict[str, torch.Tensor]:
        """What the denoiser takes of prompts, by input name, as the diffusers pipeline `pipe` makes it.

        tokens: text tokens in self-attention, padding included.
        """
        raise NotImplementedError

    def frames(self, pipe: Any, latents: torch.Tensor, checkpoint: Path) -> torch.Tensor:
        """Latents [B, C, f, h, w] to pixels [B, 3, frames, height, width] in [-1, 1] by the VAE of `pipe`."""
        raise NotImplementedError

    def check_geometry(self, checkpoint: Path, geometry: Geometry) -> None:
        """Raise SvditError where a plan's geometry contradicts the checkpoint in one of `fixed_geometry`."""
        own = self.geometry(checkpoint)
        for field in self.fixed_geometry:
            got, expected = getattr(geometry, field), getattr(own, field)
            if got != expected:
                raise complain(
                    f"plan geometry.{field}",
                    got,
                    f"{expected}, as the {self.name} checkpoint {checkpoint} has",
                    "use a plan made for this checkpoint, or give the checkpoint it was made for",
                )


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint where it lies on disk."""

    key: str
    file: Path
    dtype: str
    """safetensors spelling: F32, F16, BF16."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    length: int
    """Bytes."""


@dataclass(frozen=True)
class TracedDenoiser:
    """A denoiser without values, for tracing, and where the values are."""

    module: torch.nn.Module
    """On the meta device."""
    parameters: dict[str, StoredTensor]
    """By parameter name; same bytes, perhaps seen under another shape of equal size."""
    buffers: dict[str, np.ndarray]
    """Constants that are computed, by buffer name."""
