"""Exported graphs: portable on ONNX Runtime against torch with the same plan, plugin in structure and in value."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

from svdit.exporter.export import export
from svdit.exporter.models.registry import adapter
from svdit.exporter.op_schema import INPUTS
from svdit.plans.geometry import Geometry
from svdit.plans.patterns import Diagonal, MultiDiagonal, Stripe
from svdit.plans.schema import Plan, Stage
from svdit.plans.tables import tables_of
from svdit.runtime.attention import OpAttention
from tests.exporter.graphs import dense, run_in_python
from tests.tolerance import rel_l2

MODEL = adapter("cogvideox1.5")


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Two stages, border tiles on every axis, every kind of head."""
    patterns = {
        "d": Diagonal(frames=0),
        "m": MultiDiagonal(rows=0, cols=0),
        "s": Stripe(columns=((0, 2),), frames=1),
    }
    stages = (
        Stage(0.4, (("full", "d", "m"), ("full", "full", "full"))),
        Stage(1.0, (("d", "skip", "s"), ("m", "s", "full"))),
    )
    return Plan(MODEL.name, Geometry((3, 5, 7), 7, "before", 2, 3, 64), (2, 2, 4), patterns, stages, {})


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, checkpoint, plan, module_trace):
    folder = tmp_path_factory.mktemp("bundles")
    return {
        variant: export(MODEL.name, plan, folder / variant, checkpoint=checkpoint, variant=variant)
        for variant in ("plugin", "portable", "dense")
    }


@pytest.fixture(scope="module")
def feed(checkpoint, plan) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(5)
    return {
        "hidden_states": torch.randn(2, *MODEL.latent_shape(plan.geometry, checkpoint), generator=generator).numpy(),
        "timestep": np.array([812.0, 20.0], dtype=np.float32),
        "encoder_hidden_states": torch.randn(2, *MODEL.text_shape(checkpoint), generator=generator).numpy(),
    }


def truth(checkpoint, plan, feed, attention, stage=0) -> np.ndarray:
    denoiser = MODEL.denoiser(checkpoint, plan.tiling(), attention)
    with torch.no_grad():
        return denoiser(*(torch.from_numpy(x) for x in feed.values()), torch.tensor([stage], dtype=torch.int32)).numpy()


def on_onnxruntime(path, feed) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feed)[0]


@pytest.mark.parametrize("stage", [0, 1])
def test_portable_and_plugin_equal_torch(bundles, checkpoint, plan, feed, stage):
    want = truth(checkpoint, plan, feed, OpAttention(plan), stage)
    assert rel_l2(want, truth(checkpoint, plan, feed, dense)) > 1e-3  # the plan is felt
    assert rel_l2(on_onnxruntime(bundles["portable"].path / f"dit.stage{stage}.onnx", feed), want) <= 1e-5
    staged = {**feed, "stage": np.array([stage], dtype=np.int32)}
    assert rel_l2(run_in_python(bundles["plugin"].path / "dit.onnx", staged), want) <= 1e-5


def test_dense_equals_torch(bundles, checkpoint, plan, feed):
    got = on_onnxruntime(bundles["dense"].path / "dit.onnx", feed)
    assert rel_l2(got, truth(checkpoint, plan, feed, dense)) <= 1e-5


def test_plugin_has_one_sparse_attention_a_layer_with_its_tables(bundles, plan):
    model = onnx.load(str(bundles["plugin"].path / "dit.onnx"), load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "SparseAttention"]
    assert [node.name for node in nodes] == [f"transformer_blocks.{i}.attn1/SparseAttention" for i in range(2)]
    tables = tables_of(plan)
    values = {t.name: t for t in model.graph.initializer}
    for layer, node in enumerate(nodes):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["text_first"] == 1 and attributes["text_tokens"] == 7
        assert attributes["scale"] == pytest.approx(64**-0.5)
        assert (attributes["grid"], attributes["tile"]) == ([3, 5, 7], [2, 2, 4])
        for port, name in zip(INPUTS[5:], node.input[5:], strict=True):
            want = getattr(tables, port.name)
            want = want[layer] if port.name in ("head_pattern", "work_order") else want
            assert np.array_equal(numpy_helper.to_array(values[name]), want)


def test_graph_is_plain(bundles):
    """No scatter, no leftovers of shape arithmetic; the weights stay in the checkpoint's file."""
    model = onnx.load(str(bundles["plugin"].path / "dit.onnx"), load_external_data=False)
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"ScatterND", "ScatterElements", "Shape", "ConstantOfShape", "Range", "Where", "If", "Loop"}
    assert [value.name for value in model.graph.input] == [
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "stage",
    ]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    assert shapes["hidden_states"] == [2, 4, 6, 10, 14] and shapes["encoder_hidden_states"] == [2, 7, 40]
    (weights,) = bundles["plugin"].manifest.weights
    assert weights.file == "diffusion_pytorch_model.safetensors"


def test_no_mask_in_the_standard_graphs(bundles):
    """text_len is a constant that covers the text: nothing is added to scores, and dense takes the fused form."""
    kinds = {}
    for variant, file in (("portable", "dit.stage0.onnx"), ("portable", "dit.stage1.onnx"), ("dense", "dit.onnx")):
        graph = onnx.load(str(bundles[variant].path / file), load_external_data=False).graph
        kinds[file] = [node.op_type for node in graph.node]
        assert not set(kinds[file]) & {"Less", "Greater", "Where"}
    assert kinds["dit.onnx"].count("MultiHeadAttention") == 2 and "Softmax" not in kinds["dit.onnx"]


def test_half_precision_from_shards(make, plan, tmp_path):
    """bf16 weights in several files: every one a link, no Cast of a weight in a bf16 graph."""
    folder = make(dtype=torch.bfloat16, shard="500KB")
    bundle = export(MODEL.name, plan, tmp_path / "b", checkpoint=folder, precision="bf16", batch=1)
    assert len(bundle.manifest.weights) == len(list(folder.glob("*.safetensors"))) > 2
    model = onnx.load(str(bundle.path / "dit.onnx"), load_external_data=False)
    weights = {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert not [n.name for n in model.graph.node if n.op_type == "Cast" and n.input[0] in weights]
    assert sum(node.op_type == "SparseAttention" for node in model.graph.node) == 2
