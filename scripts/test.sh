#!/usr/bin/env bash
# Lint and tests, in an environment of their own. With nvcc on the PATH, the CUDA libraries are built first, so that
# their tests run too (those that need a GPU are skipped without one); without it, but with CMake and a C++ compiler on
# Linux, the ONNX Runtime operator for CPUs. Headers of TensorRT and ONNX Runtime are downloaded into build/ where
# TENSORRT_ROOT and ONNXRUNTIME_ROOT name none. TensorRT-RTX, with which the engine builder's tests build on the CPU, is
# installed where there is a wheel of it. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
ruff check .
if ! python -m pip install -q "tensorrt-rtx-cu13==1.7.1.116"; then
    echo "[svdit] no TensorRT-RTX: tests that build engines or use its ONNX parser are skipped" >&2
fi
if [ -z "${ONNXRUNTIME_ROOT:-}" ] && [ "$(uname -s)" = Linux ] && command -v cmake > /dev/null; then
    if scripts/onnxruntime_headers.sh build/onnxruntime; then
        export ONNXRUNTIME_ROOT="$PWD/build/onnxruntime"
    else
        echo "[svdit] no ONNX Runtime headers: unless the system has them, its operator is not built and its tests are skipped" >&2
    fi
fi
if command -v nvcc > /dev/null; then
    if ! command -v cuobjdump > /dev/null; then
        python -m pip install -q nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
        tools=$(python -c "import nvidia, pathlib; print(next(pathlib.Path(list(nvidia.__path__)[0]).glob('**/bin/cuobjdump')).parent)")
        export PATH="$PATH:$tools"
    fi
    if [ -z "${TENSORRT_ROOT:-}" ] && scripts/tensorrt_headers.sh build/tensorrt; then
        export TENSORRT_ROOT="$PWD/build/tensorrt"
    fi
    if [ -z "${TENSORRT_ROOT:-}" ]; then
        echo "[svdit] no TensorRT headers: the TensorRT plugin is not built and its tests are skipped" >&2
    fi
    scripts/build_kernels.sh
else
    echo "[svdit] no nvcc on PATH: the CUDA libraries are not built and their tests are skipped" >&2
    if [ "$(uname -s)" = Linux ] && command -v cmake > /dev/null && command -v c++ > /dev/null; then
        cmake -S . -B build -DSVDIT_CUDA=OFF -DONNXRUNTIME_ROOT="${ONNXRUNTIME_ROOT:-}" > build.log 2>&1 &&
            cmake --build build -j "$(nproc)" >> build.log 2>&1 || { cat build.log >&2; exit 1; }
    else
        echo "[svdit] no CMake and C++ compiler: the ONNX Runtime operator is not built and its tests are skipped" >&2
    fi
fi
python -m pytest -n "${SVDIT_TEST_JOBS:-2}" -rs "$@"
