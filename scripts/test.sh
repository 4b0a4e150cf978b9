#!/usr/bin/env bash
# Lint and tests, in an environment of their own; with nvcc on the PATH, the CUDA libraries are built first, so that
# their tests run too (those that need a GPU are skipped without one). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
ruff check .
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
    elif ! python -m pip install -q "tensorrt-rtx-cu13==1.7.1.116"; then
        echo "[svdit] no TensorRT-RTX: the test of the plugin with its ONNX parser is skipped" >&2
    fi
    scripts/build_kernels.sh
else
    echo "[svdit] no nvcc on PATH: the CUDA libraries are not built and their tests are skipped" >&2
fi
python -m pytest -n "${SVDIT_TEST_JOBS:-2}" -rs "$@"
