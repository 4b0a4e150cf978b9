"""The ONNX Runtime custom-op library (`onnxruntime/`): found, never opened here."""

from __future__ import annotations

from pathlib import Path

from svdit.trt_plugins import built_library

FILE_NAME = "libsvdit_onnxruntime.so"
VARIABLE = "SVDIT_ORT_OPS"
"""Environment variable with the path of the library; it wins over the places where builds put it."""
BUILD = (
    "cmake -S . -B build -DSVDIT_CUDA=OFF -DONNXRUNTIME_ROOT=<folder with ONNX Runtime's headers> "
    "&& cmake --build build"
)
"""The command that builds it, with a C++ compiler alone."""


def find() -> Path | None:
    """The library named by SVDIT_ORT_OPS, or where CMake installs or builds it; None when there is none.

    Raises SvditError when the variable names no file.
    """
    return built_library.find(FILE_NAME, VARIABLE)
