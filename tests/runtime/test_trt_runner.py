"""The TensorRT runner: its bookkeeping on stand-ins, its CUDA on a GPU, its TensorRT calls on TensorRT-RTX."""

from __future__ import annotations

import importlib.util
import shutil
import sys

import numpy as np
import pytest

from svdit.plans.bundle import read_bundle
from svdit.plans.errors import SvditError
from svdit.runtime import build_platform, cuda
from svdit.runtime.build_record import Options
from svdit.runtime.runner import make_runner
from svdit.runtime.trt_runner import TrtRunner
from tests.runtime import tensorrt_stand_in as stand_in
from tests.runtime.tensorrt_rtx import needs_rtx, run_script


@pytest.fixture(params=["plugin", "portable"])
def bundle(bundles, tmp_path, request):
    return read_bundle(shutil.copytree(bundles / request.param, tmp_path / request.param))


@pytest.fixture
def plugin(bundles, tmp_path):
    return read_bundle(shutil.copytree(bundles / "plugin", tmp_path / "plugin"))


def install(monkeypatch, bundle, **kind):
    """Put stand-ins in place of both libraries: (TensorRT, CUDA)."""
    device = stand_in.Cuda(**kind)
    trt = stand_in.StandIn(bundle, device)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(cuda, "runtime", lambda: device)
    monkeypatch.setattr(build_platform.cuda, "gpu", lambda index: stand_in.GPU)
    monkeypatch.setattr("polygraphy.backend.trt.get_trt_logger", lambda: None)
    return trt, device


def feed_of(runner, seed=0):
    rng = np.random.default_rng(seed)
    return {spec.name: rng.standard_normal(spec.shape).astype(spec.dtype) for spec in runner.inputs}


def expected(feed, bundle, stage):
    factor = stage if bundle.manifest.variant == "plugin" else stage + 1
    return feed["hidden_states"] * np.float32(factor) + feed["timestep"].reshape(-1, 1, 1, 1, 1)


def test_replays_follow_stage_timestep_and_latents(bundle, monkeypatch):
    trt, _ = install(monkeypatch, bundle)
    stand_in.write_engines(bundle)
    with make_runner(bundle, "tensorrt") as runner:
        enqueued = trt.enqueued
        assert enqueued == 4 * len(bundle.manifest.graphs), "one run and one capture an engine and set of buffers"
        for seed, stage in enumerate([0, 2, 1, 1, 0]):
            feed = feed_of(runner, seed)
            got = runner.infer(feed, stage)
            assert list(got) == ["noise_pred"]
            np.testing.assert_array_equal(got["noise_pred"], expected(feed, bundle, stage))
        assert trt.enqueued == enqueued, "later calls are replays"


def test_outputs_are_the_callers_own(plugin, monkeypatch):
    install(monkeypatch, plugin)
    stand_in.write_engines(plugin)
    with make_runner(plugin, "tensorrt") as runner:
        first = runner.infer(feed_of(runner, 1), 1)["noise_pred"]
        kept = first.copy()
        runner.infer(feed_of(runner, 2), 2)
        np.testing.assert_array_equal(first, kept)


def test_calls_take_two_sets_of_buffers_in_turn(plugin, monkeypatch):
    _, device = install(monkeypatch, plugin)
    stand_in.write_engines(plugin)
    launched, launch = [], device._functions["cudaGraphLaunch"]
    device._functions["cudaGraphLaunch"] = lambda graph, stream: launched.append(graph) or launch(graph, stream)
    with make_runner(plugin, "tensorrt") as runner:
        for stage in (0, 1, 2, 0):
            runner.infer(feed_of(runner), stage)
    assert launched[0] == launched[2] != launched[1] == launched[3]


