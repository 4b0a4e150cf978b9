#!/usr/bin/env python3
"""Train `tiny`, the small video diffusion transformer that ships with svdit, from data drawn as training goes.

    train_tiny.py --out DIR --seconds 480 --size 64 --batch 48              # first stage: 16x16x16 = 4096 tokens
    train_tiny.py --out DIR --seconds 420 --size 96 --batch 20 --init DIR1  # second stage: 16x24x24 = 9216 tokens

Data: one coloured shape moves over a smooth textured background and bounces off the walls; the caption names
colour, shape, direction and speed. Model: diffusers' WanTransformer3DModel in pixel space. Objective: rectified
flow (Liu et al., 2209.03003): x_sigma = (1 - sigma) x0 + sigma noise, the model predicts noise - x0. The
exponential moving average of the weights is what is saved.

Writes DIR/{transformer,scheduler,captions} in diffusers' layout (fp16, shards under 15 MB), DIR/samples.png and
DIR/training.json. Needs one CUDA GPU (about 60 GB at the defaults; lower --batch for less).
"""
from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import load_file, save_file

VOCABULARY = {
    "colour": ["red", "green", "blue", "yellow", "magenta", "cyan"],
    "shape": ["circle", "square", "triangle"],
    "direction": ["right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right"],
    "speed": ["slow", "medium", "fast"],
}
RGB = [[1, 0.2, 0.2], [0.2, 1, 0.2], [0.25, 0.4, 1], [1, 1, 0.2], [1, 0.3, 1], [0.2, 1, 1]]
PIXELS_PER_FRAME = [1.0, 2.0, 3.0]
FRAMES, TEXT_WIDTH, CAPTION_TOKENS, SHIFT = 16, 128, 4, 3.0
CONFIG = {
    "patch_size": (1, 4, 4), "num_attention_heads": 4, "attention_head_dim": 64, "in_channels": 3,
    "out_channels": 3, "text_dim": TEXT_WIDTH, "freq_dim": 128, "ffn_dim": 1024, "num_layers": 8,
    "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 64}


def draw(count: int, size: int, device: str, words: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw `count` videos [count, 3, FRAMES, size, size] in [-1, 1] and their caption tokens [count, 4].

    `words` [count, 4] fixes (colour, shape, direction, speed) as indices into each word list; drawn when absent.
    """
    lengths = [len(v) for v in VOCABULARY.values()]
    if words is None:
        words = torch.stack([torch.randint(n, (count,), device=device) for n in lengths], 1)
    colour, shape, direction, speed = words.unbind(1)
    pixel = torch.arange(size, device=device).float() + 0.5
    time_s = torch.arange(FRAMES, device=device).float()
    angle = direction.float() * math.pi / 4
    step = torch.tensor(PIXELS_PER_FRAME, device=device)[speed]
    radius = torch.rand(count, device=device) * 3 + 11
    low, high = radius[:, None], size - radius[:, None]
    start = torch.rand(count, 2, device=device)

    def bounce(begin: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        """Centre [count, FRAMES] in pixels: starts along `velocity`, is reflected at the walls."""
        span = high - low
        return low + span - ((begin[:, None] * span + velocity[:, None] * time_s) % (2 * span) - span).abs()

    px = bounce(start[:, 0], torch.cos(angle) * step)
    py = bounce(start[:, 1], torch.sin(angle) * step)
    dx = (pixel - px[..., None])[..., None, :] / radius[:, None, None, None]
    dy = (pixel - py[..., None])[..., :, None] / radius[:, None, None, None]
    circle = torch.sqrt(dx**2 + dy**2) - 1
    square = torch.maximum(dx.abs(), dy.abs()) - 0.88
    triangle = torch.maximum(dx.abs() * 0.9 + dy * 0.5, -dy) - 0.62
    pick = shape[:, None, None, None]
    distance = torch.where(pick == 0, circle, torch.where(pick == 1, square, triangle))
    alpha = torch.sigmoid(-1.8 * radius[:, None, None, None] * distance)[:, None]

    unit = pixel / 96 * 2 * math.pi
    freq = (torch.rand(count, 3, 2, 2, device=device) - 0.5) * 2.4
    phase = torch.rand(count, 3, 2, device=device) * 2 * math.pi
    freq_y, freq_x = freq[..., None, None].unbind(3)
    waves = torch.sin(unit[:, None] * freq_y + unit * freq_x + phase[..., None, None])
    back = (waves * torch.tensor([0.22, 0.13], device=device)[:, None, None]).sum(2) - 0.45
    fore = torch.tensor(RGB, device=device)[colour] * 2 - 1
    video = back[:, :, None] * (1 - alpha) + fore[:, :, None, None, None] * alpha
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)[:-1].tolist()], device=device)
    return video, words + offsets


def noisy(video: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    mix = sigma[:, None, None, None, None]
    return (1 - mix) * video + mix * noise


def held_out_loss(model, captions, size: int, device: str, batches: int = 6, count: int = 16) -> float:
    """Mean flow-matching loss on seeded held-out draws at evenly spread sigmas."""
    state, total = torch.random.get_rng_state(), 0.0
    cuda = torch.cuda.get_rng_state() if device == "cuda" else None
    torch.manual_seed(20_000_001)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        for _ in range(batches):
            video, tokens = draw(count, size, device)
            noise = torch.randn_like(video)
            sigma = (torch.arange(count, device=device) + 0.5) / count
            out = model(noisy(video, sigma, noise), sigma * 1000, captions(tokens), return_dict=False)[0]
            total += F.mse_loss(out.float(), noise - video).item()
    torch.random.set_rng_state(state)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
    return total / batches


@torch.no_grad()
def sample(model, captions, tokens: torch.Tensor, size: int, device: str, steps: int = 25, scale: float = 3.0):
    """Videos [B, 3, FRAMES, size, size] for caption tokens [B, 4]; Euler steps, classifier-free guidance."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(tokens), 3, FRAMES, size, size, generator=generator).to(device)
    text = captions(tokens)
    text = torch.cat([torch.zeros_like(text), text])
    for t in scheduler.timesteps:
        with torch.autocast(device, torch.bfloat16):
            out = model(torch.cat([x, x]), t.to(device).expand(2 * len(x)), text, return_dict=False)[0].float()
        without, with_text = out.chunk(2)
        x = scheduler.step(without + scale * (with_text - without), t, x, return_dict=False)[0]
    return x


def contact_sheet(videos: torch.Tensor, path: Path) -> None:
    """One row a video, every second frame, as a PNG."""
    from PIL import Image

    rows = videos[:, :, ::2].clamp(-1, 1).add(1).mul(127.5).byte().permute(0, 3, 2, 4, 1)  # B h T w C
    b, h, frames, w, c = rows.shape
    Image.fromarray(rows.reshape(b * h, frames * w, c).cpu().numpy()).save(path)


def save(model, captions, out: Path) -> None:
    copy.deepcopy(model).half().save_pretrained(out / "transformer", max_shard_size="14MB")
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(out / "scheduler")
    (out / "captions").mkdir(exist_ok=True)
    save_file({"weight": captions.weight.detach().half().cpu().contiguous()}, out / "captions/captions.safetensors")
    config = {"vocabulary": VOCABULARY, "width": TEXT_WIDTH, "tokens": CAPTION_TOKENS}
    (out / "captions/config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=480, help="wall time of training, compilation included")
    parser.add_argument("--size", type=int, default=96, help="pixels a side, a multiple of 4")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lr-end", type=float, default=2e-5)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--init", type=Path, help="folder written earlier, to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()

    began, device = time.time(), args.device
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    captions = torch.nn.Embedding(sum(map(len, VOCABULARY.values())) + 1, TEXT_WIDTH).to(device)
    model = WanTransformer3DModel(**CONFIG).to(device)
    if args.init:
        kept = WanTransformer3DModel.from_pretrained(args.init / "transformer", torch_dtype=torch.float32)
        model.load_state_dict(kept.state_dict())
        captions.weight.data.copy_(load_file(args.init / "captions/captions.safetensors")["weight"])
    ema, ema_captions = copy.deepcopy(model).eval(), copy.deepcopy(captions)
    run = model if args.no_compile else torch.compile(model, dynamic=False)
    weights = [*model.parameters(), *captions.parameters()]
    averages = [*ema.parameters(), *ema_captions.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    loss_mean, steps, log = None, 0, []
    while (done := (time.time() - began) / args.seconds) < 1:
        rate = args.lr_end + (args.lr - args.lr_end) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (steps + 1) / args.warmup)
        video, tokens = draw(args.batch, args.size, device)
        text = captions(tokens) * (torch.rand(args.batch, 1, 1, device=device) >= 0.1)
        # Evenly spread quantiles of a logit-normal: the same distribution with less variance a batch.
        quantile = (torch.arange(args.batch, device=device) + torch.rand(args.batch, device=device)) / args.batch
        sigma = torch.sigmoid(torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4)) * 1.2 + 0.6)
        noise = torch.randn_like(video)
        with torch.autocast(device, torch.bfloat16):
            velocity = run(noisy(video, sigma, noise), sigma * 1000, text, return_dict=False)[0]
        loss = F.mse_loss(velocity.float(), noise - video)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - min(0.998, (steps + 1) / (steps + 10)))
        steps += 1
        if steps % 50 == 0:
            now = loss.item()
            loss_mean = now if loss_mean is None else 0.8 * loss_mean + 0.2 * now
            log.append((steps, round(time.time() - began, 1), round(loss_mean, 5)))
            if steps % 200 == 0:
                print(f"step {steps}, {log[-1][1]:.0f} s, loss {loss_mean:.4f}, lr {rate:.1e}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    save(ema, ema_captions, args.out)
    held = held_out_loss(ema, ema_captions, args.size, device)
    print(f"{steps} steps, {steps * args.batch} videos, held-out loss {held:.5f}", flush=True)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    info = {"settings": settings, "steps": steps, "held_out_loss": held, "log": log, "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    (args.out / "training.json").write_text(json.dumps(info, indent=1) + "\n")
    words = [[0, 0, 0, 1], [2, 1, 5, 2], [1, 2, 2, 0], [3, 0, 6, 2], [4, 1, 4, 1], [5, 2, 1, 2]]
    tokens = (torch.tensor(words) + torch.tensor([0, 6, 9, 17])).to(device)
    contact_sheet(sample(ema, ema_captions, tokens, args.size, device), args.out / "samples.png")


if __name__ == "__main__":
    main()
