"""Small random CogVideoX1.5 checkpoints, saved by diffusers itself; the shared one must not be changed in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from svdit.exporter import export
from svdit.plans.schema import dumps

SMALL = {
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 24,
    "text_embed_dim": 40,
    "num_layers": 2,
    "sample_width": 16,
    "sample_height": 12,
    "patch_size": 2,
    "patch_size_t": 2,
    "max_text_seq_length": 7,
    "use_rotary_positional_embeddings": True,
    "patch_bias": False,
}
"""Grids of up to 6 rows and 8 columns."""


def save(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "10GB", **changes) -> Path:
    """A transformer folder with random weights of a spread that makes attention peaky."""
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(**{**SMALL, **changes}).eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if "norm" in name and name.endswith("norm.weight") else 0.0, 0.15)
    for block in model.transformer_blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            torch.nn.init.normal_(norm.weight, 1.0, 0.15)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """float32, one file."""
    return save(tmp_path_factory.mktemp("cogvideox"))


@pytest.fixture
def make(tmp_path) -> Callable[..., Path]:
    """A checkpoint of a test's own, to be damaged at will."""
    return lambda **changes: save(tmp_path / "checkpoint", **changes)


@pytest.fixture(scope="module")
def module_trace():
    """Tracing takes seconds: the three variants of one plan share a trace."""
    original, traces = export.trace_denoiser, {}

    def cached(adapter, checkpoint, plan, precision, batch, report=lambda step: None):
        key = (checkpoint, dumps(plan), precision, batch)
        if key not in traces:
            traces[key] = original(adapter, checkpoint, plan, precision, batch, report)
        return traces[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "trace_denoiser", cached)
        yield
