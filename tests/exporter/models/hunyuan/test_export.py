"""Exports of small checkpoints: what the graphs compute, how the nodes look, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file

from svdit.exporter.export import export, rewrite, trace_denoiser
from svdit.exporter.models.registry import adapter
from svdit.plans.batch import Batch
from svdit.plans.errors import SvditError
from svdit.plans.schema import template
from svdit.plans.tables import tables_of
from svdit.plans.tiles import Tiling
from svdit.runtime.attention import OpAttention
from tests.exporter.graphs import load_resolved, run_in_python
from tests.exporter.models.hunyuan import checkpoints as small
from tests.tolerance import rel_l2

NAMES = [f"transformer_blocks.{i}.attn" for i in range(2)] + [f"single_transformer_blocks.{i}.attn" for i in range(3)]
INPUTS = [
    "hidden_states",
    "timestep",
    "encoder_hidden_states",
    "stage",
    "encoder_attention_mask",
    "pooled_projections",
    "guidance",
]
FEW = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A transformer folder in several shards."""
    folder = small.save(tmp_path_factory.mktemp("hunyuan"), shard="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def traced(folder):
    """Tracing takes seconds: every variant comes from this one."""
    return trace_denoiser(adapter("hunyuan"), folder, small.plan(), "fp32", Batch(2, 2))


@pytest.fixture(scope="module")
def plugin(tmp_path_factory, folder, traced):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("svdit.exporter.export.trace_denoiser", lambda *args: traced)
        return export("hunyuan", small.plan(), tmp_path_factory.mktemp("plugin") / "b", checkpoint=folder)


@pytest.fixture(scope="module")
def others(tmp_path_factory, folder, traced):
    """Graphs of the other variants with the weights beside them."""
    place = tmp_path_factory.mktemp("others")
    for file in folder.glob("*.safetensors"):
        shutil.copy(file, place)
    for variant in ("portable", "dense"):
        for name, (model, _) in rewrite(traced, small.plan(), variant).items():
            (place / f"{variant}.{name}").write_bytes(ir.to_proto(model).SerializeToString())
    return place


def numpy_feed() -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in small.feed().items()}


def truth(folder, plan, stage=0) -> np.ndarray:
    denoiser = adapter("hunyuan").denoiser(folder, plan.tiling(), OpAttention(plan))
    with torch.no_grad():
        return denoiser(**small.feed(), stage=torch.tensor([stage], dtype=torch.int32)).numpy()


def on_onnxruntime(path, feed) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feed)[0]


@pytest.mark.parametrize("stage", [0, 1])
def test_portable_and_plugin_equal_torch(folder, plugin, others, stage):
    want = truth(folder, small.plan(), stage)
    assert rel_l2(on_onnxruntime(others / f"portable.dit.stage{stage}.onnx", numpy_feed()), want) <= 1e-5
    number = np.array([stage], dtype=np.int32)
    assert rel_l2(run_in_python(plugin.path / "dit.onnx", {**numpy_feed(), "stage": number}), want) <= 1e-5


def test_stages_differ(folder):
    """Without this the test above would not see a stage that is ignored."""
    assert rel_l2(truth(folder, small.plan(), 0), truth(folder, small.plan(), 1)) > 0.01


def test_dense_equals_a_full_plan_in_torch(folder, others):
    want = truth(folder, template("hunyuan", small.geometry(), (1, 4, 4)))
    assert rel_l2(on_onnxruntime(others / "dense.dit.onnx", numpy_feed()), want) <= 1e-5


