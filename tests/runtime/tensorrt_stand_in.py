"""Stand-ins for TensorRT and CUDA, so that the runner's bookkeeping runs without either.

The CUDA of this file has host memory for device memory and counts what is alive; a captured graph is the list of what
was enqueued, run again at every launch. An engine computes noise_pred = hidden_states * scale + timestep, where scale
is the tensor `stage`, or a number stored in its file; it can only be as right about TensorRT as the documentation.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from svdit.plans.bundle import Bundle
from svdit.runtime.build_record import EngineRecord, Options, engine_file, engine_name, write_record
from svdit.runtime.cuda import Gpu

VERSION = "10.14.1.48"
GPU = Gpu(0, "NVIDIA H100 80GB HBM3", "9.0")


class Status(IntEnum):
    cudaSuccess = 0  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorStreamCaptureInvalidated = 901  # noqa: N815


class Cuda:
    """`cuda.bindings.runtime`. `fail_at` makes that call, counted from 0, fail; `live` holds what was not freed."""

    cudaStreamNonBlocking, cudaHostAllocDefault, cudaEventDisableTiming = 1, 0, 2  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815

    def __init__(self, fail_at: int | None = None, can_capture: bool = True) -> None:
        self.fail_at, self.can_capture = fail_at, can_capture
        self.live: dict[tuple[str, int], Any] = {}
        self.calls: list[str] = []
        self.captured: list[Callable[[], None]] | None = None
        self._functions: dict[str, Callable[..., tuple]] = {
            "cudaSetDevice": _succeed,
            "cudaGetLastError": _succeed,
            "cudaStreamSynchronize": _succeed,
            "cudaStreamCreateWithFlags": lambda flags: self._take("stream", 7 + len(self.calls), None),
            "cudaEventCreateWithFlags": lambda flags: self._take("event", len(self.calls), None),
            "cudaEventDestroy": lambda key: self._release("event", key),
            "cudaEventRecord": _succeed,
            "cudaStreamWaitEvent": _succeed,
            "cudaStreamDestroy": lambda key: self._release("stream", key),
            "cudaMalloc": lambda size: self._allocate("device", size),
            "cudaFree": lambda key: self._release("device", key),
            "cudaHostAlloc": lambda size, flags: self._allocate("pinned", size),
            "cudaFreeHost": lambda key: self._release("pinned", key),
            "cudaMemcpyAsync": self._copy,
            "cudaStreamBeginCapture": self._begin_capture,
            "cudaStreamEndCapture": self._end_capture,
            "cudaGraphInstantiate": lambda graph, flags: self._take("instance", graph + 1, self.live["graph", graph]),
            "cudaGraphDestroy": lambda key: self._release("graph", key),
            "cudaGraphExecDestroy": lambda key: self._release("instance", key),
            "cudaGraphLaunch": self._launch,
        }

    def __getattr__(self, name: str) -> Callable[..., tuple]:
        function = self._functions[name]

        def called(*arguments: Any) -> tuple:
            self.calls.append(name)
            releases = "Free" in name or "Destroy" in name
            if self.fail_at == len(self.calls) - 1 and not releases:
                return (Status.cudaErrorMemoryAllocation, None)
            return function(*arguments)

        return called

    def _take(self, kind: str, key: int, value: Any) -> tuple:
        self.live[kind, key] = value
        return Status.cudaSuccess, key

    def _release(self, kind: str, key: int) -> tuple:
        del self.live[kind, key]
        return _succeed()

    def _allocate(self, kind: str, size: int) -> tuple:
        memory = (ctypes.c_uint8 * size)()
        return self._take(kind, ctypes.addressof(memory), memory)

    def _copy(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple:
        assert self.captured is None
        ctypes.memmove(target, source, size)
        return _succeed()

    def _begin_capture(self, stream: int, mode: int) -> tuple:
        self.captured = []
        return _succeed()

    def _end_capture(self, stream: int) -> tuple:
        graph, self.captured = self.captured, None
        if not self.can_capture:
            return Status.cudaErrorStreamCaptureInvalidated, None
        return self._take("graph", id(graph), graph)

    def _launch(self, instance: int, stream: int) -> tuple:
        for work in self.live["instance", instance]:
            work()
        return _succeed()


def _succeed(*_: Any) -> tuple:
    return (Status.cudaSuccess,)


def host_array(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The array at an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.addresses, self.error_recorder = engine, {}, None
        self.rows = 1

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.specs

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """A number of rows that the profile does not have is refused."""
        batch = self.engine.trt.bundle.manifest.batch
        self.rows = shape[0]
        return shape == self.engine.specs[name].sizes(self.rows) and batch.least <= self.rows <= batch.most

    def execute_async_v3(self, stream: int) -> bool:
        self.engine.trt.enqueued += 1
        if self.engine.trt.broken:
            self.error_recorder.report_error(1, self.engine.trt.broken)
            return False
        if self.engine.trt.refuses_capture and self.engine.trt.cuda.captured is not None:
            return False
        assert set(self.addresses) == set(self.engine.specs)
        places = {name: (self.addresses[name], s.sizes(self.rows), s.dtype) for name, s in self.engine.specs.items()}
        self.engine.trt.enqueue(places, self.engine.scale, stream)
        return True


class Engine:
    streamable_weights_size = 3 << 30

    def __init__(self, trt: StandIn, content: bytes) -> None:
        self.trt, self.scale = trt, json.loads(content)["scale"]
        self.specs = {s.name: s for s in (*trt.bundle.manifest.inputs, *trt.bundle.manifest.outputs)}
        self.num_io_tensors = len(self.specs)
        self.weight_streaming_budget_v2 = None
        trt.engines.append(self)

    def get_tensor_name(self, i: int) -> str:
        return list(self.specs)[i]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [-1 if isinstance(n, str) else n for n in self.specs[name].shape]

    def get_tensor_mode(self, name: str) -> SimpleNamespace:
        inputs = [spec.name for spec in self.trt.bundle.manifest.inputs]
        return SimpleNamespace(name="INPUT" if name in inputs else "OUTPUT")

    def create_execution_context(self) -> Context:
        return Context(self)


class StandIn(ModuleType):
    """The module `tensorrt`, with engines for one bundle. `broken` is an error that every run reports."""

    def __init__(self, bundle: Bundle, cuda: Any) -> None:
        super().__init__("tensorrt")
        self.__version__ = VERSION
        self.bundle, self.cuda = bundle, cuda
        self.enqueued, self.broken, self.refits_fail, self.refuses_capture = 0, "", False, False
        self.engines: list[Engine] = []
        self.refitted: list[str] = []
        self.IErrorRecorder = type("IErrorRecorder", (), {"__init__": lambda self: None})
        self.Runtime = lambda logger: SimpleNamespace(
            deserialize_cuda_engine=lambda content: Engine(self, bytes(content))
        )
        self.Refitter = lambda engine, logger: SimpleNamespace(refit_cuda_engine=lambda: True)
        self.OnnxParserRefitter = lambda refitter, logger: SimpleNamespace(
            refit_from_file=self._refit,
            num_errors=int(self.refits_fail),
            get_error=lambda i: SimpleNamespace(desc=lambda: "no such weight"),
        )
        self.get_plugin_registry = lambda: SimpleNamespace(get_creator=lambda *key: object())

    def _refit(self, path: str) -> bool:
        self.refitted.append(path)
        return not self.refits_fail

    def enqueue(self, places: dict[str, tuple], scale: float | None, stream: int) -> None:
        """Run now on the tensors at (address, shape, dtype), or become part of the graph that is being captured."""

        def work() -> None:
            found = {name: host_array(*place) for name, place in places.items()}
            timestep = found["timestep"].reshape(-1, 1, 1, 1, 1)
            factor = found["stage"] if scale is None else scale
            found["noise_pred"][...] = found["hidden_states"] * factor + timestep

        work() if self.cuda.captured is None else self.cuda.captured.append(work)


def write_engines(bundle: Bundle, options: Options = Options(), version: str = VERSION) -> Path:  # noqa: B008
    """Engine files of the stand-in and their record; engine i of several multiplies by i + 1."""
    made = []
    graphs = bundle.manifest.graphs
    for i, graph in enumerate(graphs):
        path = bundle.path / engine_name(graph.file)
        path.write_text(json.dumps({"scale": None if bundle.manifest.variant == "plugin" else i + 1}))
        made.append(engine_file(path, path.name, graph.sha256, graph.stages))
    record = EngineRecord(
        "tensorrt", version, GPU.name, GPU.compute_capability, options, tuple(made), bundle.manifest.weights
    )
    write_record(bundle.path, record)
    return bundle.path
