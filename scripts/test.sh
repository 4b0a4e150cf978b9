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
    scripts/build_kernels.sh
else
    echo "[svdit] no nvcc on PATH: the CUDA libraries are not built and their tests are skipped" >&2
fi
python -m pytest -n "${SVDIT_TEST_JOBS:-2}" -rs "$@"
