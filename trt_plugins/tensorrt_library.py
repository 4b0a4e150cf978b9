"""The TensorRT plugin (`tensorrt/`) from Python: found, and loaded into TensorRT's registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from svdit.plans.errors import complain
from svdit.trt_plugins import built_library

FILE_NAME = "libsvdit_tensorrt.so"
VARIABLE = "SVDIT_TENSORRT"
"""Environment variable with the path of the library; it wins over the places where builds put it."""
BUILD = "TENSORRT_ROOT=<folder with TensorRT's headers> scripts/build_kernels.sh"
NAME, VERSION, NAMESPACE = "SparseAttention", "1", ""
"""What TensorRT looks the plugin up by."""


def find() -> Path | None:
    """The library named by SVDIT_TENSORRT, or where CMake installs or builds it; None when there is none.

    Raises SvditError when the variable names no file.
    """
    return built_library.find(FILE_NAME, VARIABLE)


def load(trt: Any) -> None:
    """Make the plugin known to `trt`, a TensorRT module; a second call does nothing. Raises SvditError."""
    registry = trt.get_plugin_registry()
    if registry.get_creator(NAME, VERSION, NAMESPACE) is not None:
        return
    library = find()
    if library is None:
        raise complain(FILE_NAME, "no such file", "the built TensorRT plugin", f"build it: {BUILD}")
    handle = registry.load_library(str(library))
    if handle is None or registry.get_creator(NAME, VERSION, NAMESPACE) is None:
        raise complain(
            str(library), "a file that TensorRT does not load", f"the plugin {NAME} {VERSION}", f"rebuild it: {BUILD}"
        )
