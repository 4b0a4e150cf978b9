"""One model's row of Table 2 of the Sparse-vDiT paper (arXiv 2506.03065); reproduce_table2.sh calls it.

Every prompt is sampled twice from the same noise with the diffusers pipeline of the checkpoint: as it is, and with a
plan's attention in its transformer. Figures are means over prompts: PSNR and SSIM of the uint8 videos, LPIPS (AlexNet)
over frames, time of the whole denoising loop (text encoder and VAE left out) and its ratio.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch

from svdit.plans import registry
from svdit.plans.command import reports_mistakes
from svdit.plans.errors import complain
from svdit.plans.flops import mean_density
from svdit.plans.schema import read_plan
from svdit.runtime.metrics import psnr, ssim
from svdit.runtime.pipeline_parts import call_options, load_pipeline
from svdit.runtime.prompt_options import collect_prompts
from svdit.runtime.sparsify import sparsify
from svdit.runtime.video import to_uint8, write_mp4

FILE = click.Path(path_type=Path)
PAPER = {
    "cogvideox1.5": {"speedup": 1.76, "psnr": 24.13, "ssim": 0.82, "lpips": 0.14},
    "hunyuan": {"speedup": 1.85, "psnr": 27.09, "ssim": 0.87, "lpips": 0.12},
    "wan2.1": {"speedup": 1.58, "psnr": 22.59, "ssim": 0.80, "lpips": 0.16},
}
"""As published, lambda 0.5 and epsilon 1, on one A800 (wan2.1: H800)."""
FRAMES_AT_ONCE = 8


@click.command()
@click.argument("model", type=click.Choice(sorted(PAPER)))
@click.argument("checkpoint", type=FILE)
@click.option("--plan", "plan_file", type=FILE, required=True)
@click.option("--prompts", "prompts_file", type=FILE, required=True)
@click.option("--steps", type=click.IntRange(min=1), default=50)
@click.option("--seed", type=int, default=0)
@click.option("--device", default="cuda")
@click.option("--lpips/--no-lpips", "with_lpips", default=True)
@click.option("-o", "--output", type=FILE, required=True)
@reports_mistakes
def main(
    model: str,
    checkpoint: Path,
    plan_file: Path,
    prompts_file: Path,
    steps: int,
    seed: int,
    device: str,
    with_lpips: bool,
    output: Path,
) -> None:
    """Sample, compare, write videos and table2.json into OUTPUT."""
    plan = read_plan(plan_file)
    if plan.model != model:
        raise complain(f"{plan_file}: $.model", repr(plan.model), repr(model))
    adapter = registry.adapter(model)
    adapter.check_geometry(checkpoint, plan.geometry)
    prompts = collect_prompts((), prompts_file)
    distance = lpips_distance(device) if with_lpips else None
    pipe = load_pipeline(checkpoint, device)
    options = {**call_options(pipe, adapter, plan.geometry, checkpoint), "num_inference_steps": steps}
    rows = []
    for i, prompt in enumerate(prompts):
        reference, dense_seconds = sample(pipe, prompt, seed + i, options)
        with sparsify(pipe, plan):
            video, seconds = sample(pipe, prompt, seed + i, options)
        for name, frames in (("dense", reference), ("sparse", video)):
            write_mp4(output / f"{name}-{i}.mp4", frames, 16)
        rows.append(
            {
                "prompt": prompt,
                "psnr": psnr(reference, video),
                "ssim": ssim(reference, video),
                "lpips": None if distance is None else distance(reference, video),
                "dense_seconds": dense_seconds,
                "seconds": seconds,
            }
        )
        click.echo(f"{i + 1} of {len(prompts)}: " + ", ".join(f"{k} {v}" for k, v in rows[-1].items() if k != "prompt"))
    figures = {
        "model": model,
        "steps": steps,
        "density": mean_density(plan, steps),
        "paper": PAPER[model],
        **means(rows),
    }
    (output / "table2.json").write_text(json.dumps({**figures, "prompts": rows}, indent=2) + "\n")
    click.echo(f"{'':10}{'here':>10}{'paper':>10}")
    for name, published in PAPER[model].items():
        here = figures[name]
        click.echo(f"{name:10}{'-' if here is None else format(here, '.3f'):>10}{published:>10}")


def sample(pipe: object, prompt: str, seed: int, options: dict) -> tuple[np.ndarray, float]:
    """A video, uint8 [F, H, W, 3], and the seconds from the first step's end, scaled to all steps."""
    ends: list[float] = []

    def note(_: object, step: int, timestep: object, tensors: dict) -> dict:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return tensors

    generator = torch.Generator().manual_seed(seed)
    made = pipe(prompt=prompt, generator=generator, output_type="np", callback_on_step_end=note, **options).frames[0]
    steps = len(ends)
    seconds = (ends[-1] - ends[0]) * steps / (steps - 1) if steps > 1 else float("nan")
    return to_uint8(made), seconds


def means(rows: list[dict]) -> dict[str, float | None]:
    """Means over prompts; speed-up is the ratio of summed times."""
    quality = {
        name: None if rows[0][name] is None else float(np.mean([row[name] for row in rows]))
        for name in ("psnr", "ssim", "lpips")
    }
    return {**quality, "speedup": sum(row["dense_seconds"] for row in rows) / sum(row["seconds"] for row in rows)}


def lpips_distance(device: str):
    """(reference, video), uint8 [F, H, W, 3] each -> mean LPIPS over frames."""
    try:
        import lpips
    except ImportError:
        raise complain(
            "python package", "no lpips", "lpips", "pip install lpips, or leave LPIPS out: --no-lpips"
        ) from None
    net = lpips.LPIPS(net="alex").to(device).eval()

    def tensor(frames: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(frames).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1

    @torch.no_grad()
    def distance(reference: np.ndarray, video: np.ndarray) -> float:
        starts = range(0, len(video), FRAMES_AT_ONCE)
        cuts = [slice(start, start + FRAMES_AT_ONCE) for start in starts]
        return float(torch.cat([net(tensor(reference[c]), tensor(video[c])).flatten() for c in cuts]).mean())

    return distance


if __name__ == "__main__":
    sys.exit(main())
