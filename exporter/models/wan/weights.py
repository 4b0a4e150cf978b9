"""Name table of Wan: the denoiser's parameters are diffusers' tensors under diffusers' names.

| parameter | checkpoint key | stored as |
| --- | --- | --- |
| patch_embedding.weight [C, P] | the same | Conv3d kernel [C, channels, pt, ph, pw]: the same bytes |
| everything else | the same | the same shape |
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from svdit.exporter.models.base import StoredTensor
from svdit.exporter.models.wan.config import WanConfig
from svdit.exporter.weights import match, stored_tensors

if TYPE_CHECKING:
    import torch

KEEP_FLOAT32 = ("condition_embedder.time_embedder.", "scale_shift_table", "norm2.")
"""Parts of parameter names that stay float32 in half precision, as in diffusers."""


def keeps_float32(name: str) -> bool:
    return any(part in name for part in KEEP_FLOAT32)


def find_weights(module: torch.nn.Module, config: WanConfig, folder: Path) -> dict[str, StoredTensor]:
    """Where each parameter of the denoiser lies. Raises SvditError unless the files hold exactly these."""
    expected = {name: (name, tuple(parameter.shape)) for name, parameter in module.named_parameters()}
    kernel = (config.width, config.in_channels, *config.patch_size)
    expected["patch_embedding.weight"] = ("patch_embedding.weight", kernel)
    return match(expected, stored_tensors(folder), folder)
