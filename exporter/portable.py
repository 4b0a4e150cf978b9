"""SparseAttention in standard ONNX operators, so that the arithmetic that a plan saves is saved on any runtime.

Heads with one pattern are computed together. Query tiles with equal key lists form a batch; for each batch only
the kept keys and values are gathered, then MatMul, Softmax, MatMul over [B, heads, rows, keys]. Rows are cut so
that one score tensor stays small. Heads that skip are zeros.

Letters: B batch, N tokens, H heads, h heads of one pattern, D head width, m query rows, n keys.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from svdit.exporter.graph import attention_nodes
from svdit.exporter.key_lists import Batch, batches, positions, text_range, uniform_size
from svdit.exporter.node_builder import Constants, NodeBuilder
from svdit.exporter.op_schema import DOMAIN
from svdit.plans.tables import FULL, SKIP, Tables

SCORE_ELEMENTS = 4 << 20
"""Most scores computed at once (16 MiB, which many caches hold); heads are taken in turn before rows get few."""
WIDE = 1024
"""Query rows from which packing the keys for a product no longer shows: docs/export.md has the measurement."""
ROW_STEP = 128
"""Query rows of a cut batch are a multiple of this."""
MASKED = -1e30
"""Added to the score of a text key that is not valid: exp gives exactly 0 beside any valid key."""


def expand_sparse(model: ir.Model, tables: Tables, stage: int, most: int = 1) -> ir.Model:
    """Replace every SparseAttention node by what it computes in one stage of the plan.

    `most` is the largest batch of a graph whose batch is free.
    """
    return _expand(model, tables, lambda layer: tables.head_pattern[layer][stage], most)


def expand_dense(model: ir.Model, tables: Tables, most: int = 1) -> ir.Model:
    """Replace every SparseAttention node by dense attention: the baseline, in ONNX Runtime's fastest form.

    That is com.microsoft.MultiHeadAttention (docs/export.md has the comparison). It takes no text length, so
    sequences whose text may end early get the chunked standard operators instead.
    """
    if not all(_all_text_counts(node, tables) for node in attention_nodes(model)):
        return _expand(model, tables, lambda layer: np.full_like(tables.head_pattern[layer][0], FULL), most)
    model.graph.opset_imports["com.microsoft"] = 1
    return _replace_each(model, lambda node, build, layer: _fused(node, build))


def _expand(model: ir.Model, tables: Tables, patterns_of: Callable[[int], np.ndarray], most: int) -> ir.Model:
    def one(node: ir.Node, build: NodeBuilder, layer: int) -> ir.Value:
        scale = node.attributes["scale"].as_float()
        text_len = None if _all_text_counts(node, tables) else node.inputs[4]
        rows = node.inputs[0].shape[0]
        nodes = Portable(build, tables, text_len, scale, rows if isinstance(rows, int) else most)
        return nodes.attention(*node.inputs[:3], patterns_of(layer))

    return _replace_each(model, one)


def _all_text_counts(node: ir.Node, tables: Tables) -> bool:
    """Whether no text key is ever masked: there is none, or text_len is a constant that covers them all."""
    if not tables.text_tokens:
        return True
    given = node.inputs[4]
    expand = given.producer()
    if expand is not None and expand.op_type == "Expand":  # one length for every row of a free batch
        given = expand.inputs[0]
    known = ir.convenience.get_const_tensor(given)
    return known is not None and bool((known.numpy() >= tables.text_tokens).all())


def _replace_each(model: ir.Model, make: Callable[[ir.Node, NodeBuilder, int], ir.Value]) -> ir.Model:
    """Put what `make` builds in the place of each SparseAttention node; layers are counted in graph order."""
    constants = Constants(model.graph, "attention/")
    for layer, node in enumerate(attention_nodes(model)):
        build = NodeBuilder(constants, node.name.rpartition("/")[0] or "attention")
        result = make(node, build, layer)
        model.graph.insert_before(node, build.nodes)
        old = node.outputs[0]
        if old in model.graph.outputs:
            result.name, old.name = old.name, f"{old.name}/replaced"
            model.graph.outputs[list(model.graph.outputs).index(old)] = result
        old.replace_all_uses_with(result)
        model.graph.remove(node, safe=True)
    model.graph.opset_imports.pop(DOMAIN, None)
    return model


def _fused(node: ir.Node, build: NodeBuilder) -> ir.Value:
    b, n, h, d = node.inputs[0].shape
    flat = [build.reshape(x, [b, n, h * d], f"{name}_flat") for name, x in zip("qkv", node.inputs[:3], strict=True)]
    out = build.add(
        "MultiHeadAttention",
        flat,
        [b, n, h * d],
        domain="com.microsoft",
        num_heads=int(h),
        scale=node.attributes["scale"].as_float(),
    )
    return build.reshape(out, [b, n, h, d], "attended")


class Portable:
    """The nodes of one layer."""

    def __init__(self, build: NodeBuilder, tables: Tables, text_len: ir.Value | None, scale: float, batch: int) -> None:
        """`text_len` int32 [B], or None where every text key counts; `batch` is B, or the largest that it may be."""
        self.build = build
        self.tables = tables
        self.text_len = text_len
        self.scale = scale
        self.batch = batch
        self.tile = uniform_size(tables)
        self._bias: ir.Value | None = None
        self._tiles: dict[str, ir.Value] = {}

    def attention(self, q: ir.Value, k: ir.Value, v: ir.Value, head_pattern: np.ndarray) -> ir.Value:
        """q, k, v [B, N, H, D] and the pattern of each head [H] to the output [B, N, H, D]."""
        build = self.build
        scaled = build.add("Mul", [q, build.constant(np.float32(self.scale), "scale")], q.shape, label="q_scaled")
        named = zip("qkv", (scaled, k, v), strict=True)
        by_head = [build.transpose(x, [0, 2, 1, 3], f"{name}_heads") for name, x in named]
        order, parts = [], []
        for pattern in sorted({int(p) for p in head_pattern}):
            every = np.flatnonzero(head_pattern == pattern)
            order.extend(every)
            label = self.tables.pattern_names[pattern]
            if pattern == SKIP:
                parts.append(self._zeros(by_head[0], len(every), by_head[0].shape[2], label))
                continue
            together = self._heads_at_once(pattern)
            for start in range(0, len(every), together):
                heads = every[start : start + together]
                taken = [build.take(x, heads, 1, f"{label}/{name}") for name, x in zip("qkv", by_head, strict=True)]
                parts.append(self._pattern(*taken, pattern, label))
        joined = build.concat(parts, 1, "heads")
        joined = build.take(joined, np.argsort(order), 1, "heads_in_order")
        return build.transpose(joined, [0, 2, 1, 3], "attended")

    def _heads_at_once(self, pattern: int) -> int:
        """Heads that leave room for WIDE query rows against the longest key list."""
        sizes = np.diff(self.tables.tile_offsets)
        work = batches(self.tables, pattern)
        rows = min(WIDE, max(len(item.queries) for item in work))
        keys = max(int(sizes[list(item.key_tiles)].sum()) for item in work)
        return max(1, SCORE_ELEMENTS // (self.batch * rows * max(keys, 1)))

    def _pattern(self, q: ir.Value, k: ir.Value, v: ir.Value, pattern: int, label: str) -> ir.Value:
        """[B, h, N, D] each; the output rows are brought back to sequence order at the end."""
        work = batches(self.tables, pattern)
        order = np.concatenate([batch.queries for batch in work])
        rows = self.build.take(q, order, 2, f"{label}/q_by_list")
        pieces = self.build.split(rows, [len(batch.queries) for batch in work], 2, f"{label}/q_batch")
        results = [self._batch(piece, k, v, batch, label) for piece, batch in zip(pieces, work, strict=True)]
        joined = self.build.concat(results, 2, f"{label}/rows")
        return self.build.take(joined, np.argsort(order), 2, f"{label}/rows_in_order")

    def _batch(self, q: ir.Value, k: ir.Value, v: ir.Value, batch: Batch, label: str) -> ir.Value:
        """q [B, h, m, D] against the kept keys of k, v [B, h, N, D]."""
        build = self.build
        if not batch.key_tiles:
            return self._zeros(q, q.shape[1], q.shape[2], label)
        keys = self._kept(k, batch, f"{label}/k_kept")
        values = self._kept(v, batch, f"{label}/v_kept")
        keys = build.transpose(keys, [0, 1, 3, 2], f"{label}/k_columns")
        results = []
        for rows in build.split(q, self._cuts(q, keys.shape[3]), 2, f"{label}/q_rows"):
            shape = [*rows.shape[:3], keys.shape[3]]
            scores = build.add("MatMul", [rows, keys], shape, label=f"{label}/scores")
            scores = self._mask_text(scores, batch, label)
            weights = build.add("Softmax", [scores], shape, label=f"{label}/softmax", axis=-1)
            results.append(build.add("MatMul", [weights, values], rows.shape, label=f"{label}/output"))
        return self._zero_if_no_key(build.concat(results, 2, f"{label}/output_rows"), batch, label)

    def _cuts(self, q: ir.Value, num_keys: int) -> list[int]:
        """Row counts that keep B * h * rows * num_keys near SCORE_ELEMENTS."""
        _, heads, rows, _ = q.shape
        most = SCORE_ELEMENTS // (self.batch * heads * num_keys) // ROW_STEP * ROW_STEP
        most = max(most, ROW_STEP)
        return [min(most, rows - start) for start in range(0, rows, most)]

    def _kept(self, x: ir.Value, batch: Batch, label: str) -> ir.Value:
        """The kept rows of x [B, h, N, D]: one range, whole tiles, or single positions where tiles differ in size."""
        index = positions(self.tables, batch.key_tiles)
        contiguous = len(index) == index[-1] - index[0] + 1
        if contiguous or self.tile is None:
            return self.build.take(x, index, 2, label)
        b, h, n, d = x.shape
        if x.name not in self._tiles:
            self._tiles[x.name] = self.build.reshape(x, [b, h, n // self.tile, self.tile, d], f"{label}_tiles")
        tiles = self._tiles[x.name]
        taken = self.build.take(tiles, np.array(batch.key_tiles), 2, f"{label}_list")
        return self.build.reshape(taken, [b, h, len(index), d], label)

    def _zeros(self, like: ir.Value, heads: int, rows: int, label: str) -> ir.Value:
        shape = [like.shape[0], heads, rows, like.shape[3]]
        zero = ir.tensor(np.zeros(1, dtype=np.float32))
        sizes = self.build.sizes(like, shape, label)
        return self.build.add("ConstantOfShape", [sizes], shape, label=f"{label}/zeros", dtype=like.dtype, value=zero)

    def _text_keys(self, batch: Batch) -> np.ndarray:
        """Indices among the batch's keys that are text and may be masked."""
        if self.text_len is None:
            return np.zeros(0, dtype=np.int64)
        index = positions(self.tables, batch.key_tiles)
        start, stop = text_range(self.tables)
        return np.flatnonzero((index >= start) & (index < stop))

    def _mask_text(self, scores: ir.Value, batch: Batch, label: str) -> ir.Value:
        if not len(self._text_keys(batch)):
            return scores
        bias = self.build.take(self._text_bias(), positions(self.tables, batch.key_tiles), 3, f"{label}/text_bias")
        return self.build.add("Add", [scores, bias], scores.shape, label=f"{label}/scores_masked")

    def _text_bias(self) -> ir.Value:
        """float32 [B, 1, 1, N]: 0 for keys that count, MASKED for text keys at or after text_len."""
        if self._bias is None:
            start, stop = text_range(self.tables)
            tokens = int(self.tables.tile_offsets[-1])
            number = np.full(tokens, -1, dtype=np.int32)  # video keys lie before any length
            number[start:stop] = np.arange(stop - start)
            batch = self.text_len.shape[0]
            lengths = self.build.reshape(self.text_len, [batch, 1, 1, 1], "text_len")
            index = self.build.constant(number.reshape(1, 1, 1, -1), "text_index")
            shape = [batch, 1, 1, tokens]
            valid = self.build.add("Less", [index, lengths], shape, label="text_valid", dtype=ir.DataType.BOOL)
            choices = [self.build.constant(np.float32(x), "bias") for x in (0, MASKED)]
            self._bias = self.build.add("Where", [valid, *choices], shape, label="text_bias", dtype=ir.DataType.FLOAT)
        return self._bias

    def _zero_if_no_key(self, out: ir.Value, batch: Batch, label: str) -> ir.Value:
        """Rows whose only keys are text become zeros where no text is valid."""
        text = self._text_keys(batch)
        index = positions(self.tables, batch.key_tiles)
        if len(text) < len(index):
            return out
        first = int(index[0]) - text_range(self.tables)[0]
        lengths = self.build.reshape(self.text_len, [self.text_len.shape[0], 1, 1, 1], f"{label}/text_len")
        limit = self.build.constant(np.array(first, dtype=np.int32), "first_text")
        shape, kind = lengths.shape, ir.DataType.BOOL
        some = self.build.add("Greater", [lengths, limit], shape, label=f"{label}/any_key", dtype=kind)
        zero = self.build.constant(np.float32(0), "bias")
        return self.build.add("Where", [some, out, zero], out.shape, label=f"{label}/output_or_zero", dtype=out.dtype)
