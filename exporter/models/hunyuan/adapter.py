"""HunyuanVideo for the exporter, the runners and the search."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from svdit.exporter import weights
from svdit.exporter.models.base import ModelAdapter, Sampling, TracedDenoiser
from svdit.exporter.models.hunyuan.config import DEFAULT_TILE, REFERENCE_LATENT, TEXT_TOKENS, HunyuanConfig
from svdit.plans.bundle import TensorSpec
from svdit.plans.errors import complain
from svdit.plans.geometry import Geometry

if TYPE_CHECKING:
    import numpy as np
    import torch

    from svdit.exporter.models.base import AttentionFn
    from svdit.plans.tiles import Tiling


class HunyuanAdapter(ModelAdapter):
    """A diffusers HunyuanVideoPipeline folder, or its transformer folder alone."""

    name = "hunyuan"
    published = HunyuanConfig()
    """Sizes to go by when there is no checkpoint at hand."""
    fixed_geometry = ("layers", "heads", "head_dim", "text_position")
    """Text tokens are the plan's choice: the pipeline can be told another number than its own 256."""

    def config(self, checkpoint: Path) -> HunyuanConfig:
        path = weights.component_folder(checkpoint, "transformer") / "config.json"
        return HunyuanConfig.from_json(weights.read_json(path, "a transformer's config"), path)

    def geometry(self, checkpoint: Path) -> Geometry:
        return self.config(checkpoint).geometry(REFERENCE_LATENT)

    def default_tile(self) -> tuple[int, int, int]:
        return DEFAULT_TILE

    def latent_shape(self, geometry: Geometry, checkpoint: Path | None = None) -> tuple[int, int, int, int]:
        config = self.published if checkpoint is None else self.config(checkpoint)
        return (config.in_channels, *config.latent(geometry.grid))

    def text_shape(self, checkpoint: Path) -> tuple[int, int]:
        return TEXT_TOKENS, self.config(checkpoint).text_embed_dim

    def inputs(self, checkpoint: Path, geometry: Geometry, batch: int) -> tuple[TensorSpec, ...]:
        """The common four, then encoder_attention_mask, pooled_projections and, in distilled models, guidance."""
        config = self.config(checkpoint)
        video, timestep, _, stage = super().inputs(checkpoint, geometry, batch)
        text = (batch, geometry.text_tokens)
        guidance = (TensorSpec("guidance", "float32", (batch,)),) if config.guidance_embeds else ()
        return (
            video,
            timestep,
            TensorSpec("encoder_hidden_states", "float32", (*text, config.text_embed_dim)),
            stage,
            TensorSpec("encoder_attention_mask", "int32", text),
            TensorSpec("pooled_projections", "float32", (batch, config.pooled_projection_dim)),
            *guidance,
        )

    def traced_denoiser(
        self, checkpoint: Path, tiling: Tiling, attention: AttentionFn, *, dtype: str
    ) -> TracedDenoiser:
        import torch

        from svdit.exporter.models.hunyuan.model import HunyuanDenoiser, constants
        from svdit.exporter.models.hunyuan.weights import find_weights

        self.check_geometry(checkpoint, tiling.geometry)
        config = self.config(checkpoint)
        compute = getattr(torch, dtype)
        with torch.device("meta"):
            module = HunyuanDenoiser(config, tiling, attention, compute)
        for parameter in module.parameters():
            parameter.data = parameter.data.to(compute)
            parameter.requires_grad_(False)
        folder = weights.component_folder(checkpoint, "transformer")
        return TracedDenoiser(module.eval(), find_weights(module, config, folder), constants(config, tiling))

    def sampling(self, checkpoint: Path) -> Sampling:
        """One call a step: the guidance scale of a distilled model is an input, not a second call."""
        return Sampling(steps=50, guidance_scale=1.0, scheduler=partial(self.scheduler, checkpoint), cfg="calls")

    def encode_prompts(self, checkpoint: Path, prompts: list[str]) -> torch.Tensor:
        raise complain("prompts", f"a request to encode text for {self.name}", "embeddings made by diffusers' pipeline")

    def decode(self, checkpoint: Path, latents: torch.Tensor) -> np.ndarray:
        raise complain("latents", f"a request to decode video for {self.name}", "diffusers' pipeline and its VAE")
