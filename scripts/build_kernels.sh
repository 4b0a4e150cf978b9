#!/usr/bin/env bash
# Build the CUDA libraries into build/ and check their machine code. Needs nvcc 13 and a C++ compiler, no GPU.
# With TENSORRT_ROOT naming a folder with TensorRT's headers, the TensorRT plugin too (docs/tensorrt.md);
# with ONNXRUNTIME_ROOT naming one with ONNX Runtime's, or with the system's, its operator too (docs/onnxruntime.md).
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in nvcc cmake; do
    if ! command -v "$tool" > /dev/null; then
        echo "$tool: not found on PATH; needed to build the CUDA libraries; install it (CUDA toolkit 13, pip install cmake)" >&2
        exit 2
    fi
done
cmake -S . -B build -DCMAKE_BUILD_TYPE=Release -DTENSORRT_ROOT="${TENSORRT_ROOT:-}" \
    -DONNXRUNTIME_ROOT="${ONNXRUNTIME_ROOT:-}" > build.log 2>&1 || { cat build.log >&2; exit 1; }
cmake --build build -j "$(nproc)" >> build.log 2>&1 || { cat build.log >&2; exit 1; }
if command -v cuobjdump > /dev/null; then
    python3 scripts/check_sass.py build/libsvdit_kernels.so --build-log build.log
else
    echo "[svdit] machine code not checked: no cuobjdump on PATH (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)" >&2
fi
