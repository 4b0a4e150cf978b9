"""cuda-python: found or missed in words, checked calls, and the buffers that a runner needs."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from svdit.plans.errors import SvditError, complain


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


class Buffer:
    """One tensor twice: `device` (an address) and `host` (a pinned array), both freed when `stack` closes.

    `torch.as_tensor(buffer, device=...)` is the one on the device.
    """

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
