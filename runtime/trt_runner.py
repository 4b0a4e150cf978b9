"""TensorRT: the engines that `svdit-build` put into a bundle, one CUDA graph each, replayed for every step.

Addresses never change after `activate`: every input has one buffer in device memory and one pinned on the host. A call
copies the inputs, `stage` and `timestep` among them, then replays the graph, which reads what the buffers now hold.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from svdit.plans.bundle import Bundle
from svdit.plans.errors import SvditError, complain
from svdit.runtime import cuda
from svdit.runtime.build_platform import Platform, this_platform
from svdit.runtime.build_record import GIB, EngineRecord, read_record, require_fresh
from svdit.runtime.runner import Runner
from svdit.trt_plugins import tensorrt_library

if TYPE_CHECKING:
    import torch


class TrtRunner(Runner):
    """Runs the engines of a bundle, on one GPU and one stream.

    device            number of the GPU
    weight_streaming  GiB of weights in device memory, instead of what the engine was built with

    `infer` takes and gives arrays on the host, `infer_tensors` tensors on the GPU, where torch can use it.
    """

    backend = "tensorrt"

    def __init__(self, bundle: Bundle, *, device: int = 0, weight_streaming: float | None = None) -> None:
        manifest = bundle.manifest
        num_stages = max(stage for graph in manifest.graphs for stage in graph.stages) + 1
        super().__init__(f"tensorrt:{manifest.variant}", manifest.inputs, manifest.outputs, num_stages)
        self.bundle, self.device, self.weight_streaming = bundle, device, weight_streaming
        self.tensor_device = f"cuda:{device}" if torch_has_cuda() else None
        self._stack = ExitStack()
        self._buffers: dict[str, cuda.Buffer] = {}
        self._of_stage: dict[int, Step] = {}
        self._errors: Any = None

    def _activate(self) -> None:
        try:
            self._load()
        except BaseException:
            self._close()
            raise

    def _load(self) -> None:
        record = read_record(self.bundle.path)
        platform = this_platform(self.device)
        require_fresh(self.bundle, record, platform)
        cudart = cuda.runtime()
        cuda.call(cudart.cudaSetDevice(self.device), f"device {self.device}")
        self.stream = cuda.Stream(cudart, "denoise", self._stack)
        manifest = self.bundle.manifest
        for spec in (*manifest.inputs, *manifest.outputs):
            self._buffers[spec.name] = cuda.Buffer(cudart, spec.name, spec.shape, spec.dtype, self._stack)
        if manifest.variant == "plugin":
            tensorrt_library.load(platform.module)
        self._errors = error_recorder(platform.module)
        for engine in record.engines:
            loaded = self._engine(platform, record, engine.file)
            step = Step(cudart, loaded, self._buffers, self.stream, self._errors)
            step.capture(self._stack)
            self._of_stage |= dict.fromkeys(engine.stages, step)

    def _engine(self, platform: Platform, record: EngineRecord, file: str) -> Any:
        """The engine in `file`, ready for contexts: weights put back, streaming budget set."""
        trt, folder = platform.module, self.bundle.path
        engine = load_engine(trt, folder / file, self._errors)
        if record.options.strip_weights:
            refit(trt, engine, folder.resolve() / Path(file).with_suffix(".onnx").name, self._errors)
        budget = record.options.weight_streaming if self.weight_streaming is None else self.weight_streaming
        if budget is not None:
            if record.options.weight_streaming is None:
                raise complain(
                    f"{folder / file}: weight streaming",
                    "an engine that cannot",
                    "one built for it",
                    f"run: svdit-build {folder} --weight-streaming {budget:g}",
                )
            engine.weight_streaming_budget_v2 = min(int(budget * GIB), engine.streamable_weights_size)
        return engine

    def infer_tensors(self, feed: Mapping[str, torch.Tensor], stage: int) -> dict[str, torch.Tensor]:
        """Evaluate once on the GPU's own tensors, in the order of torch's stream and without waiting for it.

        Raises SvditError for a tensor of another shape.
        """
        import torch

        for name, tensor in feed.items():
            if tensor.shape != self._buffers[name].host.shape:
                raise complain(f"{self.name}: {name} shape", tuple(tensor.shape), self._buffers[name].host.shape)
        outer = torch.cuda.current_stream(self.tensor_device)
        own = torch.cuda.ExternalStream(int(self.stream.handle), device=self.tensor_device)
        own.wait_stream(outer)
        with torch.cuda.stream(own):
            here = {name: torch.as_tensor(x, device=self.tensor_device) for name, x in self._buffers.items()}
            for name, tensor in feed.items():
                here[name].copy_(tensor)
            if "stage" in here:
                here["stage"].fill_(stage)
            self._of_stage[stage].launch()
            outputs = {spec.name: here[spec.name].clone() for spec in self.outputs}
        outer.wait_stream(own)
        self._errors.complain(self.name)
        return outputs

    def _infer(self, feed: Mapping[str, np.ndarray], stage: int) -> dict[str, np.ndarray]:
        given = {**feed, "stage": np.array([stage], np.int32)} if "stage" in self._buffers else feed
        for name, array in given.items():
            self._buffers[name].host[...] = array
            self._buffers[name].upload(self.stream)
        self._of_stage[stage].launch()
        outputs = [self._buffers[spec.name] for spec in self.outputs]
        for buffer in outputs:
            buffer.download(self.stream)
        self.stream.wait()
        self._errors.complain(self.name)
        return {buffer.name: buffer.host.copy() for buffer in outputs}

    def _close(self) -> None:
        self._of_stage.clear()
        self._buffers.clear()
        self._stack.close()


class Step:
    """One engine's execution context on fixed addresses, launched as a CUDA graph where it can be captured."""

    def __init__(
        self, cudart: Any, engine: Any, buffers: Mapping[str, cuda.Buffer], stream: cuda.Stream, errors: Any
    ) -> None:
        self._cudart, self._stream, self._errors = cudart, stream, errors
        self._graph: Any = None
        self._engine = engine
        self._context = engine.create_execution_context()
        if self._context is None:
            raise failed("execution context", errors)
        self._context.error_recorder = errors
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            if not self._context.set_tensor_address(name, buffers[name].device):
                raise failed(f"address of {name}", errors)

    @property
    def captured(self) -> bool:
        """Whether launches replay a CUDA graph."""
        return self._graph is not None

    def capture(self, stack: ExitStack) -> None:
        """Run once, as TensorRT wants before a capture, then capture; without success, `launch` enqueues."""
        cudart, stream = self._cudart, self._stream
        self._enqueue()
        stream.wait()
        self._errors.complain("first run of the engine")
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        cuda.call(cudart.cudaStreamBeginCapture(stream.handle, mode), "begin of capture")
        enqueued = self._context.execute_async_v3(int(stream.handle))
        status, graph = cudart.cudaStreamEndCapture(stream.handle)
        if not enqueued or int(status) != 0:
            if int(status) == 0:
                cudart.cudaGraphDestroy(graph)
            cudart.cudaGetLastError()
            why = self._errors.text() or f"execute_async_v3 {enqueued}, {getattr(status, 'name', status)}"
            self._errors.clear()
            warnings.warn(f"no CUDA graph, every step is enqueued: {why}", RuntimeWarning, stacklevel=2)
            return
        try:
            self._graph = cuda.call(cudart.cudaGraphInstantiate(graph, 0), "instantiation of the graph")
        finally:
            cudart.cudaGraphDestroy(graph)
        stack.callback(cudart.cudaGraphExecDestroy, self._graph)

    def launch(self) -> None:
        """Put one evaluation on the stream. Raises SvditError when that fails."""
        if self._graph is None:
            self._enqueue()
        else:
            cuda.call(self._cudart.cudaGraphLaunch(self._graph, self._stream.handle), "launch of the graph")

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream.handle)):
            raise failed("enqueue", self._errors)


