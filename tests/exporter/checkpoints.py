"""Small random checkpoints, saved by diffusers itself, with weights large enough that no path is idle."""

from __future__ import annotations

import json
from pathlib import Path

import torch

VOCABULARY = {
    "colour": ["red", "green", "blue", "yellow", "magenta", "cyan"],
    "shape": ["circle", "square", "triangle"],
    "direction": ["right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right"],
    "speed": ["slow", "medium", "fast"],
}
TINY = {
    "patch_size": (1, 4, 4),
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 96,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
TINY_VIDEO = (4, 24, 24)
"""Grid 4 x 6 x 6 = 144 tokens."""
WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 48,
    "freq_dim": 32,
    "ffn_dim": 80,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
WAN_I2V = {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 192}
"""Changes of WAN: twice the latents and a mask of 4, and CLIP tokens of width 20."""


def reference_model(config: dict, seed: int = 0) -> torch.nn.Module:
    """diffusers' WanTransformer3DModel with random weights of a spread that makes attention peaky."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model = WanTransformer3DModel(**config).eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.15)
    return model


def save_tiny(folder: Path, dtype: torch.dtype = torch.float16, shard: str = "10GB", **changes) -> Path:
    """A checkpoint of the tiny format: transformer/, scheduler/, captions/."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from safetensors.torch import save_file

    config = {**TINY, **changes}
    reference_model(config).to(dtype).save_pretrained(folder / "transformer", max_shard_size=shard)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    (folder / "captions").mkdir(exist_ok=True)
    table = torch.randn(21, config["text_dim"], generator=torch.Generator().manual_seed(1))
    save_file({"weight": table.half()}, folder / "captions/captions.safetensors")
    captions = {"vocabulary": VOCABULARY, "width": config["text_dim"], "tokens": 4, "video": list(TINY_VIDEO)}
    (folder / "captions/config.json").write_text(json.dumps(captions))
    return folder


def save_wan(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "10GB", **changes) -> Path:
    """A transformer folder of Wan's format."""
    reference_model({**WAN, **changes}).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder
