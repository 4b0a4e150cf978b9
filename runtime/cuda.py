"""cuda-python: found or missed in words, checked calls, and the streams, events and buffers that a runner needs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from svdit.plans.errors import SvditError, complain

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Gpu:
    """A device as engines depend on it."""

    index: int
    name: str
    compute_capability: str


def runtime() -> ModuleType:
    """The module `cuda.bindings.runtime`. Raises SvditError when cuda-python is not installed."""
    try:
        from cuda.bindings import runtime as cudart
    except ImportError as error:
        raise complain(
            "python package", f"no cuda.bindings ({error})", "cuda-python >= 12.8", "pip install cuda-python"
        ) from None
    return cudart


def call(result: tuple[Any, ...], what: str) -> Any:
    """The value of a cuda-python call, which returns (status, value...). Raises SvditError; `what` names the call."""
    status, *values = result
    if int(status) != 0:
        raise complain(f"CUDA: {what}", getattr(status, "name", status), "cudaSuccess")
    return values[0] if len(values) == 1 else tuple(values)


def memory_in_use(device: torch.device | None = None) -> tuple[int, int]:
    """Bytes of a GPU's memory that anybody uses, by the driver, and bytes that it has. None: torch's current GPU."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return total - free, total


def gpu(index: int) -> Gpu:
    """The GPU with this number. Raises SvditError when there is none."""
    cudart = runtime()
    try:
        count = call(cudart.cudaGetDeviceCount(), "device count")
    except SvditError as error:
        raise complain("GPU", "none that CUDA can use", "an NVIDIA GPU and its driver", str(error)) from None
    if not 0 <= index < count:
        raise complain("GPU", f"number {index}", f"0..{count - 1}")
    properties = call(cudart.cudaGetDeviceProperties(index), "device properties")
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Gpu(index, name.rstrip("\0"), f"{properties.major}.{properties.minor}")


class Stream:
    """A non-blocking stream, destroyed when `stack` closes. `name` is what errors call it."""

    def __init__(self, cudart: Any, name: str, stack: ExitStack) -> None:
        self._cudart, self.name = cudart, name
        self.handle = call(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking), f"stream {name}")
        stack.callback(cudart.cudaStreamDestroy, self.handle)

    def wait(self) -> None:
        """Block until everything on the stream is done. Raises SvditError when some of it failed."""
        call(self._cudart.cudaStreamSynchronize(self.handle), f"stream {self.name}")

    def wait_for(self, event: Event) -> None:
        """Begin nothing that is put on the stream from now on before what `event` marks is done."""
        call(self._cudart.cudaStreamWaitEvent(self.handle, event.handle, 0), f"stream {self.name}")

    def of_torch(self, device: int) -> torch.cuda.Stream:
        """The same stream, as torch knows it on this GPU."""
        import torch

        return torch.cuda.ExternalStream(int(self.handle), device=device)


class Event:
    """A mark on a stream, destroyed when `stack` closes; until it is recorded, nobody waits for it."""

    def __init__(self, cudart: Any, name: str, stack: ExitStack) -> None:
        self._cudart, self.name = cudart, name
        self.handle = call(cudart.cudaEventCreateWithFlags(cudart.cudaEventDisableTiming), f"event {name}")
        stack.callback(cudart.cudaEventDestroy, self.handle)

    def record(self, stream: Stream) -> None:
        """Mark everything that is on the stream now."""
        call(self._cudart.cudaEventRecord(self.handle, stream.handle), f"event {self.name}")


@contextmanager
def in_order(stream: torch.cuda.Stream) -> Iterator[None]:
    """`stream` as torch's, after what the caller put on its own stream before and ahead of what it puts there next."""
    import torch

    outer = torch.cuda.current_stream(stream.device)
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outer.wait_stream(stream)


class Buffer:
    """One tensor twice: `device` (an address) and `host` (a pinned array), both freed when `stack` closes."""

    def __init__(self, cudart: Any, name: str, shape: Sequence[int], dtype: str, stack: ExitStack) -> None:
        self._cudart, self.name = cudart, name
        kind = np.dtype(dtype)
        self.size = int(np.prod(shape)) * kind.itemsize
        self.device = int(call(cudart.cudaMalloc(self.size), f"{self.size} bytes for {name}"))
        stack.callback(cudart.cudaFree, self.device)
        pinned = int(call(cudart.cudaHostAlloc(self.size, cudart.cudaHostAllocDefault), f"pinned memory for {name}"))
        stack.callback(cudart.cudaFreeHost, pinned)
        raw = (ctypes.c_uint8 * self.size).from_address(pinned)
        self.host = np.frombuffer(raw, dtype=kind).reshape(tuple(shape))
        self.host[...] = 0

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {"data": (self.device, False), "shape": self.host.shape, "typestr": self.host.dtype.str, "version": 3}

    def of_torch(self, device: int) -> torch.Tensor:
        """The tensor in device memory."""
        import torch

        return torch.as_tensor(self, device=f"cuda:{device}")

    def upload(self, stream: Stream) -> None:
        """Copy host to device, on the stream."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(self.device, self.host.ctypes.data, kind, stream)

    def download(self, stream: Stream) -> None:
        """Copy device to host, on the stream; `host` holds it after `stream.wait()`."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(self.host.ctypes.data, self.device, kind, stream)

    def _copy(self, target: int, source: int, kind: Any, stream: Stream) -> None:
        call(self._cudart.cudaMemcpyAsync(target, source, self.size, kind, stream.handle), f"copy of {self.name}")
