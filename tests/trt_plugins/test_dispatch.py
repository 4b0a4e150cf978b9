"""Which kernel each GPU gets, and what older GPUs are told. The CUDA runtime is played: needs nvcc, no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[2] / "trt_plugins"
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include "launch_request.h"

// A GPU of the compute capability in the arguments, times 10; 0 is a machine without one.
static int capability = 0;
cudaError_t cudaGetDevice(int *device) { *device = 0; return capability == 0 ? cudaErrorNoDevice : cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10 : capability % 10;
  return cudaSuccess;
}
const char *cudaGetErrorName(cudaError_t) { return "cudaErrorNoDevice"; }
const char *cudaGetErrorString(cudaError_t) { return "no CUDA-capable device is detected"; }

namespace svdit {
svdit_status launch_sm80(const LaunchRequest &, Report &) { std::puts("sm80"); return SVDIT_OK; }
svdit_status launch_sm90(const LaunchRequest &, Report &) { std::puts("sm90"); return SVDIT_OK; }
}  // namespace svdit

int main(int, char **arguments) {
  capability = std::atoi(arguments[1]);
  alignas(16) static int memory[4];
  const svdit_problem problem{SVDIT_BFLOAT16, 1, 128, 1, 64, 0, 0, 0.125f, 1, 2, 1, 1, 1};
  const svdit_tensors tensors{memory, memory, memory, memory};
  const svdit_tables tables{memory, memory, memory, memory, memory, memory, memory};
  char message[512] = "";
  const svdit_status status =
      svdit_launch(&problem, &tensors, &tables, memory, sizeof(memory), nullptr, message, sizeof(message));
  if (status != SVDIT_OK) std::printf("%s: %s\n", svdit_status_text(status), message);
}
"""


def build(folder: Path, *options: str) -> Path:
    """The dispatch of the library with a CUDA runtime and kernels of our own."""
    source, program = folder / "play.cpp", folder / "play"
    source.write_text(PROGRAM)
    kernels = PLUGINS / "kernels"
    command = ["nvcc", "-std=c++17", "-cudart", "none", *options, f"-I{PLUGINS / 'include'}", f"-I{kernels}"]
    subprocess.run([*command, source, kernels / "dispatch.cpp", kernels / "check.cpp", "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def with_both(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("both"), "-DSVDIT_SM90")


@pytest.fixture(scope="module")
def without_hopper(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("sm80"))


def chosen(program: Path, capability: int, wanted: str = "") -> str:
    environment = {**os.environ, "SVDIT_KERNEL": wanted}
    done = subprocess.run([program, str(capability)], capture_output=True, text=True, check=True, env=environment)
    return done.stdout.strip()


def test_hopper_gets_its_own_kernel_and_the_other_one_on_request(with_both):
    assert chosen(with_both, 90) == chosen(with_both, 90, "sm90") == "sm90"
    assert chosen(with_both, 90, "sm80") == "sm80"


@pytest.mark.parametrize("capability", [80, 86, 87, 89, 100, 103, 120, 121])
def test_every_other_gpu_from_ampere_on_gets_the_sm80_kernel(with_both, capability):
    assert chosen(with_both, capability) == chosen(with_both, capability, "sm80") == "sm80"
    major, minor = divmod(capability, 10)
    assert f'SVDIT_KERNEL: got "sm90" on compute capability {major}.{minor}; expected sm80; unset it' in chosen(
        with_both, capability, "sm90"
    )


def test_a_library_without_the_hopper_kernel_has_the_other_one_for_it(without_hopper):
    assert chosen(without_hopper, 90) == "sm80"
    assert "expected sm80; unset it" in chosen(without_hopper, 90, "sm90")


@pytest.mark.parametrize("capability", [61, 70, 75])
@pytest.mark.parametrize("wanted", ["", "sm80", "sm90"])
def test_older_gpus_are_refused_with_a_sentence(with_both, capability, wanted):
    major, minor = divmod(capability, 10)
    assert chosen(with_both, capability, wanted).endswith(
        f"GPU: got compute capability {major}.{minor}; expected 8.0 (A100, RTX 30) or newer"
    )


def test_an_unknown_kernel_and_a_missing_gpu_are_named(with_both):
    expected = 'SVDIT_KERNEL: got "sm70" on compute capability 9.0; expected sm80 or sm90; unset it for the best'
    assert chosen(with_both, 90, "sm70").endswith(expected)
    assert "device query: got cudaErrorNoDevice (no CUDA-capable device is detected)" in chosen(with_both, 0)
