"""Wan text-to-video (2.1, 1.3B and 14B) for the exporter, the runners and the search."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from svdit.exporter import weights
from svdit.exporter.models.base import ModelAdapter, Sampling, TracedDenoiser
from svdit.exporter.models.wan.config import DEFAULT_TILE, REFERENCE_LATENT, TEXT_TOKENS, WanConfig
from svdit.plans.errors import complain
from svdit.plans.geometry import Geometry

if TYPE_CHECKING:
    import numpy as np
    import torch

    from svdit.exporter.models.base import AttentionFn
    from svdit.plans.tiles import Tiling


class WanAdapter(ModelAdapter):
    """A diffusers WanPipeline folder, or its transformer folder alone."""

    name = "wan2.1"
    published = WanConfig()
    """Sizes to go by when there is no checkpoint at hand."""

    def config(self, checkpoint: Path) -> WanConfig:
        path = weights.component_folder(checkpoint, "transformer") / "config.json"
        return WanConfig.from_json(weights.read_json(path, "a transformer's config"), path)

    def reference_latent(self, checkpoint: Path) -> tuple[int, int, int]:
        """Latent (f, h, w) that `geometry` is for."""
        return REFERENCE_LATENT

    def geometry(self, checkpoint: Path) -> Geometry:
        return self.config(checkpoint).geometry(self.reference_latent(checkpoint))

    def default_tile(self) -> tuple[int, int, int]:
        return DEFAULT_TILE

    def latent_shape(self, geometry: Geometry, checkpoint: Path | None = None) -> tuple[int, int, int, int]:
        config = self.published if checkpoint is None else self.config(checkpoint)
        return (config.in_channels, *config.latent(geometry.grid))

    def text_shape(self, checkpoint: Path) -> tuple[int, int]:
        return TEXT_TOKENS, self.config(checkpoint).text_dim

    def check_geometry(self, checkpoint: Path, geometry: Geometry) -> None:
        super().check_geometry(checkpoint, geometry)
        longest = self.config(checkpoint).rope_max_seq_len
        for axis, size in enumerate(geometry.grid):
            if size > longest:
                raise complain(f"plan geometry.grid[{axis}]", size, f"at most rope_max_seq_len, {longest}")

    def traced_denoiser(
        self, checkpoint: Path, tiling: Tiling, attention: AttentionFn, *, dtype: str
    ) -> TracedDenoiser:
        import torch

        from svdit.exporter.models.wan.model import WanDenoiser, constants
        from svdit.exporter.models.wan.weights import find_weights, keeps_float32

        self.check_geometry(checkpoint, tiling.geometry)
        config = self.config(checkpoint)
        compute = getattr(torch, dtype)
        with torch.device("meta"):
            module = WanDenoiser(config, tiling, attention, compute)
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if keeps_float32(name) else compute)
            parameter.requires_grad_(False)
        folder = weights.component_folder(checkpoint, "transformer")
        return TracedDenoiser(module.eval(), find_weights(module, config, folder), constants(config, tiling))

    def sampling(self, checkpoint: Path) -> Sampling:
        return Sampling(steps=50, guidance_scale=5.0, scheduler=partial(self.scheduler, checkpoint), cfg="calls")

    def encode_prompts(self, checkpoint: Path, prompts: list[str]) -> torch.Tensor:
        raise complain("prompts", f"a request to encode text for {self.name}", "embeddings made by diffusers' pipeline")

    def decode(self, checkpoint: Path, latents: torch.Tensor) -> np.ndarray:
        raise complain("latents", f"a request to decode video for {self.name}", "diffusers' pipeline and its VAE")
