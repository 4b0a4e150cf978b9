"""Every way a checkpoint or plan can be wrong for CogVideoX1.5, and what is said about it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdit.exporter.models.registry import adapter
from svdit.plans.errors import SvditError
from svdit.plans.geometry import Geometry
from svdit.plans.tiles import Tiling
from tests.exporter.graphs import dense

MODEL = adapter("cogvideox1.5")
GEOMETRY = Geometry((2, 3, 4), 7, "before", 2, 3, 64)


def refused(folder, message, geometry=GEOMETRY):
    with pytest.raises(SvditError, match=message):
        MODEL.traced_denoiser(folder, Tiling(geometry, (1, 2, 4)), dense, dtype="float32")


def edit_config(folder, **changes):
    """Put changes into config.json; a value of ... removes the key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_weights(folder, change):
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


CONFIGS = {
    "1.0": (
        {"patch_size_t": None},
        r"\$\.patch_size_t: got null, which is CogVideoX 1\.0; expected .*; CogVideoX1\.5 is supported",
    ),
    "1.0, key left out": ({"patch_size_t": ...}, r"patch_size_t: got null, which is CogVideoX 1\.0"),
    "I2V ofs": (
        {"ofs_embed_dim": 512},
        r"\$\.ofs_embed_dim: got 512; expected null or time_embed_dim, 24; the two are added",
    ),
    "I2V channels": ({"in_channels": 8}, r"\$\.in_channels: got 8; expected out_channels, 4; more channels"),
    "another class": (
        {"_class_name": "WanTransformer3DModel"},
        r'\$\._class_name: got "WanTransformer3DModel"; expected "CogVideoXTransformer3DModel"; CogVideoX1',
    ),
    "no RoPE": (
        {"use_rotary_positional_embeddings": False},
        r"\$\.use_rotary_positional_embeddings: got false; expected true",
    ),
    "learned positions": (
        {"use_learned_positional_embeddings": True},
        r"\$\.use_learned_positional_embeddings: got true; expected false",
    ),
    "activation": ({"activation_fn": "geglu"}, r'\$\.activation_fn: got "geglu"; expected "gelu-approximate"'),
    "plain norms": ({"norm_elementwise_affine": False}, r"\$\.norm_elementwise_affine: got false; expected true"),
    "head width": ({"attention_head_dim": 24}, r"\$\.attention_head_dim: got 24; expected a multiple of 16"),
    "epsilon": ({"norm_eps": 0}, r"\$\.norm_eps: got 0; expected a positive number"),
    "shift": ({"freq_shift": 96}, r"\$\.freq_shift: got 96; expected less than half the width, 96"),
    "layers": ({"num_layers": 0}, r"\$\.num_layers: got 0"),
    "bias": ({"attention_bias": 1}, r"\$\.attention_bias: got 1"),
    "unknown key": ({"pooled_projection_dim": 768}, r"\$\.pooled_projection_dim: got an unknown key; expected one of"),
}


@pytest.mark.parametrize("case", CONFIGS, ids=str)
def test_config(make, case):
    changes, message = CONFIGS[case]
    folder = make()
    edit_config(folder, **changes)
    refused(folder, rf"config\.json: {message}" if message.startswith(r"\$") else message)


BIAS = "transformer_blocks.1.attn1.norm_k.bias"
WEIGHTS = {
    "missing": (lambda t: t.pop(BIAS), rf"1 missing key\(s\): -{BIAS}; expected exactly the \d+ keys"),
    "left over": (
        lambda t: t.update({"ofs_embedding.linear_1.weight": torch.zeros(2, 2)}),
        r"1 unknown key\(s\): \+ofs_embedding\.linear_1\.weight",
    ),
    "another name": (
        lambda t: t.update({"patch_embed.projection.weight": t.pop("patch_embed.proj.weight")}),
        r"1 missing and 1 unknown key\(s\): -patch_embed\.proj\.weight, \+patch_embed\.projection\.weight",
    ),
    "another shape": (
        lambda t: t.update({"patch_embed.proj.weight": torch.zeros(192, 4, 2, 2)}),
        r"patch_embed\.proj\.weight: got \[192, 4, 2, 2\]; expected shape \[192, 32\]",
    ),
    "another type": (lambda t: t.update({BIAS: torch.zeros(64, dtype=torch.int8)}), rf'{BIAS}: dtype: got "I8"'),
}


@pytest.mark.parametrize("case", WEIGHTS, ids=str)
def test_weights(make, case):
    change, message = WEIGHTS[case]
    folder = make()
    edit_weights(folder, change)
    refused(folder, message)


def test_missing_shard(make):
    folder = make(shard="500KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()
    refused(folder, r"-00002-of-")


def test_checkpoint_of_another_size(make):
    """A config that names more layers than the file has."""
    folder = make()
    edit_config(folder, num_layers=3)
    refused(folder, r"missing key\(s\): -transformer_blocks\.2", Geometry((2, 3, 4), 7, "before", 3, 3, 64))


PLANS = {
    "layers": (Geometry((2, 3, 4), 7, "before", 3, 3, 64), r"plan geometry\.layers: got 3; expected 2"),
    "text after": (
        Geometry((2, 3, 4), 7, "after", 2, 3, 64),
        r"plan geometry\.text_position: got after; expected before",
    ),
    "text": (Geometry((2, 3, 4), 226, "before", 2, 3, 64), r"plan geometry\.text_tokens: got 226; expected 7"),
    "rows": (Geometry((2, 7, 4), 7, "before", 2, 3, 64), r"grid\[1\]: got 7; expected at most 6, the sample_height"),
    "columns": (Geometry((2, 6, 9), 7, "before", 2, 3, 64), r"grid\[2\]: got 9; expected at most 8, the sample_width"),
}


@pytest.mark.parametrize("case", PLANS, ids=str)
def test_plan(checkpoint, case):
    geometry, message = PLANS[case]
    refused(checkpoint, message, geometry)


def test_latents_that_patches_do_not_divide(checkpoint):
    with pytest.raises(SvditError, match="latent frames: got 21; expected a positive multiple of the patch size 2"):
        MODEL.config(checkpoint).geometry((21, 96, 170))


def test_what_is_left_to_the_pipeline(checkpoint):
    with pytest.raises(SvditError, match=r"encode text for cogvideox1\.5; expected embeddings made by diffusers"):
        MODEL.encode_prompts(checkpoint, ["a panda"])
    with pytest.raises(SvditError, match=r"decode video for cogvideox1\.5; expected diffusers' pipeline"):
        MODEL.decode(checkpoint, torch.zeros(1, 4, 2, 2, 2))
    with pytest.raises(SvditError, match=r"no scheduler/scheduler_config\.json; expected a pipeline folder"):
        MODEL.sampling(checkpoint).scheduler()
