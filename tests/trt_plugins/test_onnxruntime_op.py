"""The ONNX Runtime operator on the CPU provider: golden cases, whole models, and what it refuses."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from svdit.exporter.op_model import op_model
from svdit.plans.errors import SvditError
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal
from svdit.plans.schema import template
from svdit.plans.tables import tables_of
from svdit.trt_plugins import onnxruntime_library
from tests.cases import BY_NAME, CASES, op_inputs
from tests.reference import expected, expected_of
from tests.tolerance import check_attention, rel_l2

ort = pytest.importorskip("onnxruntime")
LIBRARY = onnxruntime_library.find()
built = pytest.mark.skipif(
    LIBRARY is None, reason=f"no {onnxruntime_library.FILE_NAME}; build it: {onnxruntime_library.BUILD}"
)
ONNX_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def case_model(case, dtype: str = "float32") -> onnx.ModelProto:
    """One operator with float32 inputs and output, and casts around it for the other types."""
    batch, _, _, head_dim = case.shape
    model = ir.to_proto(op_model(case.tables, batch, head_dim, case.layer, case.scale, ONNX_NAMES[dtype]))
    return model if dtype == "float32" else with_casts(model, ONNX_TYPES[dtype])


ONNX_NAMES = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}


def with_casts(model: onnx.ModelProto, to: int) -> onnx.ModelProto:
    node = model.graph.node[0]
    casts = [helper.make_node("Cast", [name], [f"{name}_cast"], to=to) for name in "QKV"]
    back = helper.make_node("Cast", ["O_cast"], ["O"], to=TensorProto.FLOAT)
    node.input[:3] = [f"{name}_cast" for name in "QKV"]
    node.output[0] = "O_cast"
    for value in (*model.graph.input[:3], *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    del model.graph.node[:]
    model.graph.node.extend([*casts, node, back])
    return model


def session(model: onnx.ModelProto, threads: int = 1):
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(LIBRARY))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feed_of(case, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The graph's inputs by their names there."""
    inputs = op_inputs(case, dtype)
    return {**{name.upper(): inputs[name] for name in "qkv"}, "stage": inputs["stage"], "text_len": inputs["text_len"]}


@built
@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden_case(case):
    got = session(case_model(case)).run(None, feed_of(case))[0]
    check_attention(got, expected(case), "float32", case)


@built
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["tile-border-d128", "text-after-130-len-130-64", "nothing-kept", "pattern-tiles"])
def test_half_precision(name, dtype):
    case = BY_NAME[name]
    got = session(case_model(case, dtype)).run(None, feed_of(case, dtype))[0]
    check_attention(got, expected_of(case, *case.qkv(dtype)), dtype, case)


@built
@pytest.mark.parametrize("head_dim", [1, 24, 80, 200])
def test_any_head_size(head_dim):
    plan = template("golden", Geometry((3, 5, 7), 0, "none", 1, 2, head_dim), (1, 2, 3), Diagonal(frames=1))
    q, k, v = (np.random.default_rng(i).standard_normal((2, 105, 2, head_dim), dtype=np.float32) for i in range(3))
    feed = {"Q": q, "K": k, "V": v, "stage": np.zeros(1, np.int32), "text_len": np.zeros(2, np.int32)}
    got = session(ir.to_proto(op_model(tables_of(plan), 2, head_dim))).run(None, feed)[0]
    tiling = plan.tiling()
    tile_of = np.repeat(np.arange(tiling.num_tiles), tiling.sizes)
    kept = tiling.mask(Diagonal(frames=1))[tile_of][:, tile_of]
    scores = np.einsum("bihd,bjhd->bhij", q, k, dtype=np.float64) * head_dim**-0.5
    weights = np.where(kept, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    truth = np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)
    check_attention(got, truth, "float32", head_dim)


@built
def test_extreme_scores():
    """Scores thousands apart: the maximum keeps exponentials in range, in every block of keys."""
    case = BY_NAME["long"]
    feed = feed_of(case)
    feed["Q"] = feed["Q"] * 300
    got = session(case_model(case)).run(None, feed)[0]
    assert np.isfinite(got).all()
    scores = np.einsum("ihd,jhd->hij", feed["Q"][0, :, :1], feed["K"][0, :, :1], dtype=np.float64) * case.scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    truth = np.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdims=True), feed["V"][0, :, :1])
    assert rel_l2(got[0, :, :1], truth) <= 1e-3  # float32 scores of several thousand are exact to about 2e-4


@built
def test_threads_and_sessions_agree():
    """Two sessions at once in one process, one and two threads: the same bits."""
    case = BY_NAME["long-text"]
    one, two = session(case_model(case)), session(case_model(case), threads=2)
    first = one.run(None, feed_of(case))[0]
    for runner in (two, one, two):
        assert np.array_equal(runner.run(None, feed_of(case))[0], first)


@built
def test_output_shape_and_type_are_known():
    """The output is declared without shape; the runtime learns both from the operator."""
    case = BY_NAME["stage-0-layer-0"]
    for dtype in ("float32", "bfloat16"):
        model = case_model(case, dtype)
        model.graph.output[0].type.tensor_type.ClearField("shape")
        assert tuple(session(model).get_outputs()[0].shape) == case.shape


def _attribute(model: onnx.ModelProto, name: str) -> onnx.AttributeProto:
    return next(a for a in model.graph.node[0].attribute if a.name == name)