def test_closing_waits_for_the_gpu_before_anything_is_freed(plugin, monkeypatch):
    _, device = install(monkeypatch, plugin)
    stand_in.write_engines(plugin)
    with make_runner(plugin, "tensorrt"):
        used = len(device.calls)
    closing = device.calls[used:]
    assert closing[:2] == ["cudaStreamSynchronize"] * 2
    assert all("Free" in name or "Destroy" in name for name in closing[2:])


@pytest.mark.filterwarnings("ignore:no CUDA graph")
def test_everything_is_freed_whichever_call_fails(bundle, monkeypatch):
    stand_in.write_engines(bundle)
    _, device = install(monkeypatch, bundle)
    with make_runner(bundle, "tensorrt"):
        assert device.live
    assert not device.live
    calls = len(device.calls)
    for number in range(calls):
        _, device = install(monkeypatch, bundle, fail_at=number)
        runner = make_runner(bundle, "tensorrt")
        name = None
        try:
            runner.activate()
        except SvditError as error:
            name = str(error)
        runner.close()
        assert not device.live, f"after {device.calls[number]}: {name}"
        assert name is None or "cudaErrorMemoryAllocation" in name


@pytest.mark.parametrize("refused_by", ["cudaStreamEndCapture", "execute_async_v3"])
def test_without_capture_every_step_is_enqueued(bundle, monkeypatch, refused_by):
    trt, device = install(monkeypatch, bundle, can_capture=refused_by != "cudaStreamEndCapture")
    trt.refuses_capture = refused_by == "execute_async_v3"
    stand_in.write_engines(bundle)
    runner = make_runner(bundle, "tensorrt")
    with pytest.warns(RuntimeWarning, match="no CUDA graph, every step is enqueued: .+"):
        runner.activate()
    before = trt.enqueued
    feed = feed_of(runner)
    np.testing.assert_array_equal(runner.infer(feed, 1)["noise_pred"], expected(feed, bundle, 1))
    assert trt.enqueued == before + 1
    runner.close()
    assert not device.live


def test_what_tensorrt_reports_is_raised_once(plugin, monkeypatch):
    trt, device = install(monkeypatch, plugin)
    stand_in.write_engines(plugin)
    with make_runner(plugin, "tensorrt") as runner:
        runner._errors.report_error(1, "kernel went astray")
        with pytest.raises(SvditError, match="TensorRT: tensorrt:plugin: got kernel went astray"):
            runner.infer(feed_of(runner), 0)
        runner.infer(feed_of(runner), 0)
        trt.broken = "astray again"
        runner._of_stage[0].of(2)._graphs.clear()
        for _ in range(2):
            with pytest.raises(SvditError, match=r"enqueue: got astray again; expected success$"):
                runner.infer(feed_of(runner), 0)
    trt.broken = "out of memory"
    with pytest.raises(SvditError, match="TensorRT: enqueue: got out of memory"):
        make_runner(plugin, "tensorrt").activate()
    assert not device.live


def test_stripped_engines_get_their_weights_back(bundle, monkeypatch):
    trt, device = install(monkeypatch, bundle)
    stand_in.write_engines(bundle, Options(strip_weights=True))
    with make_runner(bundle, "tensorrt"):
        assert trt.refitted == [str(bundle.path / graph.file) for graph in bundle.manifest.graphs]
    trt.refits_fail = True
    with pytest.raises(SvditError, match=r"TensorRT: weights of .*\.onnx: got no such weight"):
        make_runner(bundle, "tensorrt").activate()
    assert not device.live


@pytest.mark.parametrize(("built", "asked", "budget"), [(2, None, 2 << 30), (2, 0.5, 1 << 29), (2, 64, 3 << 30)])
def test_weight_streaming_budget(plugin, monkeypatch, built, asked, budget):
    trt, _ = install(monkeypatch, plugin)
    stand_in.write_engines(plugin, Options(weight_streaming=built))
    with TrtRunner(plugin, weight_streaming=asked):
        assert trt.engines[0].weight_streaming_budget_v2 == budget


