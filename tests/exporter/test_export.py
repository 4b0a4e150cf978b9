"""Whole exports of small checkpoints: what the graphs compute, how they look, where the weights are."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import load_file

from svdit.exporter.export import export, rewrite, trace_denoiser
from svdit.exporter.graph import weight_files
from svdit.exporter.models.registry import adapter
from svdit.exporter.op_schema import ATTRIBUTES, INPUTS, register_schema
from svdit.plans.batch import Batch
from svdit.plans.bundle import read_bundle
from svdit.plans.errors import SvditError
from svdit.plans.patterns import Diagonal, MultiDiagonal
from svdit.plans.schema import Plan, Stage, template
from svdit.plans.tables import tables_of
from svdit.runtime.attention import OpAttention
from tests.exporter.graphs import dense, external, load_resolved, run_in_python
from tests.tolerance import rel_l2


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, tiny_checkpoint, tiny_plan):
    """Traced anew for each variant, as the command does."""
    folder = tmp_path_factory.mktemp("bundles")
    return {
        variant: export("tiny", tiny_plan, folder / variant, checkpoint=tiny_checkpoint, variant=variant)
        for variant in ("plugin", "portable", "dense")
    }


@pytest.fixture(scope="module")
def feed(tiny_checkpoint, tiny_plan) -> dict[str, np.ndarray]:
    model = adapter("tiny")
    generator = torch.Generator().manual_seed(5)
    shape = model.latent_shape(tiny_plan.geometry, tiny_checkpoint)
    return {
        "hidden_states": torch.randn(2, *shape, generator=generator).numpy(),
        "timestep": np.array([812.5, 20.0], dtype=np.float32),
        "encoder_hidden_states": model.encode_prompts(tiny_checkpoint, ["", "fast red circle moving up"]).numpy(),
    }


def truth(tiny_checkpoint, plan, feed, attention, stage=0) -> np.ndarray:
    denoiser = adapter("tiny").denoiser(tiny_checkpoint, plan.tiling(), attention)
    with torch.no_grad():
        tensors = [torch.from_numpy(x) for x in feed.values()]
        return denoiser(*tensors, torch.tensor([stage], dtype=torch.int32)).numpy()


def on_onnxruntime(path, feed) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feed)[0]


@pytest.mark.parametrize("stage", [0, 1])
def test_portable_and_plugin_equal_torch(bundles, tiny_checkpoint, tiny_plan, feed, stage):
    want = truth(tiny_checkpoint, tiny_plan, feed, OpAttention(tiny_plan), stage)
    portable = on_onnxruntime(bundles["portable"].path / f"dit.stage{stage}.onnx", feed)
    assert rel_l2(portable, want) <= 1e-5
    plugin = run_in_python(bundles["plugin"].path / "dit.onnx", {**feed, "stage": np.array([stage], dtype=np.int32)})
    assert rel_l2(plugin, want) <= 1e-5


def test_shipped_model(tmp_path):
    """The weights that come with the package, at a small grid: one trace, both variants, against torch."""
    model = adapter("tiny")
    checkpoint = model.packaged_checkpoint()
    geometry = dataclasses.replace(model.geometry(checkpoint), grid=(4, 9, 10))
    patterns = {"d": Diagonal(frames=1), "m": MultiDiagonal(rows=0, cols=0)}
    plan = Plan("tiny", geometry, (1, 8, 8), patterns, (Stage(1.0, (("d", "m", "full", "skip"),) * 8),), {})
    traced = trace_denoiser(model, checkpoint, plan, "fp32", Batch(2, 2))
    generator = torch.Generator().manual_seed(1)
    feed = {
        "hidden_states": torch.randn(2, *model.latent_shape(geometry), generator=generator).numpy(),
        "timestep": np.array([900.0, 900.0], dtype=np.float32),
        "encoder_hidden_states": model.encode_prompts(checkpoint, ["", "red circle moving right"]).numpy(),
    }
    want = truth(checkpoint, plan, feed, OpAttention(plan))
    for file in weight_files(traced.parameters):
        shutil.copy(file, tmp_path)
    for variant in ("portable", "plugin"):
        (graph,) = rewrite(traced, plan, variant).values()
        path = tmp_path / f"{variant}.onnx"
        path.write_bytes(ir.to_proto(graph[0]).SerializeToString())
        if variant == "portable":
            got = on_onnxruntime(path, feed)
        else:
            got = run_in_python(path, {**feed, "stage": np.zeros(1, dtype=np.int32)})
        assert rel_l2(got, want) <= 1e-5


def test_stages_differ(tiny_checkpoint, tiny_plan, feed):
    """Without this the test above would not see a stage that is ignored."""
    attention = OpAttention(tiny_plan)
    first, second = (truth(tiny_checkpoint, tiny_plan, feed, attention, stage) for stage in (0, 1))
    assert rel_l2(first, second) > 0.01


def test_dense_equals_torch(bundles, tiny_checkpoint, tiny_plan, feed):
    got = on_onnxruntime(bundles["dense"].path / "dit.onnx", feed)
    assert rel_l2(got, truth(tiny_checkpoint, tiny_plan, feed, dense)) <= 1e-5


def test_plugin_graph_structure(bundles, tiny_plan):
    model = onnx.load(str(bundles["plugin"].path / "dit.onnx"), load_external_data=False)
    nodes = [n for n in model.graph.node if n.op_type == "SparseAttention"]
    assert [n.name for n in nodes] == [f"blocks.{i}.attn1/SparseAttention" for i in range(2)]
    tables = tables_of(tiny_plan)
    values = {t.name: t for t in model.graph.initializer}
    for layer, node in enumerate(nodes):
        assert node.domain == "svdit" and len(node.input) == len(INPUTS)
        assert node.input[3] == "stage"
        constants = [onnx.numpy_helper.to_array(values[name]) for name in node.input[4:]]
        expected = [
            np.zeros(2, dtype=np.int32),
            tables.head_pattern[layer],
            tables.tile_offsets,
            tables.row_offsets,
            tables.tile_index,
            tables.work_order[layer],
        ]
        for got, want in zip(constants, expected, strict=True):
            assert got.dtype == np.int32 and np.array_equal(got, want)
        got = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert set(got) == {a.name for a in ATTRIBUTES}
        assert got["scale"] == 0.125 and got["plugin_namespace"] == b"" and list(got["grid"]) == [4, 6, 6]
        assert [p.decode() for p in got["patterns"]] == list(tables.pattern_names)
    shared = [{n.input[i] for n in nodes} for i in (6, 7, 8)]
    assert all(len(names) == 1 for names in shared)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20), ("svdit", 1)]


def test_equal_layers_share_their_tables(tmp_path, tiny_checkpoint):
    plan = template("tiny", adapter("tiny").geometry(tiny_checkpoint), (1, 4, 4), Diagonal(frames=1))
    model = trace_denoiser(adapter("tiny"), tiny_checkpoint, plan, "fp32", Batch(1, 1)).model
    names = [name for name in model.graph.initializers if name.startswith("attention.")]
    assert len(names) == 5


def test_checker_passes_with_the_schema(trace_once, tmp_path, tiny_checkpoint, tiny_plan):
    """With the weights copied, onnx reads and checks the file as it is, shapes included."""
    register_schema()
    bundle = export("tiny", tiny_plan, tmp_path / "b", checkpoint=tiny_checkpoint, copy_weights=True)
    onnx.checker.check_model(str(bundle.path / "dit.onnx"), full_check=True)


def test_checker_knows_the_operator(bundles):
    register_schema()
    model = load_resolved(bundles["plugin"].path / "dit.onnx")
    node = next(n for n in model.graph.node if n.op_type == "SparseAttention")
    node.attribute.append(onnx.helper.make_attribute("bogus", 1))
    with pytest.raises(onnx.checker.ValidationError, match="bogus"):
        onnx.checker.check_model(model)


@pytest.mark.parametrize("variant", ["plugin", "portable", "dense"])
def test_weights_are_not_copied(bundles, tiny_checkpoint, variant):
    """Every weight is external data whose location and offset are those of the checkpoint, through a link."""
    folder = tiny_checkpoint / "transformer"
    stored = {}
    for file in folder.glob("*.safetensors"):
        for key, value in load_file(file).items():
            stored[key] = (file.name, value)
    bundle = bundles[variant]
    for graph in bundle.manifest.graphs:
        path = bundle.path / graph.file
        seen = {}
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                seen[tensor.name] = external(tensor)
                file, value = stored[tensor.name]
                assert seen[tensor.name]["location"] == file
                assert int(seen[tensor.name]["length"]) == value.nbytes
        assert seen.keys() == stored.keys()
        for tensor in load_resolved(path).graph.initializer:
            if tensor.name in stored:
                assert onnx.numpy_helper.to_array(tensor).tobytes() == stored[tensor.name][1].tobytes()
    for weight in bundle.manifest.weights:
        assert (bundle.path / weight.file).samefile(folder / weight.file)


def test_operators_of_portable_and_dense(bundles, tiny_plan):
    for variant, domains in (("portable", {""}), ("dense", {"", "com.microsoft"})):
        for graph in bundles[variant].manifest.graphs:
            model = onnx.load(str(bundles[variant].path / graph.file), load_external_data=False)
            assert {n.domain for n in model.graph.node} == domains == {o.domain for o in model.opset_import}
            operators = collections.Counter(n.op_type for n in model.graph.node)
            assert not operators.keys() & {"ScatterND", "ScatterElements", "Loop", "If", "SequenceAt"}
            if variant == "dense":
                assert operators["MultiHeadAttention"] == tiny_plan.geometry.layers


def test_manifest(bundles, tiny_plan, tiny_checkpoint):
    plugin, portable = bundles["plugin"].manifest, bundles["portable"].manifest
    assert [x.name for x in plugin.inputs] == ["hidden_states", "timestep", "encoder_hidden_states", "stage"]
    assert [x.name for x in portable.inputs] == ["hidden_states", "timestep", "encoder_hidden_states"]
    assert plugin.inputs[0].shape == plugin.outputs[0].shape == (2, 3, 4, 24, 24)
    assert [g.stages for g in portable.graphs] == [(0,), (1,)] and plugin.graphs[0].stages == (0, 1)
    assert plugin.latent_shape == (3, 4, 24, 24) and plugin.checkpoint == str(tiny_checkpoint)
    assert plugin.geometry == tiny_plan.geometry
    for name, shape in (("dit.onnx", plugin.inputs), ("dit.stage0.onnx", portable.inputs)):
        variant = "plugin" if name == "dit.onnx" else "portable"
        graph = onnx.load(str(bundles[variant].path / name), load_external_data=False).graph
        got = [(x.name, tuple(d.dim_value for d in x.type.tensor_type.shape.dim)) for x in graph.input]
        assert got == [(spec.name, spec.shape) for spec in shape]


@pytest.mark.parametrize(
    "precision,onnx_type", [("fp16", onnx.TensorProto.FLOAT16), ("bf16", onnx.TensorProto.BFLOAT16)]
)
def test_half_precision_plugin(trace_once, tmp_path, tiny_checkpoint, tiny_plan, precision, onnx_type):
    bundle = export("tiny", tiny_plan, tmp_path / "b", checkpoint=tiny_checkpoint, precision=precision)
    model = onnx.shape_inference.infer_shapes(load_resolved(bundle.path / "dit.onnx"))
    types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.value_info, *model.graph.output]}
    types |= {t.name: t.data_type for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "SparseAttention":
            assert [types[name] for name in node.input[:3]] == [onnx_type] * 3
        if node.op_type == "LayerNormalization":
            assert types[node.input[0]] == onnx.TensorProto.FLOAT
        if node.op_type in ("Mul", "Add", "Sub", "MatMul"):  # a strongly typed engine takes no mixed operands
            assert len({types[name] for name in node.input}) == 1, node.name
    assert types["noise_pred"] == onnx.TensorProto.FLOAT


def test_fp16_plugin_computes_the_same(trace_once, tmp_path, tiny_checkpoint, tiny_plan, feed):
    bundle = export("tiny", tiny_plan, tmp_path / "b", checkpoint=tiny_checkpoint, precision="fp16")
    got = run_in_python(bundle.path / "dit.onnx", {**feed, "stage": np.array([1], dtype=np.int32)})
    assert rel_l2(got, truth(tiny_checkpoint, tiny_plan, feed, OpAttention(tiny_plan), 1)) <= 1e-2


def test_wan_from_a_transformer_folder(tmp_path, wan_checkpoint):
    from svdit.plans.geometry import Geometry

    plan = template("wan2.1", Geometry((2, 4, 6), 0, "none", 2, 3, 64), (1, 4, 4), Diagonal(frames=0))
    bundle = export("wan2.1", plan, tmp_path / "b", checkpoint=wan_checkpoint, variant="portable", batch=1)
    generator = torch.Generator().manual_seed(0)
    feed = {
        "hidden_states": torch.randn(1, 16, 2, 8, 12, generator=generator),
        "timestep": torch.tensor([400.0]),
        "encoder_hidden_states": torch.randn(1, 512, 48, generator=generator),
    }
    denoiser = adapter("wan2.1").denoiser(wan_checkpoint, plan.tiling(), OpAttention(plan))
    with torch.no_grad():
        want = denoiser(*feed.values(), torch.zeros(1, dtype=torch.int32)).numpy()
    got = on_onnxruntime(bundle.path / "dit.stage0.onnx", {k: v.numpy() for k, v in feed.items()})
    assert rel_l2(got, want) <= 1e-5


def test_the_same_export_twice_gives_the_same_bytes(tmp_path, tiny_checkpoint, tiny_plan):
    first, second = (
        export("tiny", tiny_plan, tmp_path / name, checkpoint=tiny_checkpoint, variant="portable") for name in "ab"
    )
    assert first.manifest == second.manifest


def test_an_older_bundle_is_replaced(trace_once, tmp_path, tiny_checkpoint, tiny_plan):
    export("tiny", tiny_plan, tmp_path / "b", checkpoint=tiny_checkpoint, variant="portable")
    export("tiny", tiny_plan, tmp_path / "b", checkpoint=tiny_checkpoint, variant="dense")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]
    assert read_bundle(tmp_path / "b").manifest.variant == "dense"
    assert not (tmp_path / "b" / "dit.stage0.onnx").exists()


def test_a_failed_export_leaves_the_older_bundle(trace_once, tmp_path, own_tiny, tiny_plan, monkeypatch):
    export("tiny", tiny_plan, tmp_path / "b", checkpoint=own_tiny, variant="dense")
    before = json.loads((tmp_path / "b" / "manifest.json").read_text())

    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("svdit.exporter.export.write_manifest", broken)
    with pytest.raises(SvditError, match="no space left on device"):
        export("tiny", tiny_plan, tmp_path / "b", checkpoint=own_tiny, variant="portable")
    assert json.loads((tmp_path / "b" / "manifest.json").read_text()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "checkpoint"]


def test_symbolic_links(trace_once, tmp_path, tiny_checkpoint, tiny_plan, monkeypatch, feed):
    """They are made where hard links are refused; copies are the last resort."""

    def refuse(*args, **kwargs):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    notes = []
    bundle = export("tiny", tiny_plan, tmp_path / "b", checkpoint=tiny_checkpoint, variant="dense", note=notes.append)
    assert all((bundle.path / weight.file).is_symlink() for weight in bundle.manifest.weights)
    assert len(notes) == len(bundle.manifest.weights) and "--copy-weights" in notes[0]
    options = ort.SessionOptions()  # how a runtime reads such a bundle (docs/export.md)
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(tiny_checkpoint / "transformer")
    )
    session = ort.InferenceSession((bundle.path / "dit.onnx").read_bytes(), options)
    assert rel_l2(session.run(None, feed)[0], truth(tiny_checkpoint, tiny_plan, feed, dense)) <= 1e-5
    monkeypatch.setattr(os, "symlink", refuse)
    notes.clear()
    bundle = export("tiny", tiny_plan, tmp_path / "c", checkpoint=tiny_checkpoint, variant="dense", note=notes.append)
    assert not any((bundle.path / weight.file).is_symlink() for weight in bundle.manifest.weights)
    assert "copy" in notes[0]


def test_tracing_reads_no_weights(own_tiny, tiny_plan):
    """Everything but the headers may be unreadable: holes in place of the weights."""
    for file in (own_tiny / "transformer").glob("*.safetensors"):
        size = file.stat().st_size
        data = file.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little")
        file.write_bytes(data[:header])
        os.truncate(file, size)
    model = trace_denoiser(adapter("tiny"), own_tiny, tiny_plan, "bf16", Batch(2, 2)).model
    assert "blocks.1.ffn.net.2.weight" in model.graph.initializers
