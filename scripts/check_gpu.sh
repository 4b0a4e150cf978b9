#!/bin/bash
# Everything about the kernel on one GPU machine: smoke test, tests, comparison of builds.
#   scripts/check_gpu.sh LIBRARY_FOLDER OUTPUT_FOLDER [smoke] [test] [bench] [sanitize]
# LIBRARY_FOLDER holds NAME/libsvdit_kernels.so for each build; "watchdog" and "base" have fixed roles.
set -u
libraries=$1; out=$2; shift 2
root=$(cd "$(dirname "$0")/.." && pwd); cd "$root"
names=$(mktemp -d); mkdir "$names/svdit"
for package in plans exporter runtime trt_plugins; do ln -s "$root/$package" "$names/svdit/$package"; done
export PYTHONPATH=$names:$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,clocks.sm,clocks.max.sm,power.limit,driver_version --format=csv,noheader
for step in "$@"; do
  start=$SECONDS
  case $step in
    smoke) SVDIT_KERNELS=$libraries/watchdog/libsvdit_kernels.so timeout 90 python3 scripts/kernel_smoke.py || exit 1 ;;
    test) SVDIT_KERNELS=$libraries/base/libsvdit_kernels.so timeout 240 python3 -m pytest tests/trt_plugins -q -x -s \
            -p no:cacheprovider > "$out/tests.log" 2>&1; code=$?; tail -25 "$out/tests.log"; [ $code = 0 ] || exit 1 ;;
    bench) builds=(); for path in "$libraries"/*/libsvdit_kernels.so; do
             name=$(basename "$(dirname "$path")"); [ "$name" = watchdog ] || builds+=(--library "$name=$path"); done
           timeout "${BENCH_SECONDS:-200}" python3 -m svdit.runtime.bench_cli attention "${builds[@]}" ${BENCH_OPTIONS:-} \
             --json "$out/bench.json" 2>&1 ;;
    sanitize) for tool in memcheck racecheck synccheck; do
             SVDIT_KERNELS=$libraries/base/libsvdit_kernels.so timeout 200 compute-sanitizer --tool $tool \
               python3 scripts/kernel_smoke.py > "$out/$tool.log" 2>&1; tail -3 "$out/$tool.log"; done ;;
  esac
  echo "== $step took $((SECONDS - start)) s"
done
