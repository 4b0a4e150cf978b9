"""HunyuanVideo for the exporter, the runners and the search."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdit.exporter.models.base import Sampling
from svdit.exporter.models.hunyuan.config import DEFAULT_TILE, REFERENCE_LATENT, HunyuanConfig
from svdit.exporter.models.transformer import Parts, TransformerAdapter
from svdit.plans.bundle import TensorSpec
from svdit.plans.geometry import Geometry

if TYPE_CHECKING:
    import torch


class HunyuanAdapter(TransformerAdapter):
    """A folder of HunyuanVideoPipeline or HunyuanVideoImageToVideoPipeline, or its transformer folder alone."""

    name = "hunyuan"
    published = HunyuanConfig()
    tile = DEFAULT_TILE
    latent = REFERENCE_LATENT
    vae_keys = ("temporal_compression_ratio", "spatial_compression_ratio")
    fixed_geometry = ("layers", "heads", "head_dim", "text_position")
    """Text tokens are the plan's choice: the pipeline can be told another number than its own."""

    def parts(self) -> Parts:
        from svdit.exporter.models.hunyuan.model import HunyuanDenoiser, constants
        from svdit.exporter.models.hunyuan.weights import stored_shapes

        return Parts(HunyuanDenoiser, constants, stored_shapes)

    def text_shape(self, checkpoint: Path) -> tuple[int, int]:
        config = self.config(checkpoint)
        return config.text_tokens, config.text_embed_dim

    def inputs(self, checkpoint: Path, geometry: Geometry, batch: int | str) -> tuple[TensorSpec, ...]:
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

    def texts(self, pipe: Any, prompts: list[str], tokens: int) -> dict[str, torch.Tensor]:
        text, pooled, mask = pipe.encode_prompt(prompts, max_sequence_length=tokens)
        return {
            "encoder_hidden_states": text,
            "encoder_attention_mask": mask.int(),
            "pooled_projections": pooled,
        }

    def frames(self, pipe: Any, latents: torch.Tensor, checkpoint: Path) -> torch.Tensor:
        return pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample

    def sampling(self, checkpoint: Path) -> Sampling:
        """One call a step: the guidance scale of a distilled model is an input, not a second call."""
        return Sampling(50, 6.0, partial(self.scheduler, checkpoint), cfg="input", sigmas=sigmas)


def sigmas(steps: int) -> list[float]:
    """Noise levels before the scheduler's shift, as the pipeline asks for them."""
    return [1.0 - step / steps for step in range(steps)]
