"""Small problems, one after the other, for compute-sanitizer: no judging, so that little but the kernel itself runs.

Usage: SVDIT_KERNELS=<library> compute-sanitizer --tool racecheck --kernel-name kernel_substring=sparse_attention \
           python scripts/kernel_launches.py SECONDS
Ends after SECONDS and says how many launches and work items there were. SVDIT_KERNEL chooses the kernel.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from tests.trt_plugins import kernel_runs
from tests.trt_plugins.kernel_cases import FULL, SKIP, random_case
from tests.trt_plugins.test_cuda_kernel import plain_case


def cases():
    band = np.abs(np.arange(5)[:, None] - np.arange(5)) <= 1
    left = np.broadcast_to(np.arange(10) < 4, (10, 10))
    for head_dim in (64, 128):
        yield plain_case((1, 600, 3, head_dim), [band], [[2, SKIP, FULL]])
        yield plain_case((1, 600, 3, head_dim), [left], [[2, 2, 2]], rows=64)
        yield plain_case((1, 200, 1, head_dim), [], [[FULL]], "float16")
    for seed in range(1000):
        yield random_case(seed, most_tokens=500)


def main() -> int:
    end = time.monotonic() + float(sys.argv[1])
    launches = items = 0
    for case in cases():
        if time.monotonic() > end:
            break
        out = kernel_runs.run(case, kernel_runs.inputs_of(case))
        if out.isnan().any():
            print(f"{case.name}: NaN in the output")
            return 1
        launches += 1
        items += int((case.tables["work_order"][case.stage] >= 0).sum()) * case.shape[0]
    print(f"{launches} launches, {items} work items", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
