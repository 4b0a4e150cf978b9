"""The register library: opening it puts the plugin beside it into the registry of a TensorRT of its major version.

TensorRT is played by `fake_nvinfer.cpp`. Each case is a process of its own, because a registry lasts as long as one.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trt_plugins.test_tensorrt_plugin import BUILD, PLUGIN, SYSTEM_SYMBOL

REGISTER = BUILD / "libsvdit_tensorrt_register.so"
FAKE = BUILD / "libsvdit_fake_nvinfer.so"
pytestmark = pytest.mark.skipif(
    not (PLUGIN.is_file() and REGISTER.is_file() and FAKE.is_file()),
    reason=f"no {REGISTER.name} in {BUILD}; build it with TENSORRT_ROOT set, see docs/tensorrt.md",
)
SCRIPT = """
import ctypes, sys
tensorrt, *libraries = sys.argv[1:]
fake = ctypes.CDLL(tensorrt) if tensorrt else None
for library in libraries:
    ctypes.CDLL(library)
if fake is not None:
    fake.fake_registered.restype = ctypes.c_char_p
    print(fake.fake_registered().decode(), end="")
"""


def dlopen(tensorrt: Path | str, *libraries: Path, **environment: str) -> tuple[str, str]:
    """Open them in this order; what is registered then, and what was said."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tensorrt), *map(str, libraries)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def major() -> int:
    return ctypes.CDLL(str(FAKE)).fake_major()


@pytest.fixture
def folder(tmp_path, major) -> Path:
    """A library path with a TensorRT on it."""
    shutil.copy(FAKE, tmp_path / f"libnvinfer.so.{major}")
    return tmp_path


def test_dlopen_registers_the_plugin(folder, major):
    found = dlopen(folder / f"libnvinfer.so.{major}", REGISTER, LD_LIBRARY_PATH=str(folder))
    assert found == ("PLUGIN CREATOR_V3ONE|SparseAttention|1|\n", "")


def test_a_second_copy_is_refused_by_the_registry(folder, major, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    copies = [shutil.copy(path, other) for path in (REGISTER, PLUGIN)]
    registered, said = dlopen(folder / f"libnvinfer.so.{major}", REGISTER, Path(copies[0]), LD_LIBRARY_PATH=str(folder))
    assert registered == "PLUGIN CREATOR_V3ONE|SparseAttention|1|\n"
    assert said == (
        "[svdit] SparseAttention, register: registerCreator: got false; expected true; "
        "is the plugin registered already?\n"
    )


def test_another_major_version_is_left_alone(folder, major):
    version = (major + 1) * 10000 + 203
    registered, said = dlopen(
        folder / f"libnvinfer.so.{major}", REGISTER, LD_LIBRARY_PATH=str(folder), FAKE_NVINFER_VERSION=str(version)
    )
    assert registered == ""
    assert f"libnvinfer.so.{major}: got version {version}; expected {major}.x; rebuild with its headers" in said


def test_no_tensorrt_is_one_line(tmp_path, major):
    registered, said = dlopen("", REGISTER, LD_LIBRARY_PATH=str(tmp_path))
    assert registered == "" and len(said.splitlines()) == 1
    assert re.match(
        rf"\[svdit\] SparseAttention, register: libnvinfer\.so\.{major}: got .*; import tensorrt first", said
    )


def test_no_plugin_beside_it(folder, major, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(REGISTER, alone)
    registered, said = dlopen(folder / f"libnvinfer.so.{major}", alone / REGISTER.name, LD_LIBRARY_PATH=str(folder))
    assert registered == "" and "expected the plugin beside this library" in said


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm on PATH")
def test_it_exports_nothing_and_wants_nothing_of_tensorrt():
    def symbols(option: str) -> set[str]:
        command = ["nm", "-D", "--format=posix", option, str(REGISTER)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return {line.split()[0] for line in lines if line.split()[1] not in "wvu"}

    assert symbols("--defined-only") == set()
    assert not [name for name in symbols("--undefined-only") if not SYSTEM_SYMBOL.fullmatch(name)]
