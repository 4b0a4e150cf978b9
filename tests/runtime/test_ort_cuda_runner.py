"""The backend onnxrt-cuda without a GPU: its bound graph and its loop on the CPU provider, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from svdit.plans.bundle import read_bundle
from svdit.plans.errors import SvditError
from svdit.runtime import ort_cuda_runner
from svdit.runtime.ort_cuda_runner import BoundGraph, OrtCudaRunner, cuda_options, open_session
from svdit.runtime.pipeline import Request, run_bundle
from svdit.runtime.runner import make_runner
from svdit.trt_plugins import onnxruntime_library
from tests.runtime.conftest import PROMPTS

ort = pytest.importorskip("onnxruntime")
LIBRARY = onnxruntime_library.find()
built = pytest.mark.skipif(
    LIBRARY is None, reason=f"no {onnxruntime_library.FILE_NAME}; build it: {onnxruntime_library.BUILD}"
)
no_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="this ONNX Runtime has CUDA"
)


class OnTheCpu(OrtCudaRunner):
    """The runner with the CPU provider in place of CUDA, and a float32 bundle."""

    def _activate(self) -> None:
        manifest = self.bundle.manifest
        session = open_session(self.bundle.path / "dit.onnx", LIBRARY, "CPUExecutionProvider", {})
        self.tensor_device = "cpu"
        most = manifest.batch.most
        self._graph = BoundGraph(session, manifest.inputs, manifest.outputs, torch.device("cpu"), most=most)


@pytest.fixture
def on_the_cpu(bundles, monkeypatch):
    monkeypatch.setattr(ort_cuda_runner, "check_bundle", lambda bundle: None)
    with OnTheCpu(read_bundle(bundles / "plugin")) as runner:
        yield runner


@pytest.fixture(scope="module")
def half(checkpoint, plan, tmp_path_factory):
    from svdit.exporter.export import export

    return export("tiny", plan, tmp_path_factory.mktemp("half") / "bf16", checkpoint=checkpoint, precision="bf16")


def random_feed(runner) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {spec.name: rng.standard_normal(spec.shape, dtype=np.float32) for spec in runner.inputs}


@built
def test_every_stage_equals_a_plain_session(on_the_cpu, bundles):
    feed = random_feed(on_the_cpu)
    with make_runner(read_bundle(bundles / "plugin"), "onnxrt") as plain:
        for stage in (2, 0, 1):
            truth = plain.infer(feed, stage)["noise_pred"]
            np.testing.assert_array_equal(on_the_cpu.infer(feed, stage)["noise_pred"], truth)


@built
def test_addresses_stay_and_results_are_the_callers(on_the_cpu):
    feed = {name: torch.from_numpy(array) for name, array in random_feed(on_the_cpu).items()}
    graph = on_the_cpu._graph
    before = {name: buffer.data_ptr() for name, buffer in graph.buffers.items()}
    first = on_the_cpu.infer_tensors(feed, 0)["noise_pred"]
    kept = first.clone()
    second = on_the_cpu.infer_tensors(feed, 2)["noise_pred"]
    assert torch.equal(first, kept) and not torch.equal(first, second)
    assert before == {name: buffer.data_ptr() for name, buffer in graph.buffers.items()}


@built
def test_the_loop_on_tensors_makes_the_same_video(on_the_cpu, bundles):
    """Three prompts in calls of two rows; three steps, a stage each."""
    bundle = read_bundle(bundles / "plugin")
    request = Request((*PROMPTS, "slow red circle moving up"), 0, 3)
    made = run_bundle(on_the_cpu, bundle, request, show=False)
    with make_runner(bundle, "onnxrt") as plain:
        truth = run_bundle(plain, bundle, request, show=False)
    np.testing.assert_array_equal(made.latents, truth.latents)
    assert [record.stage for record in made.records] == [0, 1, 2]
    assert all(record.seconds > 0 for record in made.records)


@built
def test_a_tensor_of_another_shape(on_the_cpu):
    feed = {name: torch.from_numpy(array) for name, array in random_feed(on_the_cpu).items()}
    feed["timestep"] = feed["timestep"][:1]
    with pytest.raises(SvditError, match=r"timestep shape: got \(1,\); expected \(2,\)"):
        on_the_cpu.infer_tensors(feed, 0)


@built
@no_cuda
def test_no_silent_fallback_to_the_cpu(half):
    """Without the provider the runtime itself would make a session on the CPU."""
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(SvditError, match=r"a graph that runs on CUDAExecutionProvider alone; check that .*CUDA"),
    ):
        open_session(half.path / "dit.onnx", LIBRARY, "CUDAExecutionProvider", cuda_options(0, 0, True))


@built
def test_a_session_on_another_provider(half, monkeypatch):
    """A provider whose libraries cannot be loaded is left out by the runtime, with a warning at most."""

    class Session:
        def get_providers(self):
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "InferenceSession", lambda *_, **__: Session())
    with pytest.raises(SvditError, match="got a session on CPUExecutionProvider; expected CUDAExecutionProvider"):
        open_session(half.path / "dit.onnx", LIBRARY, "CUDAExecutionProvider", {})


@no_cuda
def test_without_the_provider(half):
    with pytest.raises(SvditError, match="expected CUDAExecutionProvider; pip uninstall onnxruntime, then pip install"):
        make_runner(half, "onnxrt-cuda").activate()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu(half, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(SvditError, match="GPU: got none that torch can use"):
        make_runner(half, "onnxrt-cuda").activate()


def with_gpu(monkeypatch, count: int = 1) -> None:
    monkeypatch.setattr(ort_cuda_runner, "require_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(("version", "safe"), [("1.30.2", False), ("1.31.0", True), ("2.0.0", True)])
def test_several_graphs_need_a_runtime_that_keeps_their_buffers(checkpoint, plan, tmp_path, monkeypatch, version, safe):
    from svdit.exporter.export import export

    free = export("tiny", plan, tmp_path / "free", checkpoint=checkpoint, precision="bf16", batch="1-2")
    with_gpu(monkeypatch)
    monkeypatch.setattr(onnxruntime_library, "find", lambda: None)
    monkeypatch.setattr(ort, "__version__", version)
    message = "no such file" if safe else rf"onnxruntime-gpu: got {version}; expected 1\.31 or newer for one bundle"
    with pytest.raises(SvditError, match=message):
        make_runner(free, "onnxrt-cuda").activate()


@built
@pytest.mark.parametrize("text", ["Failed to allocate memory for requested buffer of size 42", "CUDA: out of memory"])
def test_too_little_memory(on_the_cpu, monkeypatch, text):
    """And the next call starts from the beginning."""
    feed = {name: torch.from_numpy(array) for name, array in random_feed(on_the_cpu).items()}
    graph, session = on_the_cpu._graph, on_the_cpu._graph._session

    class Session:
        io_binding = session.io_binding

        def run_with_iobinding(self, *_):
            raise RuntimeError(f"Error in execution:\n{text}")

    monkeypatch.setattr(graph, "_session", Session())
    message = rf"memory of cpu: got '{text}' from ONNX Runtime; expected room for .* of 2 rows; free the GPU"
    with pytest.raises(SvditError, match=message):
        on_the_cpu.infer_tensors(feed, 0)
    monkeypatch.setattr(graph, "_session", session)
    assert torch.isfinite(on_the_cpu.infer_tensors(feed, 0)["noise_pred"]).all()


def test_without_the_library(half, monkeypatch):
    with_gpu(monkeypatch)
    monkeypatch.setattr(onnxruntime_library, "find", lambda: None)
    with pytest.raises(SvditError, match=r"libsvdit_onnxruntime\.so: got no such file; .*; build it: scripts/build"):
        make_runner(half, "onnxrt-cuda").activate()


def test_a_gpu_that_is_not_there(half, monkeypatch):
    with_gpu(monkeypatch, 2)
    with pytest.raises(SvditError, match="device: got cuda:3; expected cuda:0 to cuda:1"):
        make_runner(half, "onnxrt-cuda", device="cuda:3").activate()


@pytest.mark.parametrize("device", ["tpu", "cuda:x"])
def test_a_device_that_is_none(half, device):
    with pytest.raises(SvditError, match=f"device: got '{device}'; expected cuda or cuda:N"):
        make_runner(half, "onnxrt-cuda", device=device)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("portable", "variant: got 'portable'; expected 'plugin' for the backend onnxrt-cuda"),
        ("plugin", "precision: got 'fp32'; expected 'fp16' or 'bf16' for the backend onnxrt-cuda; export with"),
    ],
)
def test_bundles_of_another_kind(bundles, name, message):
    with pytest.raises(SvditError, match=message):
        make_runner(read_bundle(bundles / name), "onnxrt-cuda")
