"""The transformers of diffusers that a plan can be put into: where their self-attention is and what they are fed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from diffusers import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from svdit.plans.errors import complain
from svdit.plans.geometry import Geometry
from svdit.runtime.processors import (
    CogVideoXSparseProcessor,
    HunyuanVideoSparseProcessor,
    SparseProcessor,
    WanSparseProcessor,
)

Grid = tuple[int, int, int]


class TokenOrder(Protocol):
    """Brings tokens along a dimension of a tensor into tile order and back; text tokens beside them stay."""

    def to_tiles(self, x: torch.Tensor, dim: int) -> torch.Tensor: ...

    def to_raster(self, x: torch.Tensor, dim: int) -> torch.Tensor: ...


class Family:
    """One transformer class. Text in self-attention is at `text_position`, as long as encoder_hidden_states."""

    model: type
    original: type
    """The processor that the exchange takes the place of."""
    processor: type[SparseProcessor]
    text_position: str

    def attentions(self, transformer: Any) -> list[Any]:
        """The self-attention modules in the order of the plan's layers."""
        raise NotImplementedError

    def grid(self, transformer: Any, shape: torch.Size) -> Grid:
        """Video tokens along time, height, width of a hidden_states of this shape."""
        raise NotImplementedError

    def text_lengths(self, geometry: Geometry, given: Mapping[str, Any]) -> list[int] | torch.Tensor:
        """Text tokens [B] that may be seen as keys."""
        return [geometry.text_tokens] * given["hidden_states"].shape[0]

    def takes_tile_order(self, transformer: Any, geometry: Geometry, order: torch.Tensor) -> bool:
        """Whether all that happens between patch embedding and output treats every video token alike.

        order: raster index of each video token in tile order.
        """
        return True

    def reorder(self, transformer: Any, order: TokenOrder) -> list[Any]:
        """Hooks that bring embedded tokens and RoPE tables into tile order, and output tokens back; their handles."""
        raise NotImplementedError

    def reordered_inputs(self, given: Mapping[str, Any], order: TokenOrder) -> dict[str, Any]:
        """Inputs of a call that have a row for every token, in tile order."""
        return {}

    def check(self, transformer: Any, geometry: Geometry) -> None:
        """Raise SvditError unless the plan's geometry is this transformer's and its attention is the usual one."""
        modules = self.attentions(transformer)
        config = transformer.config
        own = {
            "layers": len(modules),
            "heads": config.num_attention_heads,
            "head_dim": config.attention_head_dim,
            "text_position": self.text_position,
        }
        _compare(geometry, own, f"as the {self.model.__name__} has", "use a plan made for this model")
        for layer, module in enumerate(modules):
            got = type(module.processor)
            if issubclass(got, SparseProcessor):
                hint = "restore() the first exchange before the next"
            else:
                hint = "exchange attention before fusing projections or setting other processors"
            if got is not self.original:
                raise complain(f"layer {layer}: attention processor", got.__name__, self.original.__name__, hint)
            if getattr(module.processor, "_parallel_config", None) is not None:
                raise complain(f"layer {layer}: attention", "context parallelism", "one device", "leave it off")

    def check_inputs(self, transformer: Any, geometry: Geometry, given: Mapping[str, Any]) -> None:
        """Raise SvditError unless the inputs of a call make the plan's token grid and text."""
        own: dict[str, Any] = {"grid": self.grid(transformer, given["hidden_states"].shape)}
        if self.text_position != "none":
            own["text_tokens"] = given["encoder_hidden_states"].shape[1]
        hint = "make a plan for this size, or ask the pipeline for the plan's height, width, frames, text length"
        _compare(geometry, own, "as the inputs of the transformer make it", hint)


