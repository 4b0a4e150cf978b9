#!/usr/bin/env bash
# One check of everything that needs TensorRT itself: exports the tiny model, builds engines, runs them, compares every
# output with PyTorch through Polygraphy, and prints a verdict.
#   scripts/check_tensorrt.sh [FOLDER]
# FOLDER, new or empty, keeps bundles, engines and logs; without it they go when the check ends.
# Exit status: 0 all passed, 1 something failed, 2 nothing can be checked here, and why.
set -uo pipefail
# Relative L2 errors of a denoiser output. On this model bfloat16 is 0.008 from float32 and a wrong stage is above 0.3.
bf16_limit=0.03
fp32_limit=0.005
if [ $# -gt 1 ] || [[ ${1:-} == -* ]]; then
    echo "usage: scripts/check_tensorrt.sh [FOLDER]" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
if [ $# -eq 1 ]; then
    if [ -e "$1" ] && { [ ! -d "$1" ] || [ -n "$(ls -A "$1")" ]; }; then
        echo "$1: got something that is there; expected a new or empty folder" >&2
        exit 2
    fi
    mkdir -p "$1" || exit 2
    out=$(cd "$1" && pwd)
else
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
fi

# What there is: TensorRT, the GPU, the plugin. Its refusals are those of svdit-build.
if ! python3 - > "$out/platform.txt" << 'PYTHON'
import sys
try:
    from svdit.plans.errors import SvditError
    from svdit.runtime.build_platform import TENSORRT, this_platform
    from svdit.trt_plugins import tensorrt_library
except ImportError as error:
    sys.exit(f"python package: got {error}; expected svdit; pip install '.[tensorrt]'")
try:
    platform = this_platform()
    if platform.library != TENSORRT:
        sys.exit("POLYGRAPHY_USE_TENSORRT_RTX: got 1; expected TensorRT, which has the plugin; unset it")
    tensorrt_library.load(platform.module)
except SvditError as error:
    sys.exit(str(error))
import torch
print(platform)
print("cuda" if torch.cuda.is_available() else "cpu")
print(tensorrt_library.find())
PYTHON
then
    echo "nothing was checked" >&2
    exit 2
fi
{ read -r platform; read -r device; read -r plugin; } < "$out/platform.txt"
for command in svdit-export svdit-build svdit-compare; do
    if ! command -v "$command" > /dev/null; then
        echo "$command: got no such command; expected it on PATH; pip install '.[tensorrt]'" >&2
        exit 2
    fi
done
echo "$platform; PyTorch on $device; $plugin"

passed=0
failed=()
step() { # NAME COMMAND...: run it, with its output in a log
    local name=$1 start=$SECONDS
    shift
    if "$@" > "$out/$name.log" 2>&1; then
        echo "passed  $name ($((SECONDS - start)) s)"
        passed=$((passed + 1))
    else
        echo "FAILED  $name; its last lines:"
        tail -n 5 "$out/$name.log" | sed 's/^/        /'
        failed+=("$name")
        return 1
    fi
}
export_tiny() { # VARIANT PRECISION
    svdit-export --model tiny --plan "$root/plans/library/tiny.plan.json" --variant "$1" --precision "$2" -o "$out/$1"
}
build_twice() { # VARIANT OPTION...: the second time there must be nothing to do
    local folder=$out/$1
    shift
    svdit-build "$folder" --force "$@" && svdit-build "$folder" "$@" | grep -q "engines are up to date"
}
compare() { # VARIANT LIMIT: relative error of every denoiser output, in every stage, against PyTorch
    svdit-compare "$out/$1" --backend tensorrt --against torch --device "$device" --steps 6 \
        --prompt "red circle moving right" --prompt "fast blue square moving up" --json "$out/compare.json" || return 1
    python3 - "$out/compare.json" "$2" << 'PYTHON'
import json, sys
error, limit = json.load(open(sys.argv[1]))["rel_l2_error"], float(sys.argv[2])
print(f"relative error {error}, limit {limit}")
sys.exit(error is None or error > limit)
PYTHON
}
with_trtexec() { # HOW TO LOAD THE PLUGIN: build from the graph, then run the engine of svdit-build
    trtexec --onnx="$out/plugin/dit.onnx" --stronglyTyped "$1" --skipInference &&
        trtexec --loadEngine="$out/plugin/dit.engine" "$1" --useCudaGraph --iterations=3
}
embedded() { # the plugin is stored in the engine, which then runs without it
    trtexec --onnx="$out/plugin/dit.onnx" --stronglyTyped --dynamicPlugins="$plugin" --setPluginsToSerialize="$plugin" \
        --saveEngine="$out/embedded.engine" --skipInference &&
        trtexec --loadEngine="$out/embedded.engine" --useCudaGraph --iterations=3
}

if step export-plugin export_tiny plugin bf16; then
    step build build_twice plugin && step compare compare plugin "$bf16_limit"
    step build-stripped build_twice plugin --strip-weights && step compare-stripped compare plugin "$bf16_limit"
    step build-streaming build_twice plugin --weight-streaming 0 && step compare-streaming compare plugin "$bf16_limit"
    if command -v trtexec > /dev/null && step build-again build_twice plugin; then
        step trtexec-dynamic with_trtexec --dynamicPlugins="$plugin"
        step trtexec-static with_trtexec --staticPlugins="$(dirname "$plugin")/libsvdit_tensorrt_register.so"
        step trtexec-embedded embedded
    fi
fi
step export-portable export_tiny portable fp32 && step build-portable build_twice portable && \
    step compare-portable compare portable "$fp32_limit"

if [ ${#failed[@]} -eq 0 ]; then
    echo "verdict: TensorRT works here, $passed steps passed ($platform)"
else
    echo "verdict: ${#failed[@]} failed (${failed[*]}), $passed passed ($platform)" >&2
    exit 1
fi
