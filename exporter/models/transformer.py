"""What the adapters of diffusers' transformers share; a model's own adapter says only what differs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.exporter import weights
from svdit.exporter.models.base import ModelAdapter, TracedDenoiser
from svdit.exporter.models.config import TransformerConfig
from svdit.exporter.models.video import VideoCoder, VideoSize
from svdit.plans.errors import rooted
from svdit.plans.fields import integer
from svdit.plans.files import read_json
from svdit.plans.geometry import Geometry

if TYPE_CHECKING:
    import numpy as np
    import torch

    from svdit.exporter.models.base import AttentionFn
    from svdit.plans.tiles import Tiling


@dataclass(frozen=True)
class Parts:
    """The torch side of a model."""

    denoiser: Callable[..., torch.nn.Module]
    """(config, tiling, attention, compute dtype) -> module."""
    constants: Callable[[Any, Tiling], dict[str, np.ndarray]]
    """(config, tiling) -> values of the module's buffers by name."""
    stored_shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    """config -> shapes of those tensors that the checkpoint stores in another shape, by parameter name."""
    keeps_float32: Callable[[str], bool] = lambda name: False
    """Whether the parameter of this name stays float32 in half precision."""


class TransformerAdapter(ModelAdapter):
    """A diffusers pipeline folder, or its transformer folder alone."""

    published: TransformerConfig
    """Sizes to go by when there is no checkpoint at hand."""
    tile: tuple[int, int, int]
    latent: tuple[int, int, int]
    """Latent (f, h, w) of the reference video."""
    factors = (4, 8, 8)
    """Frames, rows and columns of pixels of one latent in the published VAE."""
    vae_keys: tuple[str, str]
    """Keys of those factors, in time and in space, in the VAE's config.json."""
    pads_frames = False
    """Whether the pipeline fills up latent frames that do not fill a patch."""

    @property
    def pipeline_class(self) -> str | None:
        return self.published.class_name

    @abstractmethod
    def parts(self) -> Parts:
        """The torch side of the model; its modules are imported here."""

    def config(self, checkpoint: Path) -> Any:
        path = weights.component_folder(checkpoint, "transformer") / "config.json"
        return type(self.published).from_json(read_json(path, "a transformer's config"), path)

    def reference_latent(self, checkpoint: Path) -> tuple[int, int, int]:
        """Latent (f, h, w) that `geometry` is for."""
        return self.latent

    def geometry(self, checkpoint: Path) -> Geometry:
        return self.config(checkpoint).geometry(self.reference_latent(checkpoint))

    def reference_video(self, checkpoint: Path | None = None) -> VideoSize:
        config: Any = self.published if checkpoint is None else self.config(checkpoint)
        latent = self.latent if checkpoint is None else self.reference_latent(checkpoint)
        return self.coder(checkpoint).video(config.grid(latent))

    def geometry_of(self, grid: tuple[int, int, int], checkpoint: Path | None = None) -> Geometry:
        config: Any = self.published if checkpoint is None else self.config(checkpoint)
        return config.geometry(config.latent(grid))

    def coder(self, checkpoint: Path | None = None) -> VideoCoder:
        config: Any = self.published if checkpoint is None else self.config(checkpoint)
        path = None if checkpoint is None else Path(checkpoint) / "vae" / "config.json"
        factors = self.factors
        if path is not None and path.is_file():
            with rooted(f"{path}: $."):
                factors = self.vae_factors(read_json(path, "a VAE's config"))
        return VideoCoder(factors, config.patch, self.pads_frames)

    def vae_factors(self, config: dict) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels of one latent, by a VAE's config.json."""
        time, space = self.vae_keys
        side = integer(config.get(space, self.factors[1]), space, low=1)
        return integer(config.get(time, self.factors[0]), time, low=1), side, side

    def default_tile(self) -> tuple[int, int, int]:
        return self.tile

    def latent_shape(self, geometry: Geometry, checkpoint: Path | None = None) -> tuple[int, int, int, int]:
        config: Any = self.published if checkpoint is None else self.config(checkpoint)
        return (config.in_channels, *config.latent(geometry.grid))

    def output_shape(self, geometry: Geometry, checkpoint: Path | None = None) -> tuple[int, int, int, int]:
        config: Any = self.published if checkpoint is None else self.config(checkpoint)
        return (config.out_channels, *config.latent(geometry.grid))

    def traced_denoiser(
        self, checkpoint: Path, tiling: Tiling, attention: AttentionFn, *, dtype: str
    ) -> TracedDenoiser:
        import torch

        self.check_geometry(checkpoint, tiling.geometry)
        config, parts, compute = self.config(checkpoint), self.parts(), getattr(torch, dtype)
        with torch.device("meta"):
            module = parts.denoiser(config, tiling, attention, compute)
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if parts.keeps_float32(name) else compute)
            parameter.requires_grad_(False)
        folder = weights.component_folder(checkpoint, "transformer")
        found = weights.find(module, parts.stored_shapes(config), folder)
        return TracedDenoiser(module.eval(), found, parts.constants(config, tiling))
