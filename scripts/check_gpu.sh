#!/bin/bash
# Everything about the kernel on one GPU machine: smoke test, tests, comparison of builds.
#   scripts/check_gpu.sh LIBRARY_FOLDER OUTPUT_FOLDER [smoke] [test] [bench] [profile] [sanitize]
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
    test) SVDIT_KERNELS=$libraries/base/libsvdit_kernels.so timeout 240 python3 -m pytest tests/trt_plugins -q -s --tb=short --durations=8 \
            -p no:cacheprovider > "$out/tests.log" 2>&1; tail -30 "$out/tests.log" | cut -c1-300 ;;
    bench) builds=(); for path in "$libraries"/*/libsvdit_kernels.so; do
             name=$(basename "$(dirname "$path")"); [ "$name" = watchdog ] || builds+=(--library "$name=$path"); done
           timeout "${BENCH_SECONDS:-200}" python3 -m svdit.runtime.bench_cli attention "${builds[@]}" ${BENCH_OPTIONS:-} \
             --json "$out/bench.json" 2>&1 ;;
    profile) for case in ${PROFILE_CASES:-comb-17}; do
             SVDIT_KERNELS=$libraries/base/libsvdit_kernels.so timeout 60 ncu --clock-control none -k regex:sm90_sparse -s 2 -c 1 \
               --section SpeedOfLight --section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis \
               --section WarpStateStats --section SchedulerStats --section InstructionStats \
               --metrics sm__inst_executed_pipe_tensor.sum,sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed,dram__bytes_read.sum,lts__t_sector_hit_rate.pct,lts__t_bytes.sum,smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio \
               --print-details all --log-file "$out/ncu-$case.txt" \
               python3 -m svdit.runtime.bench_cli attention --case "$case" --rounds 1 --seconds 0 > /dev/null 2>&1
             grep -E "Duration|tensor|hit_rate|L2 Hit|dram__bytes|SM Frequency|Executed Ipc Active|XU|ERR" "$out/ncu-$case.txt" | head -24; done ;;
    sanitize) for tool in memcheck racecheck synccheck; do
             SVDIT_KERNELS=$libraries/base/libsvdit_kernels.so timeout 120 compute-sanitizer --tool $tool \
               --kernel-name kernel_substring=sparse_attention python3 scripts/kernel_launches.py "${SANITIZE_SECONDS:-15}" \
               > "$out/$tool.log" 2>&1; tail -3 "$out/$tool.log"; done ;;
  esac
  echo "== $step took $((SECONDS - start)) s"
done
