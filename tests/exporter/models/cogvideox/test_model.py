"""The denoiser against diffusers' own forward, with the positions that diffusers' pipeline makes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from svdit.exporter.models.cogvideox.config import PUBLISHED, CogVideoXConfig
from svdit.exporter.models.cogvideox.model import CogVideoXDenoiser, apply_rope, rope_tables
from svdit.exporter.models.registry import adapter
from svdit.plans.geometry import Geometry
from svdit.plans.schema import template
from svdit.plans.tiles import Tiling
from svdit.runtime.attention import OpAttention
from tests.exporter.graphs import dense
from tests.exporter.models.cogvideox.conftest import SMALL
from tests.tolerance import rel_l2

STAGE = torch.zeros(1, dtype=torch.int32)
GRID = (3, 5, 7)
MODEL = adapter("cogvideox1.5")


def geometry_of(grid, text=7, heads=3, head_dim=64):
    return Geometry(grid, text, "before", 2, heads, head_dim)


def inputs(checkpoint, geometry, batch=2):
    generator = torch.Generator().manual_seed(3)
    video = torch.randn(batch, *MODEL.latent_shape(geometry, checkpoint), generator=generator)
    text = torch.randn(batch, *MODEL.text_shape(checkpoint), generator=generator)
    return video, torch.tensor([907.0, 42.0])[:batch], text


def pipeline_rope(transformer, latent):
    """cos and sin [V, D] as the pipeline's own method makes them for latents of (f, h, w)."""
    pipe = CogVideoXPipeline.__new__(CogVideoXPipeline)
    object.__setattr__(pipe, "transformer", transformer)
    object.__setattr__(pipe, "vae_scale_factor_spatial", 8)
    f, h, w = latent
    return pipe._prepare_rotary_positional_embeddings(8 * h, 8 * w, f, torch.device("cpu"))


def theirs(folder, feed):
    """diffusers' output for [B, C, f, h, w] latents, in the same order of axes."""
    video, timestep, text, *ofs = feed
    model = CogVideoXTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    options = {"image_rotary_emb": pipeline_rope(model, video.shape[2:]), "ofs": ofs[0] if ofs else None}
    with torch.no_grad():
        out = model(video.transpose(1, 2), text, timestep, **options, return_dict=False)[0]
    return out.transpose(1, 2)


def ours(folder, tiling, feed, attention=dense, dtype="float32"):
    with torch.no_grad():
        return MODEL.denoiser(folder, tiling, attention, dtype=dtype)(*feed[:3], STAGE, *feed[3:])


@pytest.mark.parametrize(
    ("grid", "tile"),
    [(GRID, (1, 2, 4)), (GRID, (2, 3, 5)), (GRID, (1, 8, 16)), ((1, 6, 8), (1, 4, 4)), ((2, 6, 4), (2, 2, 3))],
    ids=str,
)
def test_equals_diffusers(checkpoint, grid, tile):
    geometry = geometry_of(grid)
    feed = inputs(checkpoint, geometry)
    assert rel_l2(ours(checkpoint, Tiling(geometry, tile), feed), theirs(checkpoint, feed)) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"max_text_seq_length": 130, "attention_head_dim": 32, "num_attention_heads": 2},
        {"attention_bias": False, "flip_sin_to_cos": False, "freq_shift": 1, "dropout": 0.1},
        {"patch_size_t": 1, "norm_eps": 1e-2, "sample_frames": 9},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_configs_equal_diffusers(make, changes):
    folder = make(**changes)
    config = {**SMALL, **changes}
    geometry = geometry_of(
        (2, 3, 5), config["max_text_seq_length"], config["num_attention_heads"], config["attention_head_dim"]
    )
    feed = inputs(folder, geometry)
    assert rel_l2(ours(folder, Tiling(geometry, (1, 2, 4)), feed), theirs(folder, feed)) <= 1e-5


def test_image_to_video_equals_diffusers(make):
    folder = make(in_channels=8, ofs_embed_dim=24)
    geometry = geometry_of(GRID)
    specs = MODEL.inputs(folder, geometry, 2)
    assert (specs[-1].name, specs[-1].shape) == ("ofs", (2,))
    feed = (*inputs(folder, geometry), torch.tensor([2.0, 3.0]))
    want = theirs(folder, feed)
    got = ours(folder, Tiling(geometry, (1, 2, 4)), feed)
    assert feed[0].shape[1] == 8 and got.shape[1] == 4
    assert rel_l2(got, want) <= 1e-5
    assert rel_l2(ours(folder, Tiling(geometry, (1, 2, 4)), (*feed[:3], feed[3] + 1)), want) > 1e-3


