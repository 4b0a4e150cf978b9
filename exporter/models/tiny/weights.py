"""The caption table of `tiny`; the transformer's tensors are Wan's (wan/weights.py).

| value | checkpoint key | stored as |
| --- | --- | --- |
| caption table [words + 1, width] | captions/captions.safetensors: weight | the same shape, the last row unused |
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from svdit.exporter.models.tiny.config import Captions
from svdit.exporter.weights import match, read_header

if TYPE_CHECKING:
    import torch


def caption_table(folder: Path, captions: Captions) -> torch.Tensor:
    """float32 [words + 1, width]. Raises SvditError unless the file holds exactly this table."""
    from safetensors.torch import load_file

    path = folder / "captions.safetensors"
    match({"table": ("weight", (captions.rows, captions.width))}, read_header(path), folder)
    return load_file(path)["weight"].float()
