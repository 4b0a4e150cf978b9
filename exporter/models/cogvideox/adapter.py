"""CogVideoX1.5 text-to-video for the exporter, the runners and the search."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from svdit.exporter import weights
from svdit.exporter.models.base import ModelAdapter, Sampling, TracedDenoiser
from svdit.exporter.models.cogvideox.config import DEFAULT_TILE, PUBLISHED, REFERENCE_LATENT, CogVideoXConfig
from svdit.plans.errors import complain
from svdit.plans.geometry import Geometry

if TYPE_CHECKING:
    import numpy as np
    import torch

    from svdit.exporter.models.base import AttentionFn
    from svdit.plans.tiles import Tiling


class CogVideoXAdapter(ModelAdapter):
    """A diffusers CogVideoXPipeline folder, or its transformer folder alone."""

    name = "cogvideox1.5"
    published = PUBLISHED
    """Sizes to go by when there is no checkpoint at hand."""

    def config(self, checkpoint: Path) -> CogVideoXConfig:
        path = weights.component_folder(checkpoint, "transformer") / "config.json"
        return CogVideoXConfig.from_json(weights.read_json(path, "a transformer's config"), path)

    def geometry(self, checkpoint: Path) -> Geometry:
        return self.config(checkpoint).geometry(REFERENCE_LATENT)

    def default_tile(self) -> tuple[int, int, int]:
        return DEFAULT_TILE

    def latent_shape(self, geometry: Geometry, checkpoint: Path | None = None) -> tuple[int, int, int, int]:
        config = self.published if checkpoint is None else self.config(checkpoint)
        return (config.in_channels, *config.latent(geometry.grid))

    def text_shape(self, checkpoint: Path) -> tuple[int, int]:
        config = self.config(checkpoint)
        return config.max_text_seq_length, config.text_embed_dim

    def check_geometry(self, checkpoint: Path, geometry: Geometry) -> None:
        super().check_geometry(checkpoint, geometry)
        limits = zip((1, 2), ("sample_height", "sample_width"), self.config(checkpoint).largest(), strict=True)
        for axis, name, largest in limits:
            if geometry.grid[axis] > largest:
                raise complain(
                    f"plan geometry.grid[{axis}]",
                    geometry.grid[axis],
                    f"at most {largest}, the {name} of the checkpoint in patches",
                    "diffusers' pipeline makes no positions beyond that",
                )

    def traced_denoiser(
        self, checkpoint: Path, tiling: Tiling, attention: AttentionFn, *, dtype: str
    ) -> TracedDenoiser:
        import torch

        from svdit.exporter.models.cogvideox.model import CogVideoXDenoiser, constants
        from svdit.exporter.models.cogvideox.weights import find_weights

        self.check_geometry(checkpoint, tiling.geometry)
        config = self.config(checkpoint)
        compute = getattr(torch, dtype)
        with torch.device("meta"):
            module = CogVideoXDenoiser(config, tiling, attention, compute)
        for parameter in module.parameters():
            parameter.data = parameter.data.to(compute)
            parameter.requires_grad_(False)
        folder = weights.component_folder(checkpoint, "transformer")
        return TracedDenoiser(module.eval(), find_weights(module, folder), constants(config, tiling))

    def sampling(self, checkpoint: Path) -> Sampling:
        return Sampling(steps=50, guidance_scale=6.0, scheduler=partial(self.scheduler, checkpoint), cfg="batch")

    def encode_prompts(self, checkpoint: Path, prompts: list[str]) -> torch.Tensor:
        raise complain("prompts", f"a request to encode text for {self.name}", "embeddings made by diffusers' pipeline")

    def decode(self, checkpoint: Path, latents: torch.Tensor) -> np.ndarray:
        raise complain("latents", f"a request to decode video for {self.name}", "diffusers' pipeline and its VAE")
