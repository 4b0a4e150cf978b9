#!/usr/bin/env bash
# From a plan to videos and a comparison with dense attention, on the CPU, in about eight minutes on two cores, installing included.
#
#   scripts/demo.sh [OUT]          OUT (default out/demo) receives bundles, video and report
#   SVDIT_STEPS=25 scripts/demo.sh as many denoising steps as the model was made for (about half an hour)
#   SVDIT_SEARCH=1 scripts/demo.sh search a plan first instead of using the shipped one (about a quarter of an hour)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
out=${1:-out/demo}
steps=${SVDIT_STEPS:-6}
prompt=${SVDIT_PROMPT:-red circle moving right}
plan=plans/library/tiny.plan.json
mkdir -p "$out"
if [ -n "${SVDIT_SEARCH:-}" ]; then
    plan=$out/searched.plan.json
    svdit-search --model tiny --query-tiles 18 \
        --prompt "fast blue square moving up-left" -o "$plan"
fi
for variant in portable dense; do
    [ "$variant" = portable ] && bundle=$out/tiny || bundle=$out/tiny-dense
    [ -f "$bundle/manifest.json" ] && rm -r "$bundle"
    svdit-export --model tiny --plan "$plan" --variant "$variant" -o "$bundle"
done
svdit-run "$out/tiny" --prompt "$prompt" --steps "$steps" -o "$out/video.mp4" --json "$out/run.json"
svdit-compare "$out/tiny" --against dense --prompt "$prompt" --steps "$steps" \
    --report "$out/compare.html" --json "$out/compare.json"
svdit-plan show "$plan" --png "$out/plan.png" > "$out/plan.txt"
python - "$out" <<'PY'
import json
import sys

out = sys.argv[1]
run, cmp = (json.load(open(f"{out}/{name}.json")) for name in ("run", "compare"))
psnr = "identical" if cmp["psnr"] is None else f"{cmp['psnr']:.2f} dB"
rows = [("steps", cmp["steps"]), ("density of attention", f"{cmp['density']:.3f}"),
        ("FLOPs, dense over sparse", f"{cmp['flops_ratio']:.2f}"),
        ("dense, ms a step", f"{cmp['against_latency_ms']:.0f}"), ("sparse, ms a step", f"{cmp['latency_ms']:.0f}"),
        ("speed-up", f"{cmp['speedup']:.2f}x"), ("PSNR against dense", psnr), ("SSIM against dense", f"{cmp['ssim']:.3f}")]
print()
for name, value in rows:
    print(f"{name:26} {value}")
print(f"\nvideo   {run['videos'][0]['video']}\nreport  {out}/compare.html\nplan    {out}/plan.png")
PY
