#!/usr/bin/env python3
"""Draw PSNR against density, one line a method, from a JSON list of judged plans.

    plot_judged.py docs/data/tiny-judged.json docs/images/tiny_tradeoff.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from svdit.plans.judged import read_judged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("png", type=Path)
    args = parser.parse_args()
    plans = read_judged(args.json)
    figure = Figure(figsize=(9.0, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(dict.fromkeys(plan.method for plan in plans)):
        rows = sorted((plan.density, plan.psnr) for plan in plans if plan.method == method)
        ours = method.startswith("budget")
        style = {"linewidth": 2.2, "zorder": 3} if ours else {"linewidth": 1.0, "linestyle": "--"}
        axes.plot(*zip(*rows, strict=True), marker="osD^vP*X<>"[number % 10], markersize=5, label=method, **style)
    axes.set_xlabel("kept share of all query-key pairs")
    axes.set_ylabel("PSNR against dense attention, dB")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(args.png, dpi=120)


if __name__ == "__main__":
    main()