class Wan(Family):
    model, original, processor, text_position = WanTransformer3DModel, WanAttnProcessor, WanSparseProcessor, "none"

    def attentions(self, transformer: Any) -> list[Any]:
        return [block.attn1 for block in transformer.blocks]

    def grid(self, transformer: Any, shape: torch.Size) -> Grid:
        pt, ph, pw = transformer.config.patch_size
        return shape[2] // pt, shape[3] // ph, shape[4] // pw

    def reorder(self, transformer: Any, order: TokenOrder) -> list[Any]:
        return [
            _after(transformer.patch_embedding, lambda x: order.to_tiles(x.flatten(2), 2).view_as(x)),
            _after(transformer.rope, lambda tables: tuple(order.to_tiles(x, 1) for x in tables)),
            _after(transformer.proj_out, lambda x: order.to_raster(x, 1)),
        ]

    def reordered_inputs(self, given: Mapping[str, Any], order: TokenOrder) -> dict[str, Any]:
        """Wan 2.2 may have a timestep for every token."""
        timestep = given["timestep"]
        return {"timestep": order.to_tiles(timestep, 1)} if timestep.ndim == 2 else {}


class CogVideoX(Family):
    model, original = CogVideoXTransformer3DModel, CogVideoXAttnProcessor2_0
    processor, text_position = CogVideoXSparseProcessor, "before"

    def attentions(self, transformer: Any) -> list[Any]:
        return [block.attn1 for block in transformer.transformer_blocks]

    def grid(self, transformer: Any, shape: torch.Size) -> Grid:
        p, pt = transformer.config.patch_size, transformer.config.patch_size_t or 1
        return shape[1] // pt, shape[3] // p, shape[4] // p

    def reorder(self, transformer: Any, order: TokenOrder) -> list[Any]:
        return [
            _after(transformer.patch_embed, lambda x: order.to_tiles(x, 1)),
            _after(transformer.proj_out, lambda x: order.to_raster(x, 1)),
        ]

    def reordered_inputs(self, given: Mapping[str, Any], order: TokenOrder) -> dict[str, Any]:
        """The pipeline makes the RoPE tables."""
        tables = given.get("image_rotary_emb")
        return {} if tables is None else {"image_rotary_emb": tuple(order.to_tiles(x, 0) for x in tables)}


class HunyuanVideo(Family):
    model, original = HunyuanVideoTransformer3DModel, HunyuanVideoAttnProcessor2_0
    processor, text_position = HunyuanVideoSparseProcessor, "after"

    def attentions(self, transformer: Any) -> list[Any]:
        return [block.attn for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)]

    def grid(self, transformer: Any, shape: torch.Size) -> Grid:
        p, pt = transformer.config.patch_size, transformer.config.patch_size_t
        return shape[2] // pt, shape[3] // p, shape[4] // p

    def takes_tile_order(self, transformer: Any, geometry: Geometry, order: torch.Tensor) -> bool:
        """Not where the first frame is modulated apart and tiles mix it with others."""
        frame = geometry.grid[1] * geometry.grid[2]
        return transformer.config.image_condition_type != "token_replace" or int(order[:frame].max()) < frame

    def reorder(self, transformer: Any, order: TokenOrder) -> list[Any]:
        return [
            _after(transformer.x_embedder, lambda x: order.to_tiles(x, 1)),
            _after(transformer.rope, lambda tables: tuple(order.to_tiles(x, 0) for x in tables)),
            _after(transformer.proj_out, lambda x: order.to_raster(x, 1)),
        ]

    def text_lengths(self, geometry: Geometry, given: Mapping[str, Any]) -> torch.Tensor:
        """As the transformer counts them: the valid tokens come first."""
        return given["encoder_attention_mask"].sum(dim=1, dtype=torch.int32)


FAMILIES: tuple[Family, ...] = (Wan(), CogVideoX(), HunyuanVideo())


def family_of(transformer: object) -> Family:
    """The family of a transformer. Raises SvditError for any other object."""
    for family in FAMILIES:
        if isinstance(transformer, family.model):
            return family
    expected = "a pipeline of diffusers with one of " + ", ".join(f.model.__name__ for f in FAMILIES)
    hint = "compile the transformer after the exchange, not before" if hasattr(transformer, "_orig_mod") else ""
    raise complain("transformer", "none" if transformer is None else type(transformer).__name__, expected, hint)


def _after(module: torch.nn.Module, change: Callable[[Any], Any]) -> Any:
    return module.register_forward_hook(lambda module, args, output: change(output))


def _compare(geometry: Geometry, own: Mapping[str, Any], owner: str, hint: str) -> None:
    for name, expected in own.items():
        got = getattr(geometry, name)
        if got != expected:
            raise complain(f"plan geometry.{name}", got, f"{expected}, {owner}", hint)
