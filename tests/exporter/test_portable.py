"""The portable form of the operator on ONNX Runtime: golden cases against brute force and the torch operator."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from svdit.exporter import portable
from svdit.exporter.graph import drop_unused
from svdit.exporter.key_lists import batches
from svdit.exporter.op_model import op_model
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal
from svdit.plans.schema import template
from svdit.plans.tables import tables_of
from svdit.trt_plugins import torch_op
from tests.cases import CASES, op_attributes, op_inputs
from tests.reference import expected
from tests.tolerance import check_attention, worst_slice

SPELLING = {"q": "Q", "k": "K", "v": "V"}


def portable_model(case, free: bool = False) -> onnx.ModelProto:
    batch, _, _, head_dim = case.shape
    model = op_model(case.tables, "batch" if free else batch, head_dim, case.layer, case.scale)
    # The rewrite numbers attention nodes as layers; a one-operator graph has one node, for any layer of the plan.
    one_layer = _only_layer(case.tables, case.layer)
    proto = ir.to_proto(drop_unused(portable.expand_sparse(model, one_layer, case.stage, batch)))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _only_layer(tables, layer):
    import dataclasses

    return dataclasses.replace(
        tables, head_pattern=(tables.head_pattern[layer],), work_order=(tables.work_order[layer],)
    )


def run(proto: onnx.ModelProto, feed: dict) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = {x.name for x in session.get_inputs()}
    return session.run(None, {name: value for name, value in feed.items() if name in wanted})[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden_case(case):
    inputs = op_inputs(case)
    got = run(portable_model(case), {SPELLING.get(name, name): value for name, value in inputs.items()})
    check_attention(got, expected(case), "float32", case)
    torch_op.load()
    attributes = list(op_attributes(case).values())[:3]
    op = torch.ops.svdit.sparse_attention(*(torch.from_numpy(x) for x in inputs.values()), *attributes)
    assert worst_slice(got, op.numpy().astype(np.float64))[0] <= 1e-5


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_a_free_batch_changes_nothing(case):
    """The same graph takes the rows of the case together, and one alone."""
    feed = {SPELLING.get(name, name): value for name, value in op_inputs(case).items()}
    free, fixed = portable_model(case, free=True), run(portable_model(case), feed)
    np.testing.assert_array_equal(run(free, feed), fixed)
    one = {name: feed[name][:1] if name in ("Q", "K", "V", "text_len") else feed[name] for name in feed}
    np.testing.assert_allclose(run(free, one), fixed[:1], atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_standard_operators_only(case):
    proto = portable_model(case)
    assert {node.domain for node in proto.graph.node} <= {""}
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 20)]


def test_long_batches_are_cut(monkeypatch):
    plan = template("tiny", Geometry((2, 20, 20), 0, "none", 1, 2, 64), (1, 5, 10), Diagonal(frames=0))
    tables = tables_of(plan)
    q, k, v = (np.random.default_rng(i).standard_normal((1, 800, 2, 64), dtype=np.float32) for i in range(3))
    results = []
    for elements in (1, 2 * 400 * 256, 1 << 30):
        monkeypatch.setattr(portable, "SCORE_ELEMENTS", elements)
        proto = ir.to_proto(drop_unused(portable.expand_sparse(op_model(tables, 1, 64), tables, 0)))
        rows = [n for n in proto.graph.node if n.op_type == "Softmax"]
        results.append((len(rows), run(proto, {"Q": q, "K": k, "V": v})))
    assert [count for count, _ in results] == [16, 4, 2]
    for _, got in results[1:]:
        assert np.abs(got - results[0][1]).max() <= 1e-6


def test_only_kept_keys_are_multiplied():
    """The score products of a graph are exactly the token pairs that the plan keeps."""
    plan = template("tiny", Geometry((4, 8, 8), 0, "none", 1, 3, 64), (1, 4, 4), Diagonal(frames=1))
    tables = tables_of(plan)
    model = portable.expand_sparse(op_model(tables, 2, 64), tables, 0)
    shapes = [n.outputs[0].shape for n in model.graph if n.op_type == "Softmax"]
    pairs = sum(int(np.prod([int(x) for x in shape])) for shape in shapes)
    density = plan.tiling().density(plan.tiling().mask(plan.pattern("diagonal")))
    assert pairs == round(density * 2 * 3 * 256**2)


def test_batches_cover_every_query_once():
    for case in CASES[::7]:
        for pattern in range(len(case.tables.pattern_names)):
            if pattern == 1:
                continue
            queries = np.concatenate([batch.queries for batch in batches(case.tables, pattern)])
            assert sorted(queries) == list(range(case.shape[1]))
