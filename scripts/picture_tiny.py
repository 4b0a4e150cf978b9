#!/usr/bin/env python3
"""Draw the attention maps of `tiny`'s heads: mean attention from query tiles to key tiles, one picture a head.

    picture_tiny.py --out docs/images/tiny_maps.png [--prompt "red circle moving right"] [--steps 3]

Maps are means over `--steps` denoising steps with dense attention (about a minute a step on two cores). Brightness is
the logarithm of the attention mass relative to a uniform map.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from svdit.plans import registry
from svdit.plans.tiles import Tiling
from svdit.runtime.measure import attention_maps
from svdit.runtime.pipeline import Model, Request
from svdit.runtime.tile_errors import TileErrorMeter
from svdit.runtime.torch_runner import TorchRunner, checkpoint_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--prompt", default="red circle moving right")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tile", type=int, nargs=3, default=(1, 8, 8), metavar=("T", "H", "W"))
    args = parser.parse_args()

    adapter = registry.adapter("tiny")
    folder = checkpoint_of(adapter, args.checkpoint)
    tiling = Tiling(adapter.geometry(folder), tuple(args.tile))
    with TorchRunner(adapter, folder, tiling, None) as runner, torch.inference_mode():
        request = Request((args.prompt,), steps=args.steps)
        maps = attention_maps(runner, Model(adapter, folder, tiling), request, TileErrorMeter(tiling), show=True)[0]
    np.savez_compressed(args.out.with_suffix(".npz"), maps=maps.astype(np.float32))
    layers, heads, tiles, _ = maps.shape
    figure = Figure(figsize=(1.5 * layers, 1.6 * heads), layout="constrained")
    axes = figure.subplots(heads, layers, squeeze=False)
    for layer in range(layers):
        for head in range(heads):
            shown = np.log2(np.maximum(maps[layer, head] * tiles, 1e-3))
            axes[head, layer].imshow(shown, vmin=-4, vmax=4, cmap="magma", interpolation="nearest")
            axes[head, layer].set_title(f"layer {layer}, head {head}", fontsize=7)
            axes[head, layer].set_axis_off()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
