"""`svdit::SparseAttention` in plain PyTorch, on any device: the truth that people read, and the CPU backend.

The arithmetic that a plan saves is really saved: query tiles with equal key lists are computed
together, and for each such group only the kept keys and values are gathered. Heads that share a
pattern share the gathering. Accumulation is float32 for every input type.

Letters: B batch, N tokens, H heads, D head size, S stages, P patterns, nT tiles, M work items.
The operator's meaning is docs/op.md.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from svdit.plans.errors import complain

FULL, SKIP = 0, 1
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Groups = tuple[tuple[Tensor, Tensor], ...]
"""For each set of query tiles with one key list: token positions of the queries, of the valid keys."""


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stage: Tensor,
    text_len: Tensor,
    head_pattern: Tensor,
    tile_offsets: Tensor,
    row_offsets: Tensor,
    tile_index: Tensor,
    work_order: Tensor,
    scale: float,
    text_tokens: int,
    text_first: bool,
) -> Tensor:
    """O [B, N, H, D], contiguous, in the type of q; `work_order` is a matter of speed and not used here.

    q, k, v [B, N, H, D] in tile order; stage [1]; text_len [B]; head_pattern [S, H]; tile_offsets
    [nT + 1]; row_offsets [P, nT + 1]; tile_index [nnz]; work_order [S, M]. Raises SvditError when
    shapes, types or values contradict each other.
    """
    check_tensors(q, k, v, stage, text_len, head_pattern, tile_offsets, row_offsets, tile_index, work_order)
    heads_of = _heads_by_pattern(head_pattern, stage, row_offsets.shape[0])
    lengths = _lengths(text_len, text_tokens)
    tokens = q.shape[1]
    if int(tile_offsets[-1]) != tokens:
        raise complain("tile_offsets", f"{int(tile_offsets[-1])} in the last entry", f"the {tokens} tokens of Q")
    text_start = 0 if text_first else tokens - text_tokens
    lists = _HostLists(tile_offsets, row_offsets, tile_index)

    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for valid in sorted(set(lengths)):
        hidden = (text_start + valid, text_start + text_tokens)  # masked key positions
        batches = [b for b, length in enumerate(lengths) if length == valid]
        for pattern, heads in heads_of.items():
            for queries, keys in lists.groups(pattern, hidden, str(q.device)):
                if len(keys):  # rows without a key stay zero
                    rows = _Rows(q.shape, batches, queries, heads)
                    cols = _Rows(q.shape, batches, keys, heads)
                    picked = rows.take(q), cols.take(k), cols.take(v)
                    rows.put(out, scaled_dot_product_attention(*picked, scale=scale))
    return out


class _Rows:
    """The rows of a [B, N, H, D] tensor that belong to some batches, token positions and heads."""

    def __init__(self, shape: torch.Size, batches: list[int], positions: Tensor, heads: list[int]) -> None:
        num_batches, num_tokens, num_heads, _ = shape
        self.counts = (len(batches), len(positions), len(heads))
        self.flat: Tensor | None = None  # None: all of them, in their own order
        if self.counts != (num_batches, num_tokens, num_heads):
            device = positions.device
            first = torch.tensor(batches, device=device)[:, None, None] * num_tokens + positions[None, :, None]
            self.flat = (first * num_heads + torch.tensor(heads, device=device)).reshape(-1)

    def take(self, x: Tensor) -> Tensor:
        """float32 [b, h, n, D]. One flat index_select is several times faster than indexing by axis."""
        if self.flat is not None:
            x = x.reshape(-1, x.shape[-1]).index_select(0, self.flat).view(*self.counts, x.shape[-1])
        return x.transpose(1, 2).float()

    def put(self, out: Tensor, value: Tensor) -> None:
        """Write [b, h, n, D] into a contiguous tensor, in its type."""
        value = value.transpose(1, 2).to(out.dtype)
        if self.flat is None:
            out.copy_(value)
        else:
            out.view(-1, out.shape[-1]).index_copy_(0, self.flat, value.reshape(-1, out.shape[-1]))


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stage: Tensor,
    text_len: Tensor,
    head_pattern: Tensor,
    tile_offsets: Tensor,
    row_offsets: Tensor,
    tile_index: Tensor,
    work_order: Tensor,
) -> None:
    """Raise SvditError unless types and shapes fit each other. Looks at no values, so fakes pass too."""
    if q.dim() != 4:
        raise complain("Q", f"shape {tuple(q.shape)}", "[batch, tokens, heads, head_dim]")
    for name, x in (("K", k), ("V", v)):
        if x.shape != q.shape or x.dtype != q.dtype:
            raise complain(name, f"{x.dtype} {tuple(x.shape)}", f"{q.dtype} {tuple(q.shape)} like Q")
    if q.dtype not in DTYPES:
        raise complain("Q", q.dtype, "float32, float16 or bfloat16")
    tables = {
        "stage": (stage, (1,)),
        "text_len": (text_len, (q.shape[0],)),
        "head_pattern": (head_pattern, (None, q.shape[2])),
        "tile_offsets": (tile_offsets, (None,)),
        "row_offsets": (row_offsets, (None, tile_offsets.shape[0])),
        "tile_index": (tile_index, (None,)),
        "work_order": (work_order, (head_pattern.shape[0], None)),
    }
    for name, (x, shape) in tables.items():
        if x.dtype != torch.int32:
            raise complain(name, x.dtype, "int32")
        fits = len(shape) == x.dim() and all(n in (None, m) for n, m in zip(shape, x.shape, strict=True))
        if not fits:
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise complain(name, f"shape {tuple(x.shape)}", f"[{wanted}]")


def _heads_by_pattern(head_pattern: Tensor, stage: Tensor, num_patterns: int) -> dict[int, list[int]]:
    """Heads of each pattern in use, skip left out. Raises SvditError for a stage or id out of range."""
    row = int(stage[0])
    if not 0 <= row < head_pattern.shape[0]:
        raise complain("stage", row, f"0 to {head_pattern.shape[0] - 1}")
    heads_of: dict[int, list[int]] = {}
    for head, pattern in enumerate(head_pattern[row].tolist()):
        if not 0 <= pattern < num_patterns:
            raise complain("head_pattern", pattern, f"0 to {num_patterns - 1}")
        heads_of.setdefault(pattern, []).append(head)
    heads_of.pop(SKIP, None)
    return heads_of


def _lengths(text_len: Tensor, text_tokens: int) -> list[int]:
    lengths = text_len.tolist()
    for b, length in enumerate(lengths):
        if not 0 <= length <= text_tokens:
            raise complain(f"text_len[{b}]", length, f"0 to {text_tokens}")
    return lengths


class _HostLists:
    """CSR tables on the host; groups are cached by content, so equal tables share them."""

    def __init__(self, tile_offsets: Tensor, row_offsets: Tensor, tile_index: Tensor) -> None:
        self.tile_offsets = tile_offsets.cpu().numpy()
        self.row_offsets = row_offsets.cpu().numpy()
        self.tile_index = tile_index.cpu().numpy()

    def groups(self, pattern: int, hidden: tuple[int, int], device: str) -> Groups:
        if pattern == FULL:
            return _full_group(int(self.tile_offsets[-1]), hidden, device)
        row = self.row_offsets[pattern]
        index = self.tile_index[row[0] : row[-1]]
        return _groups(self.tile_offsets.tobytes(), (row - row[0]).tobytes(), index.tobytes(), hidden, device)


@lru_cache(maxsize=16)
def _full_group(tokens: int, hidden: tuple[int, int], device: str) -> Groups:
    positions = torch.arange(tokens, device=device)
    return ((positions, torch.cat([positions[: hidden[0]], positions[hidden[1] :]])),)


@lru_cache(maxsize=256)
def _groups(offsets: bytes, row: bytes, index: bytes, hidden: tuple[int, int], device: str) -> Groups:
    tile_offsets, row_offsets, tile_index = (np.frombuffer(x, dtype=np.int32) for x in (offsets, row, index))
    by_list: dict[bytes, list[int]] = {}
    for tile in range(len(tile_offsets) - 1):
        keys = tile_index[row_offsets[tile] : row_offsets[tile + 1]]
        by_list.setdefault(keys.tobytes(), []).append(tile)
    groups = []
    for keys, queries in by_list.items():
        positions = _positions(tile_offsets, np.frombuffer(keys, dtype=np.int32))
        visible = positions[(positions < hidden[0]) | (positions >= hidden[1])]
        pair = (_positions(tile_offsets, np.array(queries)), visible)
        groups.append(tuple(torch.from_numpy(x).to(device) for x in pair))
    return tuple(groups)


def _positions(tile_offsets: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """int64: sequence positions of the tokens of `tiles`, in the order given."""
    runs = [np.arange(tile_offsets[t], tile_offsets[t + 1], dtype=np.int64) for t in tiles]
    return np.concatenate(runs) if runs else np.zeros(0, dtype=np.int64)
