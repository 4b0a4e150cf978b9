"""Sizes of the sm_80 kernel: what it asks for fits every GPU that it is built for. Needs a C++ compiler, no CUDA."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[2] / "trt_plugins"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on PATH")

KIB = 1024
LIMITS = {
    80: (163 * KIB, 164 * KIB),
    86: (99 * KIB, 100 * KIB),
    87: (163 * KIB, 164 * KIB),
    89: (99 * KIB, 100 * KIB),
    90: (227 * KIB, 228 * KIB),
    100: (227 * KIB, 228 * KIB),
    120: (99 * KIB, 100 * KIB),
}
"""Shared memory of a thread block and of a multiprocessor, by compute capability times 10 (CUDA programming guide)."""

PROGRAM = """
#include <cstdio>
#include <initializer_list>
#include "sm80_config.h"
int main() {
  for (int architecture : {80, 86, 87, 89, 90, 100, 120}) {
    for (int head_dim : {64, 128}) {
      const int keys = svdit::sm80_key_rows(head_dim, architecture);
      std::printf("%d %d %d %d %d\\n", architecture, head_dim, keys, svdit::sm80_shared_bytes(head_dim, keys),
                  svdit::kSm80ControlBytes);
    }
  }
}
"""


@pytest.fixture(scope="module")
def sizes(tmp_path_factory) -> dict[tuple[int, int], tuple[int, int, int]]:
    """(architecture, head size) to keys of a step, bytes of its dynamic and of its static shared memory."""
    folder = tmp_path_factory.mktemp("sm80_config")
    source, program = folder / "sizes.cpp", folder / "sizes"
    source.write_text(PROGRAM)
    includes = [f"-I{PLUGINS / 'include'}", f"-I{PLUGINS / 'kernels'}"]
    subprocess.run([COMPILER, "-std=c++17", *includes, str(source), "-o", str(program)], check=True)
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    found = [tuple(int(x) for x in line.split()) for line in lines]
    return {(architecture, head_dim): rest for architecture, head_dim, *rest in found}


def test_every_architecture_has_both_head_sizes(sizes):
    assert set(sizes) == {(architecture, head_dim) for architecture in LIMITS for head_dim in (64, 128)}


@pytest.mark.parametrize("architecture", LIMITS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_two_thread_blocks_fit(sizes, architecture, head_dim):
    keys, dynamic, static = sizes[architecture, head_dim]
    of_block, of_multiprocessor = LIMITS[architecture]
    assert dynamic == sum(2 * head_dim * rows for rows in (128, keys, keys))  # Q, K and V, 2 bytes a number
    assert dynamic + static <= of_block
    assert 2 * (dynamic + static + KIB) <= of_multiprocessor  # the system keeps 1 KiB a block


@pytest.mark.parametrize("architecture", LIMITS)
def test_more_keys_would_not_fit(sizes, architecture):
    """D = 128 takes 64 keys a step, which the registers allow, unless shared memory forbids it."""
    keys, dynamic, static = sizes[architecture, 128]
    if keys < 64:
        twice = dynamic + 2 * 2 * 128 * keys
        assert 2 * (twice + static + KIB) > LIMITS[architecture][1]
