"""First look at a kernel build on a GPU: small problems of rising difficulty, one line each, stop at the first bad one.

Usage: SVDIT_KERNELS=<library> python scripts/kernel_smoke.py
A library built with SVDIT_WATCHDOG also says which barrier was waited for when the protocol is wrong.
"""

from __future__ import annotations

import ctypes
import sys

import numpy as np
import torch

from svdit.trt_plugins import cuda_library
from tests.trt_plugins import kernel_runs
from tests.trt_plugins.kernel_cases import FULL, SKIP, random_case
from tests.trt_plugins.test_cuda_kernel import plain_case


def cases():
    for head_dim in (128, 64):
        for tokens in (128, 64, 256, 1, 200, 384, 1024, 1000):
            yield f"full D={head_dim} N={tokens}", plain_case((1, tokens, 1, head_dim), [], [[FULL]])
    band = np.abs(np.arange(9)[:, None] - np.arange(9)) <= 1
    yield "band", plain_case((1, 1100, 2, 128), [band], [[2, 2]])
    yield "band, skip, full", plain_case((2, 1100, 3, 128), [band], [[2, SKIP, FULL]])
    yield "many items", plain_case((2, 1100, 40, 128), [band], [[2, FULL] * 20])
    yield "many items D=64 fp16", plain_case((2, 1100, 40, 64), [band], [[2, FULL] * 20], "float16")
    for seed in range(12):
        yield f"random {seed}", random_case(seed)


def report_watchdog(library: ctypes.CDLL) -> bool:
    """Prints the record of a tripped watchdog; False when it is silent or not built in."""
    record = (ctypes.c_int * 8)()
    if not hasattr(library, "svdit_watchdog") or library.svdit_watchdog(record) != 0 or record[0] == 0:
        return False
    print(f"  watchdog: block {record[1]} thread {record[2]} barrier {record[3]:#x} parity {record[4]}")
    return True


def main() -> int:
    path = cuda_library.find()
    library = ctypes.CDLL(str(path))
    print(path, torch.cuda.get_device_name(0), flush=True)
    for name, case in cases():
        inputs = kernel_runs.inputs_of(case)
        out = kernel_runs.run(case, inputs)
        tripped = report_watchdog(library)
        try:
            errors = kernel_runs.judge(case, inputs, out)
        except AssertionError as error:
            print(f"{name}: BAD {error}")
            return 1
        ours, usual = ((x / max(errors.truth, 1e-30)) ** 0.5 for x in (errors.kernel, errors.torch))
        verdict = "BAD" if tripped or not ours <= 1.25 * usual + 1e-3 else "ok"
        print(f"{name}: {verdict} error {ours:.2e}, torch {usual:.2e}", flush=True)
        if verdict == "BAD":
            difference = (out.double() - torch.nan_to_num(out.double())).abs().sum()
            print("  NaN sum", float(difference), "first rows", out[0, :4, 0, :6].tolist())
            print("  row norms", out[0, ::16, 0].float().norm(dim=-1).tolist()[:16])
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
