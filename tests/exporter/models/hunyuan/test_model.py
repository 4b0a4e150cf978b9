"""The denoiser against diffusers' own forward, and what must not depend on the tiling or on padding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel

from svdit.exporter.models.hunyuan.config import HunyuanConfig
from svdit.exporter.models.hunyuan.model import rope_tables
from svdit.exporter.models.registry import adapter
from svdit.plans.geometry import Geometry
from svdit.plans.schema import template
from svdit.plans.tiles import Tiling
from svdit.runtime.attention import OpAttention
from tests.exporter.models.hunyuan import checkpoints as small
from tests.tolerance import rel_l2

STAGE = torch.zeros(1, dtype=torch.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save(tmp_path_factory.mktemp("hunyuan"))


def masked_dense(q, k, v, layer, stage, text_len):
    """Every query against every key but the padding of the text, written out."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    last = q.shape[1] - small.TEXT + text_len
    scores = scores.masked_fill(torch.arange(q.shape[1]) >= last[:, None, None, None], -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def theirs(folder, feed):
    model = HunyuanVideoTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        return model(**feed, return_dict=False)[0]


def ours(folder, tiling, feed, attention=masked_dense, **options):
    with torch.no_grad():
        return adapter("hunyuan").denoiser(folder, tiling, attention, **options)(**feed, stage=STAGE)


@pytest.mark.parametrize("tile", [(1, 4, 4), (2, 3, 5), (3, 1, 7), (1, 8, 16)], ids=str)
def test_equals_diffusers_in_any_tile_order(folder, tile):
    feed = small.feed()
    assert rel_l2(ours(folder, Tiling(small.geometry(), tile), feed), theirs(folder, feed)) <= 1e-5


def test_a_full_plan_through_the_operator_equals_diffusers(folder):
    plan = template("hunyuan", small.geometry(), (1, 4, 4))
    feed = small.feed()
    got = ours(folder, plan.tiling(), feed, OpAttention(plan))
    assert rel_l2(got, theirs(folder, feed)) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_embeds": False},
        {"patch_size_t": 3, "rope_theta": 100.0, "num_refiner_layers": 1},
        {"image_condition_type": "latent_concat", "in_channels": 9},
        {"image_condition_type": "token_replace"},
        {"guidance_embeds": False, "image_condition_type": "token_replace"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_other_sizes_equal_diffusers(tmp_path, changes):
    folder = small.save(tmp_path / "h", **changes)
    feed = small.feed(channels=changes.get("in_channels", 4), guidance=changes.get("guidance_embeds", True))
    grid = small.GRID
    if "patch_size_t" in changes:
        grid = (1, *grid[1:])
    want = theirs(folder, feed)
    for tile in ((1, 2, 4), (2, 3, 5)):
        got = ours(folder, Tiling(small.geometry(grid), tile), feed)
        assert got.shape == want.shape and rel_l2(got, want) <= 1e-5


def test_the_mask_matters_and_padding_is_never_seen(folder):
    tiling, feed = Tiling(small.geometry(), (1, 4, 4)), small.feed()
    other = {**feed, "encoder_hidden_states": feed["encoder_hidden_states"].clone()}
    other["encoder_hidden_states"][0, small.VALID[0] :] += 5.0
    assert torch.equal(ours(folder, tiling, feed), ours(folder, tiling, other))
    longer = {**feed, "encoder_attention_mask": torch.ones_like(feed["encoder_attention_mask"])}
    assert rel_l2(ours(folder, tiling, longer), ours(folder, tiling, feed)) > 1e-3


def test_layers_stage_and_text_length_reach_the_attention(folder):
    seen = []

    def spy(q, k, v, layer, stage, text_len):
        seen.append((layer, tuple(q.shape), stage.item(), text_len.tolist(), text_len.dtype))
        return v

    denoiser = adapter("hunyuan").denoiser(folder, Tiling(small.geometry(), (1, 4, 4)), masked_dense)
    denoiser.attention = spy
    with torch.no_grad():
        denoiser(**small.feed(), stage=STAGE + 1)
    shape = (2, small.geometry().tokens, 2, 64)
    assert seen == [(layer, shape, 1, list(small.VALID), torch.int32) for layer in range(small.LAYERS)]


def test_rope_tables_against_single_angles():
    config = HunyuanConfig(attention_head_dim=16, rope_axes_dim=(4, 4, 8), rope_theta=256.0)
    tiling = Tiling(Geometry((2, 3, 4), 5, "after", 1, 1, 16), (1, 2, 2))
    cos, sin = rope_tables(config, tiling)
    assert cos.shape == sin.shape == (1, 29, 1, 8)
    for place, raster in enumerate(tiling.order):
        t, h, w = raster // 12, raster % 12 // 4, raster % 4
        angles = [p / 256.0 ** (i / dim) for p, dim in ((t, 4), (h, 4), (w, 8)) for i in range(0, dim, 2)]
        assert np.allclose(cos[0, place, 0], [math.cos(a) for a in angles], atol=1e-7)
        assert np.allclose(sin[0, place, 0], [math.sin(a) for a in angles], atol=1e-7)
    assert (cos[0, 24:] == 1).all() and (sin[0, 24:] == 0).all()


def test_half_precision_is_as_near_as_diffusers_own(folder):
    feed = small.feed()
    got = ours(folder, Tiling(small.geometry(), (1, 4, 4)), feed, dtype="bfloat16")
    model = HunyuanVideoTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).eval()
    half = {k: v if k in ("timestep", "encoder_attention_mask") else v.bfloat16() for k, v in feed.items()}
    with torch.no_grad():
        half_theirs = model(**half, return_dict=False)[0].float()
    truth = theirs(folder, feed)
    assert got.dtype == torch.float32
    assert rel_l2(got, truth) <= 1.5 * rel_l2(half_theirs, truth)


def test_reference_geometry(folder):
    model = adapter("hunyuan")
    own = model.geometry(folder)
    assert own == Geometry((33, 45, 80), 256, "after", 5, 2, 64) and own.video_tokens == 118_800
    published = model.published.geometry((33, 90, 160))
    assert (published.layers, published.heads, published.head_dim, published.tokens) == (60, 24, 128, 119_056)
    assert model.latent_shape(published) == (16, 33, 90, 160)
