"""Name table of Wan: the denoiser's parameters are diffusers' tensors under diffusers' names.

| parameter | checkpoint key | stored as |
| --- | --- | --- |
| patch_embedding.weight [C, P] | the same | Conv3d kernel [C, channels, pt, ph, pw]: the same bytes |
| everything else | the same | the same shape |
"""

from __future__ import annotations

from svdit.exporter.models.wan.config import WanConfig

KEEP_FLOAT32 = ("condition_embedder.time_embedder.", "scale_shift_table", "norm1.", "norm2.")
"""Parts of parameter names that stay float32 in half precision, as in diffusers."""


def keeps_float32(name: str) -> bool:
    return any(part in name for part in KEEP_FLOAT32)


def stored_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that the checkpoint stores in another shape than the denoiser's."""
    return {"patch_embedding.weight": (config.width, config.in_channels, *config.patch)}
