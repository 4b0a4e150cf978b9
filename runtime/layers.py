"""What every self-attention layer gives, beside the prediction: runners that return it, and the verdict on two of them.

Letters: B batch, N tokens in tile order, H heads, D head size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from svdit.plans.bundle import Bundle, TensorSpec
from svdit.plans.errors import complain
from svdit.runtime.runner import Runner

if TYPE_CHECKING:
    import onnx

    from svdit.runtime.polygraphy_bridge import OutputError
    from svdit.runtime.torch_runner import TorchRunner

PREFIX = "layer/"
"""Of the names of marked outputs: PREFIX + module path."""
OPERATOR = "SparseAttention"
EXPANDED = re.compile(r"/attended(_\d+)?$")
"""How the exporter names an attention layer's output where it puts standard operators in the node's place."""
TOLERANCE = {"fp32": 2e-5, "fp16": 2e-3, "bf16": 1.6e-2}
"""Largest relative L2 error of the first layer between two backends of one precision; docs/run.md says why."""


def attention_outputs(model: onnx.ModelProto) -> dict[str, str]:
    """Module path of each self-attention layer, in the graph's order, to the name of its output [B, N, H, D]."""
    found = {}
    for node in model.graph.node:
        name = node.output[0] if node.output else ""
        if node.op_type == OPERATOR or EXPANDED.search(name):
            found[name.rpartition("/")[0]] = name
    return found


def layer_paths(bundle: Bundle) -> tuple[str, ...]:
    """Module paths of the attention layers, the first layer first."""
    return tuple(attention_outputs(_graph(bundle.path / bundle.manifest.graphs[0].file)))


def layer_specs(bundle: Bundle) -> tuple[TensorSpec, ...]:
    """The outputs that marking adds: float32 [B, N, H, D] each."""
    geometry = bundle.manifest.geometry
    shape = (bundle.manifest.batch.dim, geometry.tokens, geometry.heads, geometry.head_dim)
    return tuple(TensorSpec(PREFIX + path, "float32", shape) for path in layer_paths(bundle))


def marked_graph(path: Path) -> bytes:
    """The graph in `path` with every attention output, cast to float32, among its outputs; weights stay outside."""
    from onnx import TensorProto, helper

    model = _graph(path)
    for layer, name in attention_outputs(model).items():
        model.graph.node.append(helper.make_node("Cast", [name], [PREFIX + layer], to=TensorProto.FLOAT))
        model.graph.output.append(helper.make_tensor_value_info(PREFIX + layer, TensorProto.FLOAT, None))
    return model.SerializeToString()


def _graph(path: Path) -> onnx.ModelProto:
    import onnx

    return onnx.load(str(path), load_external_data=False)


def mark_layers(runner: Runner, bundle: Bundle) -> Runner:
    """An inactive runner whose `infer` returns the attention outputs too; `runner` is not to be used beside it."""
    from svdit.runtime.torch_runner import TorchRunner

    if isinstance(runner, TorchRunner):
        return TorchLayers(runner, layer_specs(bundle))
    if not hasattr(runner, "mark_layers"):
        raise complain("--layers", f"the backend {runner.backend}", "onnxrt, onnxrt-cuda or torch on both sides")
    runner.mark_layers()
    return runner


class TorchLayers(Runner):
    """A torch runner that keeps what its attention function returns."""

    backend = "torch"

    def __init__(self, runner: TorchRunner, layers: Sequence[TensorSpec]) -> None:
        super().__init__(runner.name, runner.inputs, (*runner.outputs, *layers), runner.num_stages, runner.batch)
        self._runner, self._names = runner, [spec.name for spec in layers]

    def _activate(self) -> None:
        self._runner.activate()

    def _infer(self, feed: Mapping[str, np.ndarray], stage: int) -> dict[str, np.ndarray]:
        model = self._runner.model
        attention, seen = model.attention, {}

        def recording(q: Any, k: Any, v: Any, layer: int, *others: Any) -> Any:
            out = attention(q, k, v, layer, *others)
            seen[self._names[layer]] = out.float().cpu().numpy()
            return out

        model.attention = recording
        try:
            return {**self._runner.infer(feed, stage), **seen}
        finally:
            model.attention = attention

    def _close(self) -> None:
        self._runner.close()


@dataclass(frozen=True)
class LayerError:
    """One attention layer at one compared step."""

    layer: int
    path: str
    step: int
    stage: int
    max_abs_error: float
    rel_l2_error: float


@dataclass(frozen=True)
class LayerErrors:
    """All layers at all compared steps. `tolerance` is that of the first layer; None where the two should differ."""

    errors: tuple[LayerError, ...]
    tolerance: float | None

    def limit(self, layer: int) -> float:
        """Largest relative L2 error of a layer: errors of the layers before it add up like independent ones."""
        return math.inf if self.tolerance is None else self.tolerance * math.sqrt(layer + 1)

    @property
    def first_departure(self) -> LayerError | None:
        """The first layer, and there the first step, whose error is beyond its limit."""
        beyond = [e for e in self.errors if not e.rel_l2_error <= self.limit(e.layer)]
        return min(beyond, key=lambda e: (e.layer, e.step), default=None)

    def worst(self) -> list[LayerError]:
        """For each layer, the step with the largest relative error."""
        layers = sorted({e.layer for e in self.errors})
        return [max((e for e in self.errors if e.layer == n), key=lambda e: e.rel_l2_error) for n in layers]


def judge(outputs: Sequence[OutputError], tolerance: float | None) -> LayerErrors:
    """Those of the errors that belong to marked outputs, in the order of the layers."""
    paths = list(dict.fromkeys(e.output for e in outputs if e.output.startswith(PREFIX)))
    errors = [
        LayerError(
            paths.index(e.output), e.output.removeprefix(PREFIX), e.step, e.stage, e.max_abs_error, e.rel_l2_error
        )
        for e in outputs
        if e.output in paths
    ]
    return LayerErrors(tuple(sorted(errors, key=lambda e: (e.layer, e.step))), tolerance)
