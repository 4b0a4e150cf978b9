#!/usr/bin/env python3
"""Draw time against list length and sequence length from the JSON of `svdit-bench attention`.

    plot_sweep.py docs/data/h100-sweep.json docs/images/kernel_scaling.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

CUBLAS_RATE = 0.662
"""TFLOP a millisecond of an 8192^3 product in bf16, sustained at the power limit of an H100 (docs/kernels.md)."""
FAMILIES = {"list-": "N = 118,784, lists of 4 to 128 tiles", "comb-": "17 % of N = 16,384 to 480,000"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("png", type=Path)
    args = parser.parse_args()
    report = json.loads(args.json.read_text())
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for family, label in FAMILIES.items():
        cases = [case for case in report["cases"] if case["case"].startswith(family)]
        work = [case["flop"] / 1e12 for case in cases]
        axes.loglog(work, [case["results"][0]["latency_ms"] for case in cases], "o-", label=label)
    low, high = axes.get_xlim()
    label = f"{1e3 * CUBLAS_RATE:.0f} TFLOP/s: cuBLAS"
    axes.loglog([low, high], [low / CUBLAS_RATE, high / CUBLAS_RATE], "--", color="0.6", label=label)
    axes.set_xlabel("operations of kept tiles, TFLOP")
    axes.set_ylabel("time, ms")
    axes.set_title(f"{report['gpu']}, {report['dtype']}, D = 128, 24 heads", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(args.png, dpi=120)


if __name__ == "__main__":
    main()
