"""Turn `svdit-bench attention --json` into the latency table of a GPU, plans/hardware/<gpu>.json.

Usage: python scripts/hardware_table.py BENCH.json --implementation NAME -o plans/hardware/h100.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def table_of(bench: dict, implementation: str) -> dict:
    """One row a case: sizes, density, and how long a launch took; every number here is measured."""
    rows = []
    for case in bench["cases"]:
        result = next((r for r in case["results"] if r["implementation"] == implementation), None)
        if result is None or "error" in result:
            continue
        batch, tokens, heads, head_dim = case["shape"]
        rows.append(
            {
                "case": case["case"],
                "batch": batch,
                "tokens": tokens,
                "heads": heads,
                "head_dim": head_dim,
                "density": round(case["density"], 6),
                "latency_ms": result["latency_ms"],
                "tflops": result["tflops"],
                "sm_mhz": result["sm_mhz"],
            }
        )
    return {
        "format": "svdit-hardware",
        "version": 1,
        "gpu": bench["gpu"],
        "status": "measured",
        "how": f"svdit-bench attention, {bench['dtype']}, {bench['rounds']} turns of {bench['seconds']} s, torch "
        f"{bench['torch']}; medians, sustained, board at its power limit",
        "attention": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path)
    parser.add_argument("--implementation", default="svdit")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    table = table_of(json.loads(args.bench.read_text()), args.implementation)
    if not table["attention"]:
        raise SystemExit(f"{args.bench}: got no timing of {args.implementation}; expected one of its implementations")
    if args.output.exists():  # what the bench does not measure: the quoted peak rate, times outside attention
        before = json.loads(args.output.read_text())
        table.update({key: before[key] for key in ("peak", "rest") if key in before})
    args.output.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
