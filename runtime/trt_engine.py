"""Engines of TensorRT: loaded, given their weights back, and what goes wrong put into words."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from svdit.plans.errors import SvditError, complain


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

        def get_num_errors(self) -> int:  # NOTE TensorRT looks for this name, its documentation calls it num_errors
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
