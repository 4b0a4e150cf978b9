"""The published transformers at full size with random weights on a GPU, their inputs, and template plans for them.

No weights are read: parameters are drawn in place at magnitudes that keep every activation finite.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

from svdit.exporter.models import registry
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, MultiDiagonal, Pattern, Stripe
from svdit.plans.schema import Plan, Stage

Tile = tuple[int, int, int]


@dataclass(frozen=True)
class FullSize:
    """What is timed of one model: the batch of one call, and a template plan."""

    batch: int
    density: float
    """Mean share of the attention that the paper's FLOP figure implies over a whole run."""
    published: str
    """Steps that are dense in such a run, as far as that figure leaves room for them."""
    tile: Tile
    patterns: Mapping[str, Pattern]
    heads: Mapping[str, int]
    """Pattern to number of heads, the same in every layer."""
    blocks: tuple[str, ...]
    """Attributes of the transformer that hold its blocks, in the order of the plan's layers."""


MODELS = {
    "cogvideox1.5": FullSize(
        batch=2,
        density=0.265,
        published="no dense steps",
        tile=(1, 16, 8),
        patterns={
            "band": Diagonal(frames=0),
            "wide": Diagonal(frames=1),
            "comb": MultiDiagonal(rows=1, cols=1),
            "stripe": Stripe(columns=((0, 33),), frames=0),
        },
        heads={"full": 4, "comb": 16, "wide": 14, "stripe": 6, "band": 6, "skip": 2},
        blocks=("transformer_blocks",),
    ),
    "hunyuan": FullSize(
        batch=1,
        density=0.320,
        published="about 4 of 50 steps dense",
        tile=(1, 8, 16),
        patterns={
            "band": Diagonal(frames=1),
            "wide": Diagonal(frames=4),
            "comb": MultiDiagonal(rows=1, cols=1),
            "stripe": Stripe(columns=((0, 90),), frames=0),
        },
        heads={"full": 4, "comb": 8, "wide": 4, "stripe": 2, "band": 5, "skip": 1},
        blocks=("transformer_blocks", "single_transformer_blocks"),
    ),
    "wan2.1": FullSize(
        batch=1,
        density=0.438,
        published="about 10 of 50 steps dense",
        tile=(1, 8, 16),
        patterns={
            "band": Diagonal(frames=1),
            "wide": Diagonal(frames=3),
            "comb": MultiDiagonal(rows=1, cols=1),
            "stripe": Stripe(columns=((0, 60),), frames=0),
        },
        heads={"full": 11, "comb": 10, "wide": 10, "stripe": 4, "band": 4, "skip": 1},
        blocks=("blocks",),
    ),
}


def published_config(model: str) -> Any:
    """Sizes of the published transformer."""
    return registry.adapter(model).published


def reference_latent(model: str) -> tuple[int, int, int]:
    """Latent frames, rows, columns of the reference video."""
    return registry.adapter(model).latent


def template_plan(model: str, geometry: Geometry) -> Plan:
    """One stage, every layer with the model's mix of patterns, on other heads from layer to layer."""
    spec = MODELS[model]
    row = [name for name, count in spec.heads.items() for _ in range(count)]
    turns = [i % len(row) for i in range(geometry.layers)]
    stage = Stage(1.0, tuple(tuple(row[turn:] + row[:turn]) for turn in turns))
    note = f"mix of patterns at the mean density that the Sparse-vDiT paper's FLOP figure implies, {spec.density}"
    return Plan(model, geometry, spec.tile, spec.patterns, (stage,), {"method": "template", "note": note})


def build(config: Any, device: str, dtype: torch.dtype) -> nn.Module:
    """A diffusers transformer of this configuration: random weights of seed 0, float32 where diffusers keeps it."""
    cls = getattr(diffusers, config.class_name)
    with torch.device("meta"):
        model = cls(**dataclasses.asdict(config))
    keep = set(cls._keep_in_fp32_modules or ())
    torch.manual_seed(0)
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            exact = keep & {*prefix.split("."), name}
            value = torch.empty(parameter.shape, dtype=torch.float32 if exact else dtype, device=device)
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 2500
            is_norm = parameter.ndim == 1 and name == "weight"
            value.normal_(1.0 if is_norm else 0.0, fan_in**-0.5)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    if hasattr(config, "rope_max_seq_len"):  # Wan's tables are buffers, which no checkpoint holds
        rope = type(model.rope)(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
        model.rope = rope.to(device)
    return model.eval()


def inputs(model: str, config: Any, latent: tuple[int, int, int], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments of one call of the transformer as its pipeline makes them, all text tokens valid; seed 0."""
    generator = torch.Generator(device).manual_seed(0)
    batch = MODELS[model].batch

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    frames, height, width = latent
    given: dict[str, Any] = {"timestep": torch.full((batch,), 500.0, device=device)}
    if model == "cogvideox1.5":
        grid = config.geometry(latent).grid
        given["hidden_states"] = normal(batch, frames, config.in_channels, height, width)
        given["encoder_hidden_states"] = normal(batch, config.max_text_seq_length, config.text_embed_dim)
        given["image_rotary_emb"] = get_3d_rotary_pos_embed(
            config.attention_head_dim, None, grid[1:], grid[0], grid_type="slice", max_size=grid[1:], device=device
        )
        return given
    given["hidden_states"] = normal(batch, config.in_channels, *latent)
    if model == "wan2.1":
        given["encoder_hidden_states"] = normal(batch, 512, config.text_dim)
        return given
    text = config.geometry(latent).text_tokens
    given["encoder_hidden_states"] = normal(batch, text, config.text_embed_dim)
    given["encoder_attention_mask"] = torch.ones(batch, text, dtype=torch.int64, device=device)
    given["pooled_projections"] = normal(batch, config.pooled_projection_dim)
    given["guidance"] = torch.full((batch,), 6000.0, device=device, dtype=dtype)
    return given


class Depth:
    """The blocks of a transformer, and a way to run with the first few of them only.

    A unit is the smallest number of blocks of each kind in the proportion of the whole model: one double and two
    single blocks of HunyuanVideo, one block of the others.
    """

    def __init__(self, transformer: nn.Module, names: tuple[str, ...]) -> None:
        self.transformer = transformer
        self._full = {name: getattr(transformer, name) for name in names}
        self.units = reduce(math.gcd, (len(blocks) for blocks in self._full.values()))

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for blocks in self._full.values() for block in blocks]

    @property
    def unit_layers(self) -> int:
        return len(self.blocks) // self.units

    @contextmanager
    def first(self, units: int) -> Iterator[None]:
        """With no more than so many units of blocks."""
        for name, blocks in self._full.items():
            setattr(self.transformer, name, blocks[: units * len(blocks) // self.units])
        try:
            yield
        finally:
            for name, blocks in self._full.items():
                setattr(self.transformer, name, blocks)
