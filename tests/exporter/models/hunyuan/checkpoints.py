"""Small random HunyuanVideo checkpoints, saved by diffusers itself, and inputs for them."""

from __future__ import annotations

from pathlib import Path

import torch

from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, MultiDiagonal, Stripe
from svdit.plans.schema import Plan, Stage

CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_refiner_layers": 2,
    "mlp_ratio": 1.5,
    "text_embed_dim": 24,
    "pooled_projection_dim": 20,
    "rope_axes_dim": (8, 28, 28),
}
LAYERS = 5
GRID = (3, 5, 7)
"""Odd sizes: no tile divides them."""
TEXT = 11
VALID = (4, 11)
"""Valid text tokens of each batch element: one partial mask, one full."""


def reference_model(seed: int = 0, **changes) -> torch.nn.Module:
    """diffusers' HunyuanVideoTransformer3DModel with weights of a spread that makes attention peaky."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(seed)
    model = HunyuanVideoTransformer3DModel(**{**CONFIG, **changes}).eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") and parameter.ndim == 1 else 0.0, 0.12)
    return model


def save(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "10GB", **changes) -> Path:
    """A transformer folder."""
    reference_model(**changes).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def geometry(grid: tuple[int, int, int] = GRID, text: int = TEXT) -> Geometry:
    return Geometry(grid, text, "after", LAYERS, 2, 64)


def plan() -> Plan:
    """Two stages, border tiles, every kind of head, double and single blocks different from each other."""
    patterns = {
        "d": Diagonal(frames=0),
        "m": MultiDiagonal(rows=0, cols=0),
        "s": Stripe(columns=((0, 1),), frames=1),
    }
    first = (("full", "d"), ("full", "full"), ("m", "full"), ("s", "s"), ("full", "skip"))
    second = (("d", "skip"), ("m", "s"), ("d", "d"), ("full", "m"), ("s", "d"))
    return Plan("hunyuan", geometry(), (2, 2, 4), patterns, (Stage(0.4, first), Stage(1.0, second)), {"method": "test"})


def feed(grid: tuple[int, int, int] = GRID, channels: int = 4, guidance: bool = True) -> dict[str, torch.Tensor]:
    """Inputs by diffusers' names, batch 2, padding of the text filled with noise that nothing may see."""
    generator = torch.Generator().manual_seed(3)
    t, h, w = grid
    mask = (torch.arange(TEXT) < torch.tensor(VALID)[:, None]).to(torch.int32)
    values = {
        "hidden_states": torch.randn(2, channels, t, 2 * h, 2 * w, generator=generator),
        "timestep": torch.rand(2, generator=generator) * 1000,
        "encoder_hidden_states": torch.randn(2, TEXT, 24, generator=generator),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(2, 20, generator=generator),
    }
    if guidance:
        values["guidance"] = torch.tensor([6000.0, 1500.0])
    return values
