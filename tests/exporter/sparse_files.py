"""Checkpoints of any size that need no disk: safetensors files with a true header and holes for the weights."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

import torch

STEM = "diffusion_pytorch_model"


def save_sparse(folder: Path, class_name: str, config: dict, shard_bytes: int = 5 * 10**9) -> Path:
    """A transformer folder with bf16 shards; keys and shapes are those of diffusers' own class, values are zeros."""
    import diffusers

    with torch.device("meta"):
        model = getattr(diffusers, class_name)(**config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": class_name, **config}))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for key, value in model.state_dict().items():
        bytes_ = 2 * value.numel()
        if shards[-1] and size + bytes_ > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tuple(value.shape)
        size += bytes_
    weight_map = {}
    for number, shapes in enumerate(shards, 1):
        name = f"{STEM}-{number:05}-of-{len(shards):05}.safetensors"
        _write(folder / name, shapes)
        weight_map |= dict.fromkeys(shapes, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _write(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, offset = {}, 0
    for key, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + offset)