def test_plugin_graph_structure(plugin):
    """One node a layer, double blocks first, with the plan's tables, text behind the video, one text length."""
    model = onnx.load(str(plugin.path / "dit.onnx"), load_external_data=False)
    nodes = [n for n in model.graph.node if n.op_type == "SparseAttention"]
    assert [n.name for n in nodes] == [f"{name}/SparseAttention" for name in NAMES]
    tables = tables_of(small.plan())
    values = {t.name: t for t in model.graph.initializer}
    lengths = set()
    for layer, node in enumerate(nodes):
        assert node.domain == "svdit" and node.input[3] == "stage"
        lengths.add(node.input[4])
        expected = [
            tables.head_pattern[layer],
            tables.tile_offsets,
            tables.row_offsets,
            tables.tile_index,
            tables.work_order[layer],
        ]
        for name, want in zip(node.input[5:], expected, strict=True):
            assert np.array_equal(onnx.numpy_helper.to_array(values[name]), want)
        got = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert got["text_first"] == 0 and got["text_tokens"] == small.TEXT and got["scale"] == 0.125
        assert list(got["grid"]) == list(small.GRID) and list(got["tile"]) == [2, 2, 4]
    (length,) = lengths
    producer = next(n for n in model.graph.node if length in n.output)
    assert producer.op_type in ("ReduceSum", "Cast") and "encoder_attention_mask" in _ancestors(model, producer)
    operators = {n.op_type for n in model.graph.node}
    assert not operators & {"ScatterND", "ScatterElements", "Loop", "If", "SequenceAt", "Range"}


def _ancestors(model, node) -> set[str]:
    """Names of everything that a node is computed from."""
    maker = {output: n for n in model.graph.node for output in n.output}
    seen, waiting = set(), list(node.input)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(maker[name].input if name in maker else ())
    return seen


def test_manifest(plugin, folder):
    manifest = plugin.manifest
    assert [x.name for x in manifest.inputs] == INPUTS
    kinds = {x.name: (x.dtype, x.shape) for x in manifest.inputs}
    assert kinds["encoder_hidden_states"] == ("float32", (2, small.TEXT, 24))
    assert kinds["encoder_attention_mask"] == ("int32", (2, small.TEXT))
    assert kinds["pooled_projections"] == ("float32", (2, 20)) and kinds["guidance"] == ("float32", (2,))
    assert manifest.outputs[0].shape == (2, 4, 3, 10, 14) == kinds["hidden_states"][1]
    for weight in manifest.weights:
        assert (plugin.path / weight.file).samefile(folder / weight.file)


def short_plan():
    """For checkpoints saved with FEW."""
    return template("hunyuan", dataclasses.replace(small.geometry(), layers=2), (2, 2, 4))


def test_without_guidance_and_with_image_channels(tmp_path):
    changes = {"guidance_embeds": False, "in_channels": 9, "image_condition_type": "latent_concat"}
    folder = small.save(tmp_path / "h", **FEW, **changes)
    traced = trace_denoiser(adapter("hunyuan"), folder, short_plan(), "fp32", Batch(1, 1))
    assert [x.name for x in traced.inputs] == INPUTS[:-1]
    assert traced.inputs[0].shape == (1, 9, 3, 10, 14) and traced.outputs[0].shape == (1, 4, 3, 10, 14)


def test_half_precision_has_no_mixed_operands(tmp_path):
    """What a strongly typed engine asks for; norms stay in float32, attention gets half."""
    folder = small.save(tmp_path / "h", **FEW)
    bundle = export("hunyuan", short_plan(), tmp_path / "b", checkpoint=folder, precision="bf16")
    model = onnx.shape_inference.infer_shapes(load_resolved(bundle.path / "dit.onnx"))
    types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.value_info, *model.graph.output]}
    types |= {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    types |= {t.name: t.data_type for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "SparseAttention":
            assert [types[name] for name in node.input[:3]] == [onnx.TensorProto.BFLOAT16] * 3
        if node.op_type == "LayerNormalization":
            assert types[node.input[0]] == onnx.TensorProto.FLOAT
        if node.op_type in ("Mul", "Add", "Sub", "Div", "MatMul"):
            assert len({types[name] for name in node.input}) == 1, node.name
    assert types["noise_pred"] == onnx.TensorProto.FLOAT


def test_one_file_and_shards_give_the_same_values(tmp_path, folder):
    single = small.save(tmp_path / "single")
    assert len(list(single.glob("*.safetensors"))) == 1
    tiling = Tiling(small.geometry(), (2, 2, 4))
    first, second = (adapter("hunyuan").denoiser(x, tiling, None).state_dict() for x in (folder, single))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def edit(folder: Path, **changes) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **changes}))