def test_sharded_half_precision_checkpoint_equals_diffusers(make):
    folder = make(dtype=torch.bfloat16, shard="500KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    geometry = geometry_of(GRID)
    feed = inputs(folder, geometry, batch=1)
    assert rel_l2(ours(folder, Tiling(geometry, (1, 2, 4)), feed), theirs(folder, feed)) <= 1e-5


def test_pipeline_folder(make):
    folder = make()
    pipeline = folder.with_name("pipeline")
    pipeline.mkdir()
    folder.rename(pipeline / "transformer")
    geometry = geometry_of((1, 2, 3))
    feed = inputs(pipeline, geometry)
    got = ours(pipeline, Tiling(geometry, (1, 2, 2)), feed)
    assert rel_l2(got, theirs(pipeline / "transformer", feed)) <= 1e-5


def test_a_full_plan_through_the_operator_equals_dense(checkpoint):
    geometry = geometry_of(GRID)
    plan = template(MODEL.name, geometry, (1, 2, 4))
    feed = inputs(checkpoint, geometry)
    got = ours(checkpoint, plan.tiling(), feed, OpAttention(plan))
    assert rel_l2(got, theirs(checkpoint, feed)) <= 1e-5


def test_attention_sees_the_joint_sequence_text_first(checkpoint):
    geometry = geometry_of(GRID)
    feed = inputs(checkpoint, geometry)
    seen = []

    def spy(q, k, v, layer, stage, text_len):
        seen.append((layer, tuple(q.shape), stage.item(), text_len.tolist()))
        values.append(v)
        return v

    def first_values(feed):
        values.clear()
        with torch.no_grad():
            denoiser(*feed, STAGE)
        return values[0]

    values = []
    denoiser = MODEL.denoiser(checkpoint, Tiling(geometry, (1, 2, 4)), dense)
    denoiser.attention = spy
    before = first_values(feed)
    assert seen == [(layer, (2, 7 + 105, 3, 64), 0, [7, 7]) for layer in range(2)]
    after = first_values((feed[0], feed[1], feed[2] + 1))
    changed = (before != after).flatten(2).any(2)
    assert changed[:, :7].all() and not changed[:, 7:].any()


def test_padding_of_the_text_attends(checkpoint):
    """No mask: what stands in the last text token matters to the video."""
    geometry = geometry_of((1, 2, 3))
    video, timestep, text = inputs(checkpoint, geometry)
    other = text.clone()
    other[:, -1] += 1
    tiling = Tiling(geometry, (1, 2, 2))
    change = rel_l2(
        ours(checkpoint, tiling, (video, timestep, other)), ours(checkpoint, tiling, (video, timestep, text))
    )
    assert change > 1e-3


def test_rope_tables_equal_diffusers_in_tile_order():
    config = CogVideoXConfig(**SMALL)
    tiling = Tiling(geometry_of(GRID), (1, 2, 4))
    cos, sin = rope_tables(config, tiling)
    assert cos.shape == sin.shape == (1, 7 + 105, 1, 32)
    assert (cos[0, :7] == 1).all() and (sin[0, :7] == 0).all()
    theirs = get_3d_rotary_pos_embed(64, None, GRID[1:], GRID[0], grid_type="slice", max_size=(6, 8))
    for got, want in zip((cos, sin), theirs, strict=True):
        assert (torch.from_numpy(got[0, 7:, 0])[tiling.inverse] - want[:, ::2]).abs().max() <= 1e-7


def test_rope_rotates_pairs():
    x, angle = torch.randn(1, 5, 2, 8), torch.rand(1, 5, 1, 4) * 6
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
    got = apply_rope(x, angle.cos(), angle.sin())
    assert torch.allclose(got, torch.view_as_real(pairs).flatten(-2), atol=1e-6)


def test_half_precision(checkpoint):
    geometry = geometry_of((1, 3, 5))
    denoiser = MODEL.denoiser(checkpoint, Tiling(geometry, (1, 2, 4)), dense, dtype="bfloat16")
    assert {p.dtype for p in denoiser.parameters()} == {torch.bfloat16}
    feed = inputs(checkpoint, geometry)
    with torch.no_grad():
        got = denoiser(*feed, STAGE)
    assert got.dtype == torch.float32
    assert rel_l2(got, theirs(checkpoint, feed)) <= 3e-2


def test_config_as_diffusers_writes_it():
    """Every argument of the class in the file, with the published sizes; nothing else changes on the way."""
    arguments = dataclasses.asdict(PUBLISHED)
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**arguments)
    written = json.loads(model.to_json_string())
    assert {key for key in written if not key.startswith("_")} == set(arguments)
    assert CogVideoXConfig.from_json({**written, "sample_height": 300}, "config.json").largest() == (150, 85)
    with torch.device("meta"):
        ours = CogVideoXDenoiser(PUBLISHED, Tiling(geometry_of((1, 1, 1), 226, 48), (1, 1, 1)), dense, torch.bfloat16)
    theirs = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == theirs


def test_reference_geometry():
    """81 frames of 768 x 1360: 21 latent frames padded to 22."""
    geometry = PUBLISHED.geometry((22, 96, 170))
    assert geometry == Geometry((11, 48, 85), 226, "before", 42, 48, 64)
    assert geometry.tokens == 45_106
    assert MODEL.latent_shape(geometry) == (16, 22, 96, 170)
