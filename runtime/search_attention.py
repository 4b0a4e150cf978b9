"""Attention functions that a search puts into the denoiser: they measure, choose and pass on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from svdit.plans.search import Rule, choose, losses, relative_error
from svdit.plans.tiles import Tiling
from svdit.runtime.attention import DenseAttention, masked_attention, text_bias
from svdit.runtime.tile_errors import TileErrorMeter
from svdit.trt_plugins.reference import sparse_attention


class MapRecorder:
    """Dense attention that adds up tile maps: mass [L, H, nT, nT], mean over calls when divided by `calls`."""

    def __init__(self, meter: TileErrorMeter, tiling: Tiling) -> None:
        geometry = tiling.geometry
        self.dense, self.meter = DenseAttention(tiling), meter
        self.mass = np.zeros((geometry.layers, geometry.heads, tiling.num_tiles, tiling.num_tiles))
        self.none = torch.zeros(
            geometry.heads, 0, tiling.num_tiles, tiling.num_tiles, dtype=torch.bool, device=meter.device
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, stage: Tensor, text_len: Tensor) -> Tensor:
        self.mass[layer] += self.meter.measure(q, k, v, self.none, text_len).mass
        return self.dense(q, k, v, layer, stage, text_len)


class ChoosingAttention:
    """Measures all modes of a layer, applies the rule and returns the chosen outputs.

    masks bool [L or 1, H, M, nT, nT] on the host; sparsity [L, H, M]. After a step, `error` [L, H, M] and
    `power` [L, H] hold what was measured in it. Set `dense` for steps in which every head stays full.
    """

    def __init__(
        self,
        meter: TileErrorMeter,
        tiling: Tiling,
        masks: np.ndarray,
        sparsity: np.ndarray,
        rule: Rule,
        query_tiles: np.ndarray | None,
    ) -> None:
        self.tiling, self.meter, self.rule, self.sparsity = tiling, meter, rule, sparsity
        self.masks = torch.from_numpy(masks).to(meter.device)
        self.query_tiles = None if query_tiles is None else torch.from_numpy(query_tiles).to(meter.device)
        self.error, self.power = np.zeros(sparsity.shape), np.zeros(sparsity.shape[:2])
        self.dense = False
        sizes = torch.as_tensor(tiling.sizes, dtype=torch.int64)
        self.tile_of = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(meter.device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, stage: Tensor, text_len: Tensor) -> Tensor:
        masks = self.masks[layer if len(self.masks) > 1 else 0]
        found = self.meter.measure(q, k, v, masks, text_len, self.query_tiles)
        self.error[layer], self.power[layer] = found.error / found.count, found.power / found.count
        error = relative_error(self.error[layer], self.power[layer], self.rule.normaliser) * self.rule.error_scale
        chosen = choose(losses(error, self.sparsity[layer], self.rule.lam), self.rule.eps)
        if self.dense:
            chosen[:] = masks.shape[1]
        full = torch.ones(1, *masks.shape[2:], dtype=torch.bool, device=masks.device)
        picked = torch.stack([torch.cat([masks[h], full])[m] for h, m in enumerate(chosen.tolist())])
        return self._attend(q, k, v, picked, text_len)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, head_masks: Tensor, text_len: Tensor) -> Tensor:
        if q.is_cuda:
            return masked_attention(q, k, v, head_masks, self.tile_of, text_bias(self.tiling, text_len))
        return gathered_attention(self.tiling, q, k, v, head_masks, text_len)


def gathered_attention(
    tiling: Tiling, q: Tensor, k: Tensor, v: Tensor, head_masks: Tensor, text_len: Tensor
) -> Tensor:
    """The reference op under one tile mask per head ([H, nT, nT] bool): reads kept keys only."""
    distinct, index = np.unique(head_masks.numpy().reshape(len(head_masks), -1), axis=0, return_inverse=True)
    num_tiles = tiling.num_tiles
    ids, rows, tiles, total = [], [np.zeros((2, num_tiles + 1), np.int64)], [np.zeros(0, np.int64)], 0
    for number, flat in enumerate(distinct):
        mask = flat.reshape(num_tiles, num_tiles)
        ids.append(0 if mask.all() else 1 if not mask.any() else number + 2)
        rows.append((total + np.concatenate([[0], np.cumsum(mask.sum(1))]))[None])
        tiles.append(np.nonzero(mask)[1])
        total += len(tiles[-1])
    if not total:
        tiles.append(np.zeros(1, np.int64))

    def table(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))

    head_pattern = table(np.array([ids[i] for i in index.reshape(-1)])[None])
    return sparse_attention(
        q,
        k,
        v,
        torch.zeros(1, dtype=torch.int32),
        text_len,
        head_pattern,
        table(tiling.tile_offsets),
        table(np.concatenate(rows)),
        table(np.concatenate(tiles)),
        torch.full((1, 1), -1, dtype=torch.int32),
        q.shape[-1] ** -0.5,
        tiling.geometry.text_tokens,
        tiling.text_first,
    )
