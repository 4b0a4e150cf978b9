"""Check the machine code of the Hopper kernel: tensor core instructions, no local memory, no serialised products.

Usage: python scripts/check_sass.py LIBRARY [--build-log LOG]
Needs cuobjdump. Exit code 1 and one line for each defect.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

KERNEL = "sm90_sparse_attention"
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);")


def functions(library: Path) -> dict[str, list[str]]:
    """Instructions of each kernel in order of address."""
    dump = subprocess.run(["cuobjdump", "-sass", str(library)], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in dump.splitlines():
        name = re.search(r"Function : (\S+)", line)
        if name:
            current = found.setdefault(name[1], []) if KERNEL in name[1] else None
        match = INSTRUCTION.match(line)
        if match and current is not None:
            current.append(match[2])
    return found


def defects(name: str, code: list[str]) -> list[str]:
    """What must not be: see docs/kernels.md, "What the build checks"."""
    found = []
    scores = 8 if "Li128" in name else 4
    products = sum("HGMMA" in text for text in code)
    turns = sum("BAR.ARV" in text for text in code)
    if turns:  # one hand-over a step, and one before the first
        steps, first_blocks = turns - 1, 1
    else:  # two blocks of scores in a warpgroup; the first step has code of its own
        steps, first_blocks = 3, 2
    if steps < 2 or products != (scores + 8) * steps + scores * first_blocks:
        found.append(f"{products} HGMMA for {steps} steps of {scores + 8} and {first_blocks} first blocks of {scores}")
    local = [text for text in code if re.search(r"\b(LDL|STL)\b", text)]
    if local:
        found.append(f"{len(local)} accesses to local memory, e.g. {local[0]}")
    arrivals = sum("WARPGROUP.ARRIVE" in text for text in code)
    if arrivals != 2 * steps + first_blocks:
        found.append(f"{arrivals} WARPGROUP.ARRIVE; {2 * steps + first_blocks} expected: products are serialised")
    found += _late_exponentials(code, bool(turns))
    return found


def _late_exponentials(code: list[str], turns: bool) -> list[str]:
    """Between the scores (with turns: the wait for them) and the wait for the output: a block's exponentials."""
    waits = [i for i, text in enumerate(code) if "WARPGROUP.DEPBAR" in text]
    if turns:
        first = [i for i in waits if "0x1" in code[i].split(",")[-1]]
    else:
        products = [i for i, text in enumerate(code) if "HGMMA" in text]
        first = [max(i for i in products if i < wait) for wait in waits[2:]]  # after the two of the first block
    found = []
    for i in first:
        after = next((j for j in waits if j > i), len(code))
        count = sum("MUFU.EX2" in text for text in code[i:after])
        if count < 64:
            found.append(f"{count} exponentials before the wait for the output; 64 expected")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--build-log", type=Path)
    args = parser.parse_args()
    if shutil.which("cuobjdump") is None:
        print("cuobjdump: got none on PATH; expected the one of the CUDA toolkit", file=sys.stderr)
        return 2
    failures = []
    kernels = functions(args.library)
    if not kernels:
        failures.append(f"{args.library}: no {KERNEL}")
    for name, code in kernels.items():
        failures += [f"{name}: {defect}" for defect in defects(name, code)]
    if args.build_log is not None:
        for line in args.build_log.read_text().splitlines():
            spilled = re.search(r"([1-9]\d*) bytes spill", line)
            if spilled or re.search(r"\(C75\d\d\)", line):
                failures.append(f"build log: {line.strip()}")
    for failure in failures:
        print(failure)
    print(f"{len(kernels)} kernels, {len(failures)} defects")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
