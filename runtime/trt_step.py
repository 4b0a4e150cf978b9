"""One evaluation of an engine on fixed addresses: captured as a CUDA graph, replayed from then on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from svdit.runtime import cuda
from svdit.runtime.trt_engine import failed


class Steps:
    """One engine: a Step for every number of rows that is asked for, made and captured when it is asked for first."""

    def __init__(self, stack: ExitStack, *step: Any) -> None:
        self._stack, self._step = stack, step
        self._made: dict[int, Step] = {}

    def of(self, rows: int) -> Step:
        """The one for calls of so many rows."""
        if rows not in self._made:
            made = Step(*self._step, rows)
            made.capture(self._stack)
            self._made[rows] = made
        return self._made[rows]


class Step:
    """One engine's execution context, launched as a CUDA graph where it can be captured: one a set of buffers.

    sets  the sets of buffers, by tensor name; `launch` takes the number of one
    rows  of a call: the batch where the engine's is free
    """

    def __init__(
        self,
        cudart: Any,
        engine: Any,
        sets: Sequence[Mapping[str, cuda.Buffer]],
        stream: cuda.Stream,
        errors: Any,
        rows: int,
    ) -> None:
        self._cudart, self._sets, self._stream, self._errors = cudart, sets, stream, errors
        self._graphs: list[Any] = []
        self._engine = engine
        self._context = engine.create_execution_context()
        if self._context is None:
            raise failed("execution context", errors)
        self._context.error_recorder = errors
        self._names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        for name in self._names:
            shape = tuple(engine.get_tensor_shape(name))
            takes_rows = engine.get_tensor_mode(name).name == "INPUT" and shape[0] == -1
            if takes_rows and not self._context.set_input_shape(name, (rows, *shape[1:])):
                raise failed(f"{rows} rows of {name}", errors)

    @property
    def captured(self) -> bool:
        """Whether launches replay a CUDA graph."""
        return len(self._graphs) == len(self._sets)

    def capture(self, stack: ExitStack) -> None:
        """Run once on each set, as TensorRT wants before a capture, then capture; without success `launch` enqueues."""
        for number in range(len(self._sets)):
            self._enqueue(number)
            self._stream.wait()
            self._errors.complain("first run of the engine")
            graph, why = self._captured()
            if graph is None:
                warnings.warn(f"no CUDA graph, every step is enqueued: {why}", RuntimeWarning, stacklevel=2)
                return
            try:
                made = cuda.call(self._cudart.cudaGraphInstantiate(graph, 0), "instantiation of the graph")
            finally:
                self._cudart.cudaGraphDestroy(graph)
            stack.callback(self._cudart.cudaGraphExecDestroy, made)
            self._graphs.append(made)

    def _captured(self) -> tuple[Any, str]:
        """A graph of one run on the addresses in force, or None and the reason."""
        cudart, handle = self._cudart, self._stream.handle
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        cuda.call(cudart.cudaStreamBeginCapture(handle, mode), "begin of capture")
        enqueued = self._context.execute_async_v3(int(handle))
        status, graph = cudart.cudaStreamEndCapture(handle)
        if enqueued and int(status) == 0:
            return graph, ""
        if int(status) == 0:
            cudart.cudaGraphDestroy(graph)
        cudart.cudaGetLastError()
        why = self._errors.text() or f"execute_async_v3 {enqueued}, {getattr(status, 'name', status)}"
        self._errors.clear()
        return None, why

    def launch(self, number: int) -> None:
        """Put one evaluation on that set of buffers on the stream. Raises SvditError when that fails."""
        if self.captured:
            cuda.call(self._cudart.cudaGraphLaunch(self._graphs[number], self._stream.handle), "launch of the graph")
        else:
            self._enqueue(number)

    def _enqueue(self, number: int) -> None:
        for name in self._names:
            if not self._context.set_tensor_address(name, self._sets[number][name].device):
                raise failed(f"address of {name}", self._errors)
        if not self._context.execute_async_v3(int(self._stream.handle)):
            raise failed("enqueue", self._errors)