def torch_has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def load_engine(trt: Any, path: Path, errors: Any) -> Any:
    """The engine of a file, which is mapped, not read into memory. Raises SvditError with TensorRT's reason."""
    from polygraphy.backend.trt import get_trt_logger

    runtime = trt.Runtime(get_trt_logger())
    runtime.error_recorder = errors
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise failed(f"engine {path}", errors)
    engine.error_recorder = errors
    return engine


def refit(trt: Any, engine: Any, graph: Path, errors: Any) -> None:
    """Put the weights of an ONNX file, and of the files it points to, into a stripped engine."""
    from polygraphy.backend.trt import get_trt_logger

    refitter = trt.Refitter(engine, get_trt_logger())
    refitter.error_recorder = errors
    parser = trt.OnnxParserRefitter(refitter, get_trt_logger())
    if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
        found = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise failed(f"weights of {graph}", errors, *found)


def failed(what: str, errors: Any, *found: str) -> SvditError:
    """The error for something that TensorRT did not do, with what its recorder says; the recorder is cleared."""
    reported = "; ".join((*found, errors.text())).strip("; ")
    errors.clear()
    return complain(f"TensorRT: {what}", reported or "a failure", "success")


def error_recorder(trt: Any) -> Any:
    """An `IErrorRecorder` of the module `trt` that keeps what is reported, from any thread, until it is raised."""

    class Recorder(trt.IErrorRecorder):
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self._found: list[tuple[Any, str]] = []

        def report_error(self, code: Any, desc: str) -> bool:
            self._found.append((code, desc))
            return False

        def num_errors(self) -> int:
            return len(self._found)

        def get_error_code(self, idx: int) -> Any:
            return self._found[idx][0]

        def get_error_desc(self, idx: int) -> str:
            return self._found[idx][1]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self._found.clear()

        def text(self) -> str:
            """Everything reported, the first cause first."""
            return "; ".join(desc for _, desc in self._found)

        def complain(self, what: str) -> None:
            """Raise SvditError when something was reported."""
            if self._found:
                raise failed(what, self)

    return Recorder()
