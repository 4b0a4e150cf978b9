#!/usr/bin/env bash
# One model's row of the Sparse-vDiT paper's Table 2 with real weights: a plan, dense and sparse videos from the same
# noise on one GPU, PSNR, SSIM, LPIPS and speed-up beside the published figures.
#
#   scripts/reproduce_table2.sh MODEL CHECKPOINT PROMPTS [OUT]
#
#   MODEL        hunyuan, cogvideox1.5 or wan2.1
#   CHECKPOINT   folder of the whole diffusers pipeline, for example as `huggingface-cli download REPO --local-dir` makes
#   PROMPTS      text file, one prompt a line
#   OUT          receives plan, videos and table2.json (default out/table2-MODEL)
#
#   SVDIT_SEARCH=1           search a plan first, with PROMPTS and the paper's lambda and epsilon; an interrupted search
#                            goes on when the same command is given again
#   SVDIT_PLAN=P.plan.json   use this plan. Without it and without a search a template at the paper's mean density is
#                            written, which nobody searched: its speed is the paper's, its quality is not
#   SVDIT_SIZE="81 480 832"  frames, height, width, instead of the paper's
#   SVDIT_STEPS=50           denoising steps
#   SVDIT_DEVICE=cuda        cpu tries the script out, slowly
#   SVDIT_LPIPS=0            leave LPIPS out
set -euo pipefail
fail() {
    echo "error: $1" >&2
    exit 2
}
[ $# -ge 3 ] && [ $# -le 4 ] || fail "arguments: got $#; expected MODEL CHECKPOINT PROMPTS [OUT]"
model=$1 checkpoint=$2 prompts=$3 out=${4:-out/table2-$1}
case $model in
hunyuan) pattern='{"kind": "diagonal", "frames": 4}' dense=0.08 size="129 720 1280" ;;
cogvideox1.5) pattern='{"kind": "diagonal", "frames": 1}' dense=0 size="81 768 1360" ;;
wan2.1) pattern='{"kind": "diagonal", "frames": 3}' dense=0.2 size="81 720 1280" ;;
*) fail "MODEL: got $model; expected hunyuan, cogvideox1.5 or wan2.1" ;;
esac
[ -f "$checkpoint/model_index.json" ] || fail "CHECKPOINT: got no $checkpoint/model_index.json; expected the folder of a whole pipeline"
[ -f "$prompts" ] || fail "PROMPTS: got no file $prompts; expected a text file, one prompt a line"
read -r frames height width more <<< "${SVDIT_SIZE:-$size}"
[ -n "$width" ] && [ -z "$more" ] || fail "SVDIT_SIZE: got $SVDIT_SIZE; expected frames, height and width, such as 81 480 832"
plan=${SVDIT_PLAN:-}
[ -z "$plan" ] || [ -f "$plan" ] || fail "SVDIT_PLAN: got no file $plan; expected a plan"
[ -z "$plan" ] || [ -z "${SVDIT_SEARCH:-}" ] || fail "SVDIT_SEARCH: got SVDIT_PLAN as well; expected one of the two"
device=${SVDIT_DEVICE:-cuda}
mkdir -p "$out"
out=$(cd "$out" && pwd) checkpoint=$(cd "$checkpoint" && pwd) prompts=$(realpath "$prompts")
[ -z "$plan" ] || plan=$(realpath "$plan")
cd "$(dirname "$0")/.."
[ -n "${SVDIT_NO_VENV:-}" ] || source scripts/venv.sh
if [ "$device" != cpu ]; then
    python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
        fail "GPU: got none that PyTorch can see; expected an NVIDIA GPU; SVDIT_TORCH and SVDIT_VENV choose the PyTorch"
    python -c 'from svdit.trt_plugins import cuda_library; raise SystemExit(cuda_library.find() is None)' ||
        fail "kernel library: got none; expected the built one; run scripts/build_kernels.sh"
fi
subject=(--model "$model" --checkpoint "$checkpoint" --frames "$frames" --height "$height" --width "$width")
if [ -n "${SVDIT_SEARCH:-}" ]; then
    plan=$out/search.plan.json
    [ "$device" = cpu ] && dtype=float32 || dtype=bfloat16
    svdit-search "${subject[@]}" --prompts "$prompts" --steps "${SVDIT_STEPS:-50}" --lam 0.5 --eps 1 \
        --device "$device" --dtype "$dtype" -o "$plan"
elif [ -z "$plan" ]; then
    plan=$out/template.plan.json
    svdit-plan template "${subject[@]}" --pattern "$pattern" --dense-steps "$dense" -o "$plan"
fi
[ "${SVDIT_LPIPS:-1}" = 0 ] && lpips=--no-lpips || lpips=--lpips
python scripts/table2.py "$model" "$checkpoint" --plan "$plan" --prompts "$prompts" \
    --steps "${SVDIT_STEPS:-50}" --device "$device" "$lpips" -o "$out"