def change(folder: Path, action) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    action(tensors)
    save_file(tensors, path)


BAD = {
    "missing key": (
        lambda f: change(f, lambda t: t.pop("single_transformer_blocks.1.attn.norm_q.weight")),
        r"1 missing key\(s\): -single_transformer_blocks.1.attn.norm_q.weight; expected exactly the \d+ keys",
    ),
    "left-over key": (
        lambda f: change(f, lambda t: t.update({"transformer_blocks.0.attn.extra": torch.zeros(1)})),
        r"1 unknown key\(s\): \+transformer_blocks.0.attn.extra",
    ),
    "wrong shape": (
        lambda f: change(f, lambda t: t.update({"proj_out.weight": t["proj_out.weight"].T.contiguous()})),
        r"proj_out.weight: got \[128, 16\]; expected shape \[16, 128\]",
    ),
    "patch kernel": (
        lambda f: change(f, lambda t: t.update({"x_embedder.proj.weight": torch.zeros(128, 16)})),
        r"x_embedder.proj.weight: got \[128, 16\]; expected shape \[128, 4, 1, 2, 2\]",
    ),
    "class": (
        lambda f: edit(f, _class_name="WanTransformer3DModel"),
        r'_class_name: got "WanTransformer3DModel"; expected "HunyuanVideoTransformer3DModel"',
    ),
    "unknown config key": (lambda f: edit(f, flavour=3), r"\$.flavour: got an unknown key; expected one of"),
    "fewer blocks": (
        lambda f: edit(f, num_refiner_layers=1),
        r"18 unknown key\(s\): \+context_embedder.token_refiner.refiner_blocks.1.attn.*; expected exactly",
    ),
    "token replace": (
        lambda f: edit(f, image_condition_type="both"),
        r'image_condition_type: got "both"; expected one of null, "latent_concat", "token_replace"',
    ),
    "norm": (lambda f: edit(f, qk_norm="layer_norm"), r'qk_norm: got "layer_norm"; expected "rms_norm"'),
    "rope": (
        lambda f: edit(f, rope_axes_dim=[8, 28, 26]),
        r"rope_axes_dim: got \[8, 28, 26\]; expected attention_head_dim, 64, as the sum",
    ),
    "rope odd": (lambda f: edit(f, rope_axes_dim=[8, 27, 29]), r"rope_axes_dim\[1\]: got 27; expected an even number"),
    "ratio": (lambda f: edit(f, mlp_ratio=-1), r"mlp_ratio: got -1; expected a positive number"),
    "no single blocks": (lambda f: edit(f, num_single_layers=0), r"num_single_layers: got 0; expected an integer of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints(tmp_path, case):
    folder = small.save(tmp_path / "h")
    damage, message = BAD[case]
    damage(folder)
    with pytest.raises(SvditError, match=message):
        export("hunyuan", small.plan(), tmp_path / "b", checkpoint=folder)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("layers", 4, r"geometry.layers: got 4; expected 5, as the hunyuan checkpoint"),
        ("heads", 3, r"geometry.heads: got 3; expected 2"),
        ("text_position", "before", r"geometry.text_position: got before; expected after"),
    ],
)
def test_plans_for_another_geometry(folder, tmp_path, field, value, message):
    plan = template("hunyuan", dataclasses.replace(small.geometry(), **{field: value}), (1, 4, 4))
    with pytest.raises(SvditError, match=message):
        export("hunyuan", plan, tmp_path / "b", checkpoint=folder)


def test_text_and_video_are_left_to_the_pipeline(folder):
    with pytest.raises(SvditError, match="embeddings made by diffusers"):
        adapter("hunyuan").encode_prompts(folder, ["a cat"])
    with pytest.raises(SvditError, match="diffusers' pipeline and its VAE"):
        adapter("hunyuan").decode(folder, torch.zeros(1, 4, 3, 10, 14))
    with pytest.raises(SvditError, match="no scheduler"):
        adapter("hunyuan").sampling(folder).scheduler()