def test_an_engine_not_built_for_streaming(plugin, monkeypatch):
    install(monkeypatch, plugin)
    stand_in.write_engines(plugin)
    message = r"dit\.engine: weight streaming: got an engine that cannot; .*svdit-build .* --weight-streaming 2"
    with pytest.raises(SvditError, match=message):
        TrtRunner(plugin, weight_streaming=2).activate()


def test_engines_of_another_version_or_none(plugin, monkeypatch):
    install(monkeypatch, plugin)
    with pytest.raises(SvditError, match=r"engine\.json: got no such file; .* svdit-build"):
        make_runner(plugin, "tensorrt").activate()
    stand_in.write_engines(plugin, version="10.3.0")
    with pytest.raises(SvditError, match=r"library_version: got 10\.3\.0; expected 10\.14\.1\.48; run: svdit-build"):
        make_runner(plugin, "tensorrt").activate()


def test_devices(plugin):
    assert make_runner(plugin, "tensorrt", device="cuda:3").device == 3
    assert make_runner(plugin, "tensorrt").device == make_runner(plugin, "tensorrt", device="cuda").device == 0
    with pytest.raises(SvditError, match="device: got 'tpu'; expected cuda or cuda:N"):
        make_runner(plugin, "tensorrt", device="tpu")


def test_no_cuda_python(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(SvditError, match=r"no cuda\.bindings .*; expected cuda-python .*; pip install cuda-python"):
        cuda.runtime()


LOAD = """
import sys
from pathlib import Path
from svdit.plans.errors import SvditError
from svdit.runtime.build_platform import this_platform
from svdit.runtime.trt_engine import error_recorder, load_engine
trt = this_platform().module
errors = error_recorder(trt)
for path in sys.argv[1:]:
    try:
        load_engine(trt, Path(path), errors)
    except SvditError as error:
        print(error)
    errors.clear()
"""
REPORT = """
import tensorrt_rtx as trt
from svdit.runtime.trt_engine import error_recorder
recorder, base = error_recorder(trt), trt.IErrorRecorder
for code, text in ((trt.ErrorCodeTRT.INTERNAL_ERROR, "first"), (trt.ErrorCodeTRT.INVALID_STATE, "second")):
    print("fatal", base.report_error(recorder, code, text))
print("overflowed", base.has_overflowed(recorder))
for i in range(base.num_errors(recorder)):
    print(base.get_error_code(recorder, i).name, base.get_error_desc(recorder, i))
print(recorder.text())
base.clear(recorder)
print(base.num_errors(recorder), repr(recorder.text()))
"""


@needs_rtx
def test_tensorrt_rtx_reads_the_mapped_file_and_reports(tmp_path):
    (tmp_path / "text.engine").write_bytes(b"no engine at all" * 64)
    done = run_script(LOAD, tmp_path / "text.engine")
    assert "TensorRT: engine " in done.stdout and "Serialization assertion header.magicTag" in done.stdout, done


@needs_rtx
def test_tensorrt_reaches_every_method_of_the_recorder():
    """Through the functions of the base class, which go by way of C++ as TensorRT itself does."""
    done = run_script(REPORT)
    assert done.stdout.splitlines() == [
        *["fatal False", "fatal False", "overflowed False", "INTERNAL_ERROR first", "INVALID_STATE second"],
        *["first; second", "0 ''"],
    ], done


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and importlib.util.find_spec("cuda") is not None


GIVEN_BACK_BY = {
    "cudaMalloc": "cudaFree",
    "cudaHostAlloc": "cudaFreeHost",
    "cudaStreamCreateWithFlags": "cudaStreamDestroy",
    "cudaEventCreateWithFlags": "cudaEventDestroy",
    "cudaStreamEndCapture": "cudaGraphDestroy",
    "cudaGraphInstantiate": "cudaGraphExecDestroy",
}


class Ledger:
    """A CUDA runtime, and in `live` what it handed out that was not given back. Free memory would tell less: others
    use the GPU too."""

    def __init__(self, cudart: object) -> None:
        self._cudart = cudart
        self.live: list[tuple[str, int]] = []

    def __getattr__(self, name):
        function = getattr(self._cudart, name)
        if name not in {*GIVEN_BACK_BY, *GIVEN_BACK_BY.values()}:
            return function

        def called(*arguments):
            status, *values = function(*arguments)
            assert int(status) == 0, f"{name}: {status}"
            if name in GIVEN_BACK_BY:
                self.live.append((GIVEN_BACK_BY[name], int(values[0])))
            else:
                self.live.remove((name, int(arguments[0])))
            return status, *values

        return called


@pytest.mark.skipif(not has_gpu(), reason="no CUDA GPU with cuda-python")
def test_buffers_and_graphs_on_a_gpu(bundle, monkeypatch):
    """CUDA is real, the engine is PyTorch enqueued on the runner's stream."""
    import torch

    class View:
        def __init__(self, address: int, shape: tuple[int, ...], dtype: str) -> None:
            self.__cuda_array_interface__ = {
                "data": (address, False),
                "shape": tuple(shape),
                "typestr": np.dtype(dtype).str,
                "version": 3,
            }

    views = {}

    def enqueue(places, scale, stream):
        key = places["noise_pred"][0], scale
        if key not in views:  # at the first run, which is not captured
            views[key] = {name: torch.as_tensor(View(*place), device="cuda") for name, place in places.items()}
        found = views[key]
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            out = found["noise_pred"].copy_(found["hidden_states"])
            out.mul_(found["stage"] if scale is None else scale)
            out.add_(found["timestep"].view(-1, 1, 1, 1, 1))

    trt = stand_in.StandIn(bundle, None)
    trt.enqueue = enqueue
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr("polygraphy.backend.trt.get_trt_logger", lambda: None)
    found = cuda.gpu(0)
    monkeypatch.setattr(stand_in, "GPU", found)
    stand_in.write_engines(bundle)
    ledger = Ledger(cuda.runtime())
    monkeypatch.setattr(cuda, "runtime", lambda: ledger)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(2):
        with make_runner(bundle, "tensorrt") as runner:
            assert {name for name, _ in ledger.live} == {*GIVEN_BACK_BY.values()} - {"cudaGraphDestroy"}
            assert all(steps.of(runner.batch.most).captured for steps in runner._of_stage.values())
            enqueued = trt.enqueued
            for seed, stage in enumerate([0, 2, 1, 1, 0]):
                feed = feed_of(runner, seed)
                got = runner.infer(feed, stage)["noise_pred"]
                np.testing.assert_allclose(got, expected(feed, bundle, stage), rtol=1e-6, atol=1e-6)
                tensors = {name: torch.from_numpy(array).to(runner.tensor_device) for name, array in feed.items()}
                tensors["hidden_states"] *= 2
                twice = {**feed, "hidden_states": feed["hidden_states"] * 2}
                got = runner.infer_tensors(tensors, stage)["noise_pred"]
                np.testing.assert_allclose(got.cpu(), expected(twice, bundle, stage), rtol=1e-6, atol=1e-6)
            calls = []
            for seed, stage in enumerate([2, 0, 1, 2, 0, 1]):  # from two streams, without waiting in between
                feed = feed_of(runner, seed)
                with torch.cuda.stream(streams[seed % 2]):
                    tensors = {name: torch.from_numpy(array).to(runner.tensor_device) for name, array in feed.items()}
                    calls.append((feed, stage, runner.infer_tensors(tensors, stage)["noise_pred"]))
            torch.cuda.synchronize()
            for feed, stage, got in calls:
                np.testing.assert_allclose(got.cpu(), expected(feed, bundle, stage), rtol=1e-6, atol=1e-6)
            assert trt.enqueued == enqueued
        assert not ledger.live
