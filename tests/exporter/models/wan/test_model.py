"""The denoiser against diffusers' own forward, and what must not depend on the tiling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from svdit.exporter.models.registry import adapter
from svdit.exporter.models.wan.config import WanConfig
from svdit.exporter.models.wan.model import apply_rope, rope_tables
from svdit.plans.geometry import Geometry
from svdit.plans.schema import template
from svdit.plans.tiles import Tiling
from svdit.runtime.attention import OpAttention
from tests.exporter import checkpoints
from tests.exporter.graphs import dense
from tests.tolerance import rel_l2

STAGE = torch.zeros(1, dtype=torch.int32)


def inputs(shape, text, batch=2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(batch, *shape, generator=generator)
    timestep = torch.rand(batch, generator=generator) * 1000
    return video, timestep, torch.randn(batch, *text, generator=generator)


def theirs(folder, feed):
    model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        return model(*feed, return_dict=False)[0]


def ours(name, checkpoint, tiling, feed, attention=dense):
    with torch.no_grad():
        return adapter(name).denoiser(checkpoint, tiling, attention)(*feed, STAGE)


@pytest.mark.parametrize("tile", [(1, 4, 4), (2, 3, 5), (4, 1, 6), (1, 8, 16)], ids=str)
def test_tiny_equals_diffusers(tiny_checkpoint, tile):
    model = adapter("tiny")
    geometry = model.geometry(tiny_checkpoint)
    feed = inputs(model.latent_shape(geometry, tiny_checkpoint), model.text_shape(tiny_checkpoint))
    got = ours("tiny", tiny_checkpoint, Tiling(geometry, tile), feed)
    assert rel_l2(got, theirs(tiny_checkpoint / "transformer", feed)) <= 1e-5


@pytest.mark.parametrize("grid", [(3, 5, 7), (1, 8, 4)], ids=str)
def test_wan_equals_diffusers_at_any_resolution(wan_checkpoint, grid):
    geometry = Geometry(grid, 0, "none", 2, 3, 64)
    feed = inputs((16, grid[0], 2 * grid[1], 2 * grid[2]), (9, 48), batch=1)
    got = ours("wan2.1", wan_checkpoint, Tiling(geometry, (1, 2, 4)), feed)
    assert rel_l2(got, theirs(wan_checkpoint, feed)) <= 1e-5


def test_without_cross_attention_norm_and_with_temporal_patches(tmp_path):
    changes = {"cross_attn_norm": False, "patch_size": (3, 2, 2), "attention_head_dim": 32}
    folder = checkpoints.save_wan(tmp_path / "w", **changes)
    geometry = Geometry((2, 4, 4), 0, "none", 2, 3, 32)
    feed = inputs((16, 6, 8, 8), (5, 48))
    got = ours("wan2.1", folder, Tiling(geometry, (1, 2, 4)), feed)
    assert rel_l2(got, theirs(folder, feed)) <= 1e-5


def test_image_to_video_equals_diffusers(tmp_path):
    folder = checkpoints.save_wan(tmp_path / "w", **checkpoints.WAN_I2V)
    geometry = Geometry((3, 5, 7), 0, "none", 2, 3, 64)
    model = adapter("wan2.1")
    specs = model.inputs(folder, geometry, 2)
    assert (specs[-1].name, specs[-1].shape) == ("encoder_hidden_states_image", (2, 257, 20))
    assert model.latent_shape(geometry, folder)[0] == 36 and model.output_shape(geometry, folder)[0] == 16
    feed = inputs((36, 3, 10, 14), (512, 48))  # diffusers tells text from image by a length of 512
    image = torch.randn(2, 257, 20, generator=torch.Generator().manual_seed(8))
    want = theirs(folder, (*feed, image))
    with torch.no_grad():
        denoiser = model.denoiser(folder, Tiling(geometry, (1, 2, 4)), dense)
        got, other = (denoiser(*feed, STAGE, x) for x in (image, -image))
    assert got.shape == want.shape and rel_l2(got, want) <= 1e-5
    assert rel_l2(other, want) > 1e-3


def test_a_full_plan_through_the_operator_equals_dense(tiny_checkpoint):
    model = adapter("tiny")
    geometry = model.geometry(tiny_checkpoint)
    plan = template("tiny", geometry, (1, 4, 4))
    feed = inputs(model.latent_shape(geometry, tiny_checkpoint), model.text_shape(tiny_checkpoint))
    sparse = ours("tiny", tiny_checkpoint, plan.tiling(), feed, OpAttention(plan))
    assert rel_l2(sparse, theirs(tiny_checkpoint / "transformer", feed)) <= 1e-5


def test_attention_can_be_replaced_after_construction(tiny_checkpoint):
    model = adapter("tiny")
    geometry = model.geometry(tiny_checkpoint)
    seen = []

    def spy(q, k, v, layer, stage, text_len):
        seen.append((layer, tuple(q.shape), stage.item(), text_len.tolist()))
        return v

    denoiser = model.denoiser(tiny_checkpoint, Tiling(geometry, (1, 4, 4)), dense)
    denoiser.attention = spy
    feed = inputs(model.latent_shape(geometry, tiny_checkpoint), model.text_shape(tiny_checkpoint))
    with torch.no_grad():
        denoiser(*feed, STAGE + 1)
    assert seen == [(layer, (2, geometry.tokens, 2, 64), 1, [0, 0]) for layer in range(2)]


def test_rope_tables_against_single_angles():
    config = WanConfig(attention_head_dim=64)
    geometry = Geometry((2, 3, 4), 0, "none", 1, 1, 64)
    tiling = Tiling(geometry, (1, 2, 2))
    cos, sin = rope_tables(config, tiling)
    assert cos.shape == sin.shape == (1, 24, 1, 32)
    for place, raster in enumerate(tiling.order):
        t, h, w = raster // 12, raster % 12 // 4, raster % 4
        angles = []
        for position, dim in ((t, 24), (h, 20), (w, 20)):  # 64 = 24 + 20 + 20
            angles += [position / 10000 ** (i / dim) for i in range(0, dim, 2)]
        assert np.allclose(cos[0, place, 0], [math.cos(a) for a in angles], atol=1e-7)
        assert np.allclose(sin[0, place, 0], [math.sin(a) for a in angles], atol=1e-7)


def test_rope_rotates_pairs_and_keeps_lengths():
    x = torch.randn(1, 5, 2, 8)
    angle = torch.rand(1, 5, 1, 4) * 6
    out = apply_rope(x, angle.cos(), angle.sin())
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
    assert torch.allclose(out, torch.view_as_real(pairs).flatten(-2), atol=1e-6)


def test_half_precision_keeps_float32_islands(tiny_checkpoint):
    model = adapter("tiny")
    tiling = Tiling(model.geometry(tiny_checkpoint), (1, 4, 4))
    denoiser = model.denoiser(tiny_checkpoint, tiling, dense, dtype="bfloat16")
    kinds = {name: p.dtype for name, p in denoiser.named_parameters()}
    assert kinds["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert kinds["blocks.1.scale_shift_table"] == torch.float32
    assert kinds["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    feed = inputs(model.latent_shape(tiling.geometry, tiny_checkpoint), model.text_shape(tiny_checkpoint))
    with torch.no_grad():
        got = denoiser(*feed, STAGE)
    assert got.dtype == torch.float32
    assert rel_l2(got, theirs(tiny_checkpoint / "transformer", feed)) <= 3e-2
