"""Errors after the output projection, for every model whose denoiser the exporter builds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from svdit.exporter.models import registry
from svdit.plans.tiles import Tiling
from svdit.runtime.projections import output_power, output_weights, projected_heads


def test_a_projected_head_has_the_length_of_its_part_of_the_output():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 24, generator=generator)  # C = 20, three heads of 8
    out = torch.randn(2, 7, 3, 8, generator=generator)
    found = torch.einsum("bnhd,hde->bnhe", out, projected_heads(weight, 3)).square().sum(-1)
    for head in range(3):
        part = out[:, :, head] @ weight[:, 8 * head : 8 * head + 8].T
        np.testing.assert_allclose(found[:, :, head].numpy(), part.square().sum(-1).numpy(), rtol=1e-4)
    whole = (out.flatten(2) @ weight.T).square().sum()
    assert output_power(out, weight) == pytest.approx(float(whole) / out.numel(), rel=1e-5)


def test_a_head_that_reaches_nothing_has_no_length():
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    weight[:, :4] = 0
    assert projected_heads(weight, 2)[0].abs().max() == 0


@pytest.mark.parametrize("name", ["tiny", "wan2.1", "hunyuan", "cogvideox1.5"])
def test_every_model_gives_one_weight_a_layer(name):
    """On the meta device, at the published sizes: as many as attention layers, [width, heads * head_dim] each."""
    adapter = registry.adapter(name)
    packaged = adapter.packaged_checkpoint()
    geometry = adapter.published.geometry(adapter.latent) if packaged is None else adapter.geometry(packaged)
    config = adapter.published
    with torch.device("meta"):
        model = adapter.parts().denoiser(config, Tiling(geometry, adapter.default_tile()), None, torch.float32)
    weights = output_weights(model)
    width = geometry.heads * geometry.head_dim
    assert [tuple(w.shape) for w in weights] == [(width, width)] * geometry.layers
