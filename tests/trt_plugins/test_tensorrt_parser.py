"""TensorRT-RTX and the plugin: its ONNX parser finds the creator and hands over every attribute, its builder embeds it.

Without a GPU the process that parsed a network with a plugin in it ends with an abort of the library, after the plugin
was created; hence one process for each model.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from svdit.exporter.export import export
from svdit.exporter.models.registry import adapter
from svdit.exporter.op_model import op_model
from svdit.plans.patterns import Diagonal, Stripe
from svdit.plans.schema import Plan, Stage
from tests.cases import BY_NAME, op_attributes
from tests.exporter import checkpoints
from tests.trt_plugins.test_tensorrt_plugin import BUILD, PLUGIN

pytestmark = [
    pytest.mark.skipif(not PLUGIN.is_file(), reason=f"no {PLUGIN.name} in {BUILD}; see docs/tensorrt.md"),
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None, reason="no TensorRT-RTX; pip install tensorrt-rtx-cu13"
    ),
]

PARSE = """
import sys
import tensorrt_rtx as trt
plugin, model = sys.argv[1:]
assert trt.get_plugin_registry().load_library(plugin) is not None, "load_library"
logger = trt.Logger(trt.Logger.INFO)
network = trt.Builder(logger).create_network(0)
parser = trt.OnnxParser(network, logger)
parsed = parser.parse_from_file(model)
print("parsed", parsed, [str(parser.get_error(i)) for i in range(parser.num_errors)])
"""
EMBED = """
import sys
import tensorrt_rtx as trt
(plugin,) = sys.argv[1:]
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(0)
x = network.add_input("x", trt.float32, (4,))
network.mark_output(network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0))
config = builder.create_builder_config()
config.plugins_to_serialize = [plugin]
engine = bytes(builder.build_serialized_network(network, config))
print("embedded", open(plugin, "rb").read() in engine)
for registry in (builder.get_plugin_registry(), trt.get_plugin_registry()):
    handle = registry.load_library(plugin)
    found = registry.get_creator("SparseAttention", "1", "") is not None
    registry.deregister_library(handle)
    print("registered", found, registry.load_library(plugin) is not None)
"""
CREATED = re.compile(
    r"^\[svdit\] SparseAttention, createPlugin\((.*)\): scale (\S+); text_tokens (\d+); text_first (\d); "
    r"grid (\d+ \d+ \d+); tile (\d+ \d+ \d+); patterns (.*)$",
    re.MULTILINE,
)


def play(script: str, *arguments: Path) -> tuple[int, str]:
    """Exit status and everything printed."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={**os.environ, "SVDIT_TENSORRT_VERBOSE": "1"},
        check=False,
    )
    return done.returncode, done.stdout


def parse(model: Path) -> tuple[int, str]:
    return play(PARSE, PLUGIN, model)


def save_op(case_name: str, folder: Path, dtype: str = "BFLOAT16") -> Path:
    case = BY_NAME[case_name]
    batch, _, _, head_dim = case.shape
    path = folder / "op.onnx"
    onnx.save(ir.to_proto(op_model(case.tables, batch, head_dim, case.layer, case.scale, dtype)), path)
    return path


def change(path: Path, **attributes: object) -> None:
    model = onnx.load(path)
    (node,) = model.graph.node
    kept = [x for x in node.attribute if x.name not in attributes]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.extend(onnx.helper.make_attribute(key, x) for key, x in attributes.items() if x is not None)
    onnx.save(model, path)


@pytest.mark.parametrize("name", ["scale", "text-before-130-len-17", "pattern-all-text-after", "tile-border-d128"])
def test_every_attribute_arrives(name, tmp_path):
    attributes = op_attributes(BY_NAME[name])
    status, text = parse(save_op(name, tmp_path))
    (created,) = CREATED.findall(text)
    node, scale, *rest = created
    assert node == "attention/SparseAttention"
    assert float(scale) == pytest.approx(attributes["scale"], rel=1e-7)
    assert rest == [
        str(attributes["text_tokens"]),
        str(int(attributes["text_first"])),
        *(" ".join(map(str, attributes[key])) for key in ("grid", "tile", "patterns")),
    ]
    assert "Successfully created plugin: SparseAttention" in text
    assert status in (0, -signal.SIGABRT), text


@pytest.mark.parametrize("batch", ["2", "1-2"])
def test_the_plugin_is_taken_for_an_exported_model(batch, tmp_path):
    checkpoint = checkpoints.save_tiny(tmp_path / "checkpoint")
    patterns = {"d": Diagonal(frames=0), "s": Stripe(columns=((0, 2),), frames=1)}
    stages = (Stage(0.4, (("full", "d"), ("full", "full"))), Stage(1.0, (("d", "skip"), ("d", "s"))))
    plan = Plan("tiny", adapter("tiny").geometry(checkpoint), (1, 4, 4), patterns, stages, {"method": "test"})
    out = tmp_path / "bundle"
    export("tiny", plan, out, checkpoint=checkpoint, precision="bf16", batch=batch, copy_weights=True)
    status, text = parse(out / "dit.onnx")
    node, *rest = CREATED.findall(text)[0]
    assert node.startswith("blocks.0.")
    assert rest == ["0.125", "0", "0", "4 6 6", "1 4 4", "full skip d s"]
    assert "Successfully created plugin: SparseAttention" in text
    assert status in (0, -signal.SIGABRT), text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scale": -1.0}, "scale: got -1; expected a positive finite number"),
        ({"scale": None}, "scale: got no such attribute"),
        ({"scale": 1}, "scale: got field type 5; expected 1"),
        ({"text_first": 2}, "text_first: got 2; expected 0 or 1"),
        ({"tile": [8, 16]}, "tile: got 2 values; expected 3"),
    ],
)
def test_a_bad_attribute_stops_the_parser_with_a_sentence(changes, sentence, tmp_path):
    path = save_op("scale", tmp_path)
    change(path, **changes)
    status, text = parse(path)
    assert f"[svdit] SparseAttention, createPlugin(attention/SparseAttention): {sentence}" in text
    assert "parsed False" in text
    assert status == 0, text


def test_another_namespace_is_not_ours(tmp_path):
    path = save_op("scale", tmp_path)
    change(path, plugin_namespace="elsewhere")
    status, text = parse(path)
    assert not CREATED.search(text)
    assert "parsed False" in text
    assert status == 0, text


def test_engines_embed_it_and_every_registry_loads_it_again():
    status, text = play(EMBED, PLUGIN)
    lines = [line for line in text.splitlines() if line.startswith(("embedded", "registered"))]
    assert lines == ["embedded True", "registered True True", "registered True True"], text
    assert status == 0, text
