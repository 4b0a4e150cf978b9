"""Errors of many patterns from one pass, against float64 attention under token masks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, Full, MultiDiagonal, Skip, Stripe
from svdit.plans.tiles import Tiling
from svdit.runtime import tile_errors
from svdit.runtime.attention import masked_attention, text_bias
from svdit.runtime.search_attention import gathered_attention
from svdit.runtime.tile_errors import TileErrorMeter, TileErrors, sample_tiles

CASES = {
    "even": (Geometry((3, 4, 4), 0, "none", 1, 2, 16), (1, 2, 2)),
    "border": (Geometry((3, 5, 7), 0, "none", 1, 2, 16), (2, 2, 4)),
    "text before": (Geometry((2, 3, 4), 9, "before", 1, 2, 16), (1, 2, 4)),
    "text after": (Geometry((2, 3, 4), 130, "after", 1, 2, 16), (1, 2, 2)),
}
PATTERNS = (
    Skip(),
    Diagonal(),
    Diagonal(frames=1, rows=0),
    MultiDiagonal(rows=0, cols=0),
    Stripe(columns=[[1, 2]]),
    Full(),
)


def tensors(geometry: Geometry, batch: int = 2, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal((batch, geometry.tokens, geometry.heads, geometry.head_dim)) * 2 for _ in range(3)]


def brute(q, k, v, keep: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 outputs [B, N, H, D] and probabilities [B, H, N, N] under token mask keep [H, N, N], hidden [B, N]."""
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(keep[None] & ~hidden[:, None, None], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return np.einsum("bhnm,bmhd->bnhd", weights, v), weights


def token_mask(tiling: Tiling, mask: np.ndarray) -> np.ndarray:
    return mask.repeat(tiling.sizes, 0).repeat(tiling.sizes, 1)


def hidden_keys(geometry: Geometry, text_len: list[int]) -> np.ndarray:
    hidden = np.zeros((len(text_len), geometry.tokens), dtype=bool)
    start = geometry.video_tokens if geometry.text_position == "after" else 0
    for b, length in enumerate(text_len):
        hidden[b, start + length : start + geometry.text_tokens] = True
    return hidden


@pytest.mark.parametrize("chunk", [1, 10**9])
@pytest.mark.parametrize("case", CASES)
def test_errors_power_and_mass_against_brute_force(case, chunk, monkeypatch):
    monkeypatch.setitem(tile_errors.CHUNK_BYTES, "cpu", chunk)
    geometry, tile = CASES[case]
    tiling = Tiling(geometry, tile)
    lengths = [geometry.text_tokens, geometry.text_tokens // 2]
    q, k, v = tensors(geometry)
    hidden = hidden_keys(geometry, lengths)
    masks = np.stack([np.stack([tiling.mask(p) for p in PATTERNS]), np.stack([tiling.mask(p) for p in PATTERNS[::-1]])])
    found = TileErrorMeter(tiling).measure(
        *(torch.from_numpy(x).float() for x in (q, k, v)),
        torch.from_numpy(masks),
        torch.tensor(lengths, dtype=torch.int32),
    )
    everything = np.ones((geometry.heads, geometry.tokens, geometry.tokens), dtype=bool)
    full, weights = brute(q, k, v, everything, hidden)
    np.testing.assert_allclose(found.power.sum(-1), np.square(full).sum((0, 1, 3)), rtol=1e-5)
    for m in range(len(PATTERNS)):
        keep = np.stack([token_mask(tiling, masks[h, m]) for h in range(2)])
        out, _ = brute(q, k, v, keep, hidden)
        squared = np.add.reduceat(np.square(out - full).sum((0, 3)), tiling.tile_offsets[:-1], 0).T
        np.testing.assert_allclose(found.error[:, m], squared, rtol=2e-4, atol=1e-6)
    mass = np.add.reduceat(np.add.reduceat(weights.mean(0), tiling.tile_offsets[:-1], 1), tiling.tile_offsets[:-1], 2)
    np.testing.assert_allclose(found.mass, mass / tiling.sizes[:, None], rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(found.count, 2 * tiling.sizes * geometry.head_dim)


def test_sampled_query_tiles_are_those_of_the_whole():
    geometry, tile = CASES["border"]
    tiling = Tiling(geometry, tile)
    q, k, v = (torch.from_numpy(x).float() for x in tensors(geometry))
    masks = torch.from_numpy(np.stack([np.stack([tiling.mask(p) for p in PATTERNS])] * 2))
    meter = TileErrorMeter(tiling)
    whole = meter.measure(q, k, v, masks)
    for tiles in ([0, 3], [1, 2], [4, 5, 6, 7, 8, 9, 10, 11]):
        part = meter.measure(q, k, v, masks[:, :, tiles], None, torch.tensor(tiles))
        np.testing.assert_allclose(part.error, whole.error[..., tiles], rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(part.power, whole.power[..., tiles], rtol=1e-5)
        np.testing.assert_allclose(part.mass, whole.mass[:, tiles], rtol=1e-5, atol=1e-8)
        np.testing.assert_array_equal(part.count, whole.count[tiles])


def test_projected_values_are_projected_outputs():
    geometry, tile = CASES["border"]
    tiling = Tiling(geometry, tile)
    q, k, v = tensors(geometry)
    project = np.random.default_rng(5).standard_normal((2, 16, 16))
    masks = np.stack([np.stack([tiling.mask(p) for p in PATTERNS])] * 2)
    inputs = [torch.from_numpy(x).float() for x in (q, k, v)]
    found = TileErrorMeter(tiling).measure(
        *inputs, torch.from_numpy(masks), project=torch.from_numpy(project).float()
    )
    nothing = np.zeros((2, geometry.tokens), dtype=bool)
    full, _ = brute(q, k, v, np.ones((2, geometry.tokens, geometry.tokens), dtype=bool), nothing)
    for m in range(len(PATTERNS)):
        out, _ = brute(q, k, v, np.stack([token_mask(tiling, masks[h, m]) for h in range(2)]), nothing)
        error = np.square(np.einsum("bnhd,hde->bnhe", out - full, project)).sum((0, 1, 3))
        np.testing.assert_allclose(found.error[:, m].sum(-1), error, rtol=2e-4, atol=1e-5)


def test_standard_error_is_the_spread_of_sampled_estimates():
    """Every sample of 4 of the 12 tiles: their mean is the exhaustive value, their spread the mean reported one."""
    geometry, tile = CASES["border"]
    tiling = Tiling(geometry, tile)
    q, k, v = (torch.from_numpy(x).float() for x in tensors(geometry))
    masks = torch.from_numpy(np.stack([np.stack([tiling.mask(p) for p in PATTERNS[:5]])] * 2))
    meter = TileErrorMeter(tiling)
    whole = meter.measure(q, k, v, masks)
    assert (whole.deviation(tiling.num_tiles) == 0).all()
    found, reported = [], []
    for tiles in itertools.combinations(range(tiling.num_tiles), 4):
        picked = list(tiles)
        part = TileErrors(*(x[..., picked] for x in (whole.error, whole.power, whole.count)), whole.mass[:, picked])
        found.append(part.means()[0])
        reported.append(part.deviation(tiling.num_tiles))
    exact = whole.means()[0]
    spread = np.sqrt(np.square(np.array(found) - exact).mean(0))
    np.testing.assert_allclose(np.mean(found, axis=0), exact, rtol=0.06)  # a ratio's bias
    np.testing.assert_allclose(np.sqrt(np.square(reported).mean(0)), spread, rtol=0.25)
    one = TileErrors(*(x[..., :1] for x in (whole.error, whole.power, whole.count)), whole.mass[:, :1])
    assert np.isnan(one.deviation(tiling.num_tiles)).all()


def test_samples_of_tiles_are_seeded_and_without_repeats():
    drawn = sample_tiles(100, 20, (3, 1, 2))
    assert len(set(drawn.tolist())) == 20 and (np.diff(drawn) > 0).all() and drawn.min() >= 0 and drawn.max() < 100
    np.testing.assert_array_equal(drawn, sample_tiles(100, 20, (3, 1, 2)))
    assert not np.array_equal(drawn, sample_tiles(100, 20, (3, 2, 2)))
    np.testing.assert_array_equal(sample_tiles(5, None, (0,)), np.arange(5))


@pytest.mark.parametrize("case", CASES)
def test_attention_by_masks_and_by_gathering_agree_with_brute_force(case):
    geometry, tile = CASES[case]
    tiling = Tiling(geometry, tile)
    lengths = [geometry.text_tokens // 3, geometry.text_tokens]
    q, k, v = tensors(geometry, seed=1)
    for pair in ((0, 1), (2, 5), (3, 3), (4, 0), (5, 5), (0, 0)):
        masks = torch.from_numpy(np.stack([tiling.mask(PATTERNS[p]) for p in pair]))
        expected, _ = brute(
            q, k, v, np.stack([token_mask(tiling, m) for m in masks.numpy()]), hidden_keys(geometry, lengths)
        )
        inputs, text = [torch.from_numpy(x).float() for x in (q, k, v)], torch.tensor(lengths, dtype=torch.int32)
        tile_of = torch.repeat_interleave(torch.arange(tiling.num_tiles), torch.from_numpy(tiling.sizes).long())
        by_mask = masked_attention(*inputs, masks, tile_of, text_bias(tiling, text))
        by_list = gathered_attention(tiling, *inputs, masks, text)
        np.testing.assert_allclose(by_mask.numpy(), expected, rtol=0, atol=2e-5)
        np.testing.assert_allclose(by_list.numpy(), expected, rtol=0, atol=2e-5)
