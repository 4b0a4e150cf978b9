"""Attention functions that a search puts into the denoiser: they measure, choose and pass on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from svdit.plans.maps import map_bins, pooled
from svdit.plans.schema import template
from svdit.plans.search import Rule, choose, losses, relative_error
from svdit.plans.tiles import Tiling
from svdit.runtime.attention import DenseAttention, OpAttention, masked_attention, text_bias
from svdit.runtime.mode_masks import ModeMasks
from svdit.runtime.projections import output_power, projected_heads
from svdit.runtime.tile_errors import TileErrorMeter, sample_tiles
from svdit.trt_plugins import cuda_library
from svdit.trt_plugins.reference import sparse_attention

Attention = Callable[[Tensor, Tensor, Tensor, int, Tensor, Tensor], Tensor]


def full_attention(tiling: Tiling, device: str, dtype: str) -> Attention:
    """Dense attention: by the compiled kernel on a GPU in half precision where it is found, else torch's."""
    if torch.device(device).type == "cuda" and dtype != "float32" and cuda_library.find() is not None:
        return OpAttention(template("search", tiling.geometry, tiling.tile), device)
    return DenseAttention(tiling)


class MapRecorder:
    """Dense attention that adds up tile maps: mass [parts, L, H, nT, nT]; before each step set `part`.

    query_tiles: measure the rows of that many tiles alone, drawn anew at each call; the others stay zero (None: all).
    """

    def __init__(
        self, meter: TileErrorMeter, tiling: Tiling, full: Attention, parts: int, query_tiles: int | None = None
    ) -> None:
        geometry = tiling.geometry
        self.full, self.meter, self.query_tiles, self.calls = full, meter, query_tiles, 0
        shape = (parts, geometry.layers, geometry.heads, tiling.num_tiles, tiling.num_tiles)
        self.mass, self.part = np.zeros(shape, dtype=np.float32), 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, stage: Tensor, text_len: Tensor) -> Tensor:
        tiles = sample_tiles(self.meter.num_tiles, self.query_tiles, (self.calls,))
        none = torch.zeros(q.shape[2], 0, len(tiles), self.meter.num_tiles, dtype=torch.bool, device=self.meter.device)
        number = torch.from_numpy(tiles).to(self.meter.device)
        self.mass[self.part, layer][:, tiles] += self.meter.measure(q, k, v[..., :1], none, text_len, number).mass
        self.calls += 1
        return self.full(q, k, v, layer, stage, text_len)


class ChoosingAttention:
    """Measures all modes of a layer, applies the rule and returns the chosen outputs.

    full         dense attention
    query_tiles  how many tiles errors are measured on, drawn anew for each layer and step from `seed`; None: all
    weights      of the output projections, to measure errors after them; None: errors of the heads' own outputs
    After a step, `error` and `deviation` (its standard error) [L, H, M], `power` [L, H], `layer_power` [L] and `maps`
    [L, H, m, m] (`plans.maps`) hold what was measured in it. Before one, set `step`, and `dense` where every head
    stays full.
    """

    def __init__(
        self,
        meter: TileErrorMeter,
        tiling: Tiling,
        masks: ModeMasks,
        rule: Rule,
        full: Attention,
        *,
        query_tiles: int | None = None,
        seed: int = 0,
        weights: list[Tensor] | None = None,
    ) -> None:
        self.tiling, self.meter, self.masks, self.rule = tiling, meter, masks, rule
        self.query_tiles, self.seed, self.weights = query_tiles, seed, weights
        self.sparsity = masks.sparsity
        layers, heads, _ = self.sparsity.shape
        self.projected = None if weights is None else [projected_heads(w, heads) for w in weights]
        self.error, self.deviation = np.zeros(self.sparsity.shape), np.zeros(self.sparsity.shape)
        self.power, self.layer_power = np.zeros((layers, heads)), np.zeros(layers)
        self.bins = map_bins(tiling)
        self.maps = np.zeros((layers, heads, len(self.bins), len(self.bins)))
        self.step, self.dense = 0, False
        self.full = full

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, stage: Tensor, text_len: Tensor) -> Tensor:
        dense = self.full(q, k, v, layer, stage, text_len) if self.dense or self.weights is not None else None
        self.measure(q, k, v, layer, text_len, dense)
        if self.dense:
            return dense
        error = relative_error(self.error[layer], self.power[layer], self.rule.normaliser, self.layer_power[layer])
        loss = losses(self.rule.error_scale * error, self.sparsity[layer], self.rule.lam)
        chosen = [self.masks.mask(layer, head, mode) for head, mode in enumerate(choose(loss, self.rule.eps).tolist())]
        masks = torch.from_numpy(np.stack(chosen)).to(self.meter.device)
        return attend_by_masks(self.tiling, q, k, v, masks, text_len)

    def measure(self, q: Tensor, k: Tensor, v: Tensor, layer: int, text_len: Tensor, dense: Tensor | None) -> None:
        tiles = sample_tiles(self.tiling.num_tiles, self.query_tiles, (self.seed, self.step, layer))
        rows, number = (torch.from_numpy(x).to(self.meter.device) for x in (self.masks.rows(layer, tiles), tiles))
        project = None if self.projected is None else self.projected[layer]
        found = self.meter.measure(q, k, v, rows, text_len, number, project)
        self.error[layer], self.power[layer] = found.means()
        self.deviation[layer] = found.deviation(self.tiling.num_tiles)
        self.layer_power[layer] = (
            self.power[layer].mean() if self.weights is None else output_power(dense, self.weights[layer])
        )
        self.maps[layer] = pooled(found.mass, self.tiling.sizes, self.bins, tiles)


def attend_by_masks(tiling: Tiling, q: Tensor, k: Tensor, v: Tensor, head_masks: Tensor, text_len: Tensor) -> Tensor:
    """Attention [B, N, H, D] under one tile mask per head, bool [H, nT, nT], in torch on any device."""
    if not q.is_cuda:
        return gathered_attention(tiling, q, k, v, head_masks, text_len)
    sizes = torch.as_tensor(tiling.sizes, dtype=torch.int64)
    tile_of = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(q.device)
    return masked_attention(q, k, v, head_masks, tile_of, text_bias(tiling, text_len))


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
