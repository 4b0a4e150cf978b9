"""Turn `svdit-bench attention --latency --json` into the latency table of a GPU, plans/hardware/<gpu>.json.

Usage: python scripts/hardware_table.py BENCH.json [MORE.json] --implementation NAME -o plans/hardware/h100.json

Says how well each mixed layer is predicted from the rows without it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np

from svdit.plans.cost import COUNTS, HeadWork, cost_model, head_work, read_hardware
from svdit.runtime.bench_cases import MIXED, BenchCase, bench_case


def table_of(bench: dict, implementation: str) -> dict:
    """One row a case: sizes, density, and how long a launch took; every number here is measured."""
    rows = []
    for case in bench["cases"]:
        result = next((r for r in case["results"] if r["implementation"] == implementation), None)
        if result is None or "error" in result:
            continue
        batch, tokens, heads, head_dim = case["shape"]
        work = work_of(bench_case(case["case"]))
        rows.append(
            {
                "case": case["case"],
                "batch": batch,
                "tokens": tokens,
                "heads": heads,
                "head_dim": head_dim,
                "density": round(case["density"], 6),
                **{name: round(float(np.mean(getattr(work, name))), 6) for name in COUNTS},
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


def work_of(case: BenchCase) -> HeadWork:
    """Of each head of a case."""
    names = list(case.masks)
    found = head_work(case.plan.tiling(), [case.masks[name] for name in names])
    of_head = [names.index(name) for name in case.heads]
    return HeadWork(*(getattr(found, field.name)[of_head] for field in fields(found)))


def check_mixed(table: dict) -> None:
    """Print the mixed layers' times beside those predicted by a fit without any of them."""
    rows = [row for row in table["attention"] if row["case"] not in MIXED]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "without.json"
        path.write_text(json.dumps({**table, "attention": rows}))
        hardware = read_hardware(path)
    for row in (row for row in table["attention"] if row["case"] in MIXED):
        case = bench_case(row["case"])
        cost = cost_model(hardware, case.name, case.geometry)
        predicted = cost.launch_ms + cost.heads_ms(work_of(case)).sum()
        off = 100 * (predicted / row["latency_ms"] - 1)
        print(
            f"{case.name}: predicted {predicted:.2f} ms, measured {row['latency_ms']:.2f} ms, {off:+.1f} %; "
            f"worst row of the fit {100 * cost.residual:.1f} %"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path, nargs="+", help="runs of one kernel on one machine")
    parser.add_argument("--implementation", default="svdit")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    tables = [table_of(json.loads(path.read_text()), args.implementation) for path in args.bench]
    for path, found in zip(args.bench, tables, strict=True):
        if not found["attention"]:
            raise SystemExit(f"{path}: got no timing of {args.implementation}; expected one of its implementations")
    table = tables[0]
    table["attention"] = [row for found in tables for row in found["attention"]]
    table["how"] = "; ".join(dict.fromkeys(found["how"] for found in tables))
    if args.output.exists():  # what the bench does not measure: the quoted peak rate, times outside attention
        before = json.loads(args.output.read_text())
        table.update({key: before[key] for key in ("peak", "rest") if key in before})
    args.output.write_text(json.dumps(table, indent=2) + "\n")
    check_mixed(table)


if __name__ == "__main__":
    main()
