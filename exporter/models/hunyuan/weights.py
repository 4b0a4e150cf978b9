"""Name table of HunyuanVideo: the denoiser's parameters are diffusers' tensors under diffusers' names.

| parameter | checkpoint key | stored as |
| --- | --- | --- |
| x_embedder.proj.weight [C, P] | the same | Conv3d kernel [C, channels, pt, ph, pw]: the same bytes |
| everything else | the same | the same shape |

All of them are in the compute type, as in diffusers, which keeps no part of this class in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from svdit.exporter.models.base import StoredTensor
from svdit.exporter.models.hunyuan.config import HunyuanConfig
from svdit.exporter.weights import match, stored_tensors

if TYPE_CHECKING:
    import torch


def find_weights(module: torch.nn.Module, config: HunyuanConfig, folder: Path) -> dict[str, StoredTensor]:
    """Where each parameter of the denoiser lies. Raises SvditError unless the files hold exactly these."""
    expected = {name: (name, tuple(parameter.shape)) for name, parameter in module.named_parameters()}
    kernel = (config.width, config.in_channels, *config.patch)
    expected["x_embedder.proj.weight"] = ("x_embedder.proj.weight", kernel)
    return match(expected, stored_tensors(folder), folder)
