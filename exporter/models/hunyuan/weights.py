"""Name table of HunyuanVideo: the denoiser's parameters are diffusers' tensors under diffusers' names.

| parameter | checkpoint key | stored as |
| --- | --- | --- |
| x_embedder.proj.weight [C, P] | the same | Conv3d kernel [C, channels, pt, ph, pw]: the same bytes |
| everything else | the same | the same shape |

All of them are in the compute type, as in diffusers, which keeps no part of this class in float32.
"""

from __future__ import annotations

from svdit.exporter.models.hunyuan.config import HunyuanConfig


def stored_shapes(config: HunyuanConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that the checkpoint stores in another shape than the denoiser's."""
    return {"x_embedder.proj.weight": (config.width, config.in_channels, *config.patch)}
