"""Check the machine code of the kernels: tensor core instructions, no local memory, no serialised products (Hopper).

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

KERNEL = re.compile(r"sm(80|90)_sparse_attention")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);")


def functions(library: Path) -> dict[str, list[str]]:
    """Instructions of each kernel and architecture in order of address."""
    dump = subprocess.run(["cuobjdump", "-sass", str(library)], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    architecture = ""
    for line in dump.splitlines():
        target = re.search(r"^arch = (\S+)", line)
        if target:
            architecture = target[1]
        name = re.search(r"Function : (\S+)", line)
        if name:
            current = found.setdefault(f"{name[1]} {architecture}", []) if KERNEL.search(name[1]) else None
        match = INSTRUCTION.match(line)
        if match and current is not None:
            current.append(match[2])
    return found


def defects(name: str, code: list[str]) -> list[str]:
    """What must not be: see docs/kernels.md, "What the build checks"."""
    found = []
    local = [text for text in code if re.search(r"\b(LDL|STL)\b", text)]
    if local:
        found.append(f"{len(local)} accesses to local memory, e.g. {local[0]}")
    if "sm80" in name:
        launched = not any("BPT.TRAP" in text for text in code)
        return found + (["no HMMA"] if launched and not any("HMMA" in text for text in code) else [])
    scores = 8 if "Li128" in name else 4
    products = sum("HGMMA" in text for text in code)
    turns = sum("BAR.ARV" in text for text in code)
    ways = 1 if "Li128" in name else 2  # of three warpgroups one may be idle: a second way through the step
    steps, odd = divmod(turns - 1, ways)  # one hand-over a step and way, and one before the first
    if odd or steps < 2 or products != (scores + 8) * steps + scores:
        found.append(f"{products} HGMMA for {steps} steps of {scores + 8} and a first block of {scores}")
    arrivals = sum("WARPGROUP.ARRIVE" in text for text in code)
    if arrivals != 2 * steps + 1:
        found.append(f"{arrivals} WARPGROUP.ARRIVE; {2 * steps + 1} expected: products are serialised")
    found += _late_exponentials(code)
    return found


def _late_exponentials(code: list[str]) -> list[str]:
    """Between the wait for the scores and the wait for the output: half of a block's exponentials."""
    waits = [i for i, text in enumerate(code) if "WARPGROUP.DEPBAR" in text]
    first = [i for i in waits if "0x1" in code[i].split(",")[-1]]
    found = []
    for i in first:
        after = next((j for j in waits if j > i), len(code))
        count = sum("MUFU.EX2" in text for text in code[i:after])
        if count < 32:
            found.append(f"{count} exponentials before the wait for the output; 32 expected")
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
        failures.append(f"{args.library}: no {KERNEL.pattern}")
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