def _drop(model: onnx.ModelProto, name: str) -> None:
    model.graph.node[0].attribute.remove(_attribute(model, name))


def _table(model: onnx.ModelProto, name: str, change) -> None:
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor).copy()), name))


def _with(array: np.ndarray, at, value) -> np.ndarray:
    array[at] = value
    return array


BAD_GRAPHS = {
    "no scale": (lambda m: _drop(m, "scale"), "scale: got no such attribute of type float"),
    "negative scale": (lambda m: setattr(_attribute(m, "scale"), "f", -1.0), "scale: got -1.0"),
    "text_first": (lambda m: setattr(_attribute(m, "text_first"), "i", 7), "text_first: got 7; expected 0 or 1"),
    "text_tokens": (lambda m: setattr(_attribute(m, "text_tokens"), "i", 9999), "text_tokens: got 9999"),
    "text_tokens type": (
        lambda m: _attribute(m, "text_tokens").CopyFrom(helper.make_attribute("text_tokens", 1.5)),
        "text_tokens: got an attribute that cannot be read",
    ),
    "heads": (lambda m: _table(m, "head_pattern", lambda x: x[:, :-1]), r"head_pattern: got shape \[3, 2\]; expected"),
    "rows": (lambda m: _table(m, "row_offsets", lambda x: x[:, :-1]), "row_offsets: got shape"),
    "tiles": (lambda m: _table(m, "tile_offsets", lambda x: _with(x, -1, 7)), r"tile_offsets: got 0\.\.7"),
    "pattern id": (
        lambda m: _table(m, "head_pattern", lambda x: _with(x, (0, 0), 99)),
        r"head_pattern\[0, 0\]: got 99",
    ),
    "tile": (lambda m: _table(m, "tile_index", lambda x: _with(x, 0, -5)), r"tile_index\[0\]: got tile -5"),
    "item": (lambda m: _table(m, "work_order", lambda x: _with(x, (0, 0), -1)), "work_order"),
    "dtype of a table": (lambda m: _table(m, "tile_index", lambda x: x.astype(np.int64)), "(?i)type"),
}


@built
@pytest.mark.parametrize("what", BAD_GRAPHS)
def test_bad_graph(what):
    case = BY_NAME["stage-0-layer-0"]
    model = case_model(case)
    change, message = BAD_GRAPHS[what]
    change(model)
    with pytest.raises(Exception, match=message):
        session(model).run(None, feed_of(case))


@built
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stage", np.array([3], np.int32), r"stage: got 3; expected 0\.\.2"),
        ("stage", np.array([-1], np.int32), "stage: got -1"),
        ("text_len", np.array([9, 10], np.int32), r"text_len\[1\]: got 10; expected 0\.\.9"),
        ("stage", np.array([0, 1], np.int32), "stage"),
        ("Q", np.zeros((2, 114, 3, 64), np.float64), "Unexpected input data type"),
    ],
)
def test_bad_input(name, value, message):
    case = BY_NAME["stage-0-layer-0"]
    runner = session(case_model(case))
    feed = feed_of(case)
    with pytest.raises(Exception, match=message):
        runner.run(None, {**feed, name: value})
    check_attention(runner.run(None, feed)[0], expected(case), "float32")  # and the session still works


@built
def test_shapes_known_only_when_it_runs():
    case = BY_NAME["stage-0-layer-0"]
    model = case_model(case)
    for value in (*model.graph.input[:3], *model.graph.output):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            dim.dim_param = f"{value.name}{axis}"
    runner, feed = session(model), feed_of(case)
    with pytest.raises(Exception, match=r"K: got shape \[2, 113, 3, 64\]; expected \[2, 114, 3, 64\]"):
        runner.run(None, {**feed, "K": feed["K"][:, 1:]})
    with pytest.raises(Exception, match=r"tile_offsets: got 0\.\.114; expected 0\.\.113"):
        runner.run(None, {**feed, **{name: feed[name][:, 1:] for name in "QKV"}})
    check_attention(runner.run(None, feed)[0], expected(case), "float32")


@built
def test_computed_tables():
    """Tables that are inputs instead of constants are checked at every call."""
    case = BY_NAME["stage-1-layer-0"]
    model = case_model(case)
    tables = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    del model.graph.initializer[:]
    model.graph.input.extend(helper.make_tensor_value_info(n, TensorProto.INT32, t.shape) for n, t in tables.items())
    runner, feed = session(model), {**feed_of(case), **tables}
    check_attention(runner.run(None, feed)[0], expected(case), "float32")
    with pytest.raises(Exception, match=r"tile_index\[0\]: got tile 9999"):
        runner.run(None, {**feed, "tile_index": _with(tables["tile_index"].copy(), 0, 9999)})


@built
def test_exports_one_symbol():
    listed = subprocess.run(["nm", "-D", "--defined-only", str(LIBRARY)], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in listed.stdout.splitlines()] == ["RegisterCustomOps"]


def test_find(monkeypatch, tmp_path):
    file = tmp_path / "anything.so"
    monkeypatch.setenv(onnxruntime_library.VARIABLE, str(file))
    with pytest.raises(SvditError, match=r"SVDIT_ORT_OPS: got .*anything\.so; expected the path of a built"):
        onnxruntime_library.find()
    file.touch()
    assert onnxruntime_library.find() == Path(file)
