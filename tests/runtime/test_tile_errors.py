"""Errors of many patterns from one pass, against float64 attention under token masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, Full, MultiDiagonal, Skip, Stripe
from svdit.plans.tiles import Tiling
from svdit.runtime import tile_errors
from svdit.runtime.attention import masked_attention, text_bias
from svdit.runtime.search_attention import gathered_attention
from svdit.runtime.tile_errors import TileErrorMeter

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
    np.testing.assert_allclose(found.power, np.square(full).sum((0, 1, 3)), rtol=1e-5)
    for m in range(len(PATTERNS)):
        keep = np.stack([token_mask(tiling, masks[h, m]) for h in range(2)])
        out, _ = brute(q, k, v, keep, hidden)
        np.testing.assert_allclose(found.error[:, m], np.square(out - full).sum((0, 1, 3)), rtol=2e-4, atol=1e-6)
    mass = np.add.reduceat(np.add.reduceat(weights.mean(0), tiling.tile_offsets[:-1], 1), tiling.tile_offsets[:-1], 2)
    np.testing.assert_allclose(found.mass, mass / tiling.sizes[:, None], rtol=1e-4, atol=1e-7)
    assert found.count == 2 * geometry.tokens * geometry.head_dim


def test_sampled_query_tiles_count_only_their_rows():
    geometry, tile = CASES["border"]
    tiling = Tiling(geometry, tile)
    q, k, v = (torch.from_numpy(x).float() for x in tensors(geometry))
    masks = torch.from_numpy(np.stack([np.stack([tiling.mask(p) for p in PATTERNS])] * 2))
    meter = TileErrorMeter(tiling)
    parts = [
        meter.measure(q, k, v, masks, None, torch.tensor(tiles))
        for tiles in ([0, 3], [1, 2], [4, 5, 6, 7, 8, 9, 10, 11])
    ]
    whole = meter.measure(q, k, v, masks)
    np.testing.assert_allclose(sum(p.error for p in parts), whole.error, rtol=1e-5, atol=1e-8)
    assert sum(p.count for p in parts) == whole.count


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
