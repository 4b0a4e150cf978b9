#!/usr/bin/env python3
"""Draw PSNR against measured speed-up and against density, one line a method, from a JSON list of judged plans.

    plot_judged.py docs/data/tiny-judged.json docs/images/tiny_tradeoff.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from svdit.plans.report.judged import JudgedPlan, read_judged

LABELS = {"speedup": "measured speed-up", "density": "kept share of all query-key pairs"}


def draw(axes: Axes, plans: list[JudgedPlan], axis: str) -> None:
    """A line for each method that has plans with this figure; colour and marker are those of its place in the list."""
    for number, method in enumerate(dict.fromkeys(plan.method for plan in plans)):
        own = [plan for plan in plans if plan.method == method and getattr(plan, axis) is not None]
        rows = sorted((getattr(plan, axis), plan.psnr) for plan in own)
        ours = method.startswith("budget")
        style = {"linewidth": 2.2, "zorder": 3} if ours else {"linewidth": 1.0, "linestyle": "--"}
        look = {"marker": "osD^vP*X<>hd"[number % 12], "color": f"C{number % 10}", "markersize": 5}
        axes.plot(*(zip(*rows, strict=True) if rows else ([], [])), label=method, **look, **style)
    axes.set_xlabel(LABELS[axis])
    axes.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("png", type=Path)
    args = parser.parse_args()
    plans = read_judged(args.json)
    shown = [axis for axis in LABELS if any(getattr(plan, axis) is not None for plan in plans)]
    figure = Figure(figsize=(3.0 + 4.2 * len(shown), 4.4), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, axis in zip(panels, shown, strict=True):
        draw(axes, plans, axis)
    panels[0].set_ylabel("PSNR against dense attention, dB")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    figure.savefig(args.png, dpi=120)


if __name__ == "__main__":
    main()
