"""--layers: every attention layer of two runners beside each other, and the first one that departs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from svdit.plans.bundle import read_bundle
from svdit.plans.errors import SvditError
from svdit.runtime import attention, cli
from svdit.runtime.compare import compare
from svdit.runtime.layers import LayerError, LayerErrors, layer_paths, mark_layers
from svdit.runtime.pipeline import Request
from svdit.runtime.runner import make_runner
from svdit.trt_plugins import onnxruntime_library
from tests.runtime.conftest import PROMPTS

REQUEST = Request(PROMPTS[:1], 3, 3)
PATHS = ("blocks.0.attn1", "blocks.1.attn1")
built = pytest.mark.skipif(
    onnxruntime_library.find() is None,
    reason=f"no {onnxruntime_library.FILE_NAME}; build it: {onnxruntime_library.BUILD}",
)


def random_feed(runner) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {spec.name: rng.standard_normal(spec.shape, dtype=np.float32) for spec in runner.inputs}


@pytest.mark.parametrize("name", ["portable", "portable-dense", "plugin"])
def test_layers_are_found_in_every_variant(bundles, name):
    assert layer_paths(read_bundle(bundles / name)) == PATHS


@pytest.mark.parametrize("name", ["portable", "portable-dense", pytest.param("plugin", marks=built)])
def test_marked_outputs_are_what_attention_gives_in_torch(bundles, name):
    bundle = read_bundle(bundles / name)
    runners = [mark_layers(make_runner(bundle, backend), bundle) for backend in ("onnxrt", "torch")]
    with runners[0], runners[1], make_runner(bundle, "onnxrt") as plain:
        stage = plain.num_stages - 1
        feed = random_feed(plain)
        graph, torch = (runner.infer(feed, runner.num_stages - 1) for runner in runners)
        np.testing.assert_allclose(graph["noise_pred"], plain.infer(feed, stage)["noise_pred"], rtol=0, atol=1e-5)
    for path in PATHS:
        assert graph[f"layer/{path}"].shape == (2, 144, 2, 64)
        np.testing.assert_allclose(graph[f"layer/{path}"], torch[f"layer/{path}"], rtol=0, atol=1e-4)
    skips = name != "portable-dense"
    assert (not graph["layer/blocks.1.attn1"][:, :, 0].any()) == skips  # head 0 of the last stage


def test_backends_agree_layer_by_layer(bundles):
    found = compare(read_bundle(bundles / "portable"), REQUEST, against="torch", layers=True, show=False).layers
    assert [(e.layer, e.path, e.step) for e in found.errors] == [(n, PATHS[n], s) for n in (0, 1) for s in (0, 1, 2)]
    assert all(0 < e.rel_l2_error < 5e-6 for e in found.errors) and found.first_departure is None


@pytest.mark.parametrize("faulty", [0, 1])
def test_a_wrong_layer_is_named(bundles, tmp_path, monkeypatch, faulty):
    """One layer off by a thousandth: it is the first to depart, whatever it does to the layers behind it."""
    right = attention.OpAttention.__call__

    def wrong(self, q, k, v, layer, *others):
        return right(self, q, k, v, layer, *others) * (1.001 if layer == faulty else 1)

    monkeypatch.setattr(attention.OpAttention, "__call__", wrong)
    figures = tmp_path / "f.json"
    command = [str(bundles / "portable"), "--against", "torch", "--layers", "--prompt", PROMPTS[0], "--steps", "2"]
    done = CliRunner().invoke(cli.compare, [*command, "--json", str(figures)])
    assert done.exit_code == 1, done.output
    assert f"missed: {PATHS[faulty]}, layer {faulty}, is the first to depart: rel. L2 9.9" in done.stderr
    assert json.loads(figures.read_text())["layers"]["first_departure"] == PATHS[faulty]


def test_dense_attention_is_shown_and_not_judged(bundles):
    found = compare(read_bundle(bundles / "portable"), REQUEST, layers=True, show=False)
    assert max(e.rel_l2_error for e in found.layers.errors) > 0.1
    assert found.layers.first_departure is None and found.figures()["layers"]["tolerance"] is None


def test_limits_grow_with_the_root_of_the_layers():
    def error(layer: int, step: int, size: float) -> LayerError:
        return LayerError(layer, f"l{layer}", step, 0, 1.0, size)

    sizes = ((0, 0, 0.9), (3, 2, 1.9), (3, 5, 2.1), (3, 7, 9.0), (8, 0, 9.0))
    errors = LayerErrors(tuple(error(*size) for size in sizes), 1.0)
    assert [errors.limit(n) for n in (0, 3, 8)] == [1.0, 2.0, 3.0]
    assert (errors.first_departure.layer, errors.first_departure.step) == (3, 5)
    assert [e.step for e in errors.worst()] == [0, 7, 0]
    assert LayerErrors((error(0, 0, float("nan")),), 1.0).first_departure is not None


def test_a_backend_without_marks(bundles):
    bundle = read_bundle(bundles / "portable")
    runner = make_runner(bundle, "tensorrt")
    with pytest.raises(SvditError, match="--layers: got the backend tensorrt; expected onnxrt, onnxrt-cuda or torch"):
        mark_layers(runner, bundle)
