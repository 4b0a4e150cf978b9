"""Python code in a process of its own with TensorRT-RTX: Polygraphy chooses it when it is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="no TensorRT-RTX; pip install tensorrt-rtx-cu13"
)


def run_script(
    script: str, *arguments: object, rtx: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What the script printed and its exit status; `rtx=False` leaves Polygraphy with TensorRT."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": str(int(rtx)), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
