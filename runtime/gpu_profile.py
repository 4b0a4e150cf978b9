"""Where a GPU's time goes in a piece of work, by kind of kernel, and how often the host waits: torch's profiler.

The profiler sees every library of the process, ONNX Runtime and captured CUDA graphs included.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

KINDS = {
    "attention": r"sparse_attention",
    "copies between host and GPU": r"Memcpy (HtoD|DtoH)",
    "copies on the GPU": r"Memcpy|Memset",
    "products": r"gemm|cutlass|xmma|nvjet|cublas|splitK|gemv",
    "normalisation and softmax": r"(?i)layer_?norm|softmax|reduce",
    "transposes": r"(?i)transpose",
    "casts": r"(?i)cast",
}
"""Kinds of GPU work by its name: the first pattern that is found counts; what is left is "other elementwise"."""
REST = "other elementwise"
WAITS = re.compile(r"^cu(da)?(Stream|Device|Event|Ctx)Synchronize|^cudaMemcpy$")
"""Calls after which the host has waited for the GPU."""


@dataclass(frozen=True)
class GpuProfile:
    """Microseconds and launches on the GPU by name, and the host's waits by call."""

    microseconds: dict[str, float]
    launches: dict[str, int]
    waits: dict[str, int]

    @property
    def total(self) -> float:
        """Microseconds of all kernels and copies."""
        return sum(self.microseconds.values())

    def of(self, kind: str) -> float:
        """Microseconds of one kind."""
        return sum(us for name, us in self.microseconds.items() if kind_of(name) == kind)

    def count(self, kind: str) -> int:
        """Launches of one kind."""
        return sum(n for name, n in self.launches.items() if kind_of(name) == kind)

    def to_json(self) -> dict[str, object]:
        """Plain JSON: totals, [milliseconds, launches] of every kind, and the longest kernels."""
        longest = sorted(self.microseconds.items(), key=lambda item: -item[1])[:12]
        return {
            "gpu_ms": round(self.total / 1e3, 3),
            "attention_share": round(self.of("attention") / self.total, 4) if self.total else None,
            "kinds": {kind: [round(self.of(kind) / 1e3, 3), self.count(kind)] for kind in (*KINDS, REST)},
            "waits": self.waits,
            "longest_ms": {name[:100]: round(us / 1e3, 3) for name, us in longest},
        }


def kind_of(name: str) -> str:
    """Which of KINDS a kernel or copy belongs to."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), REST)


def profile_gpu(work: Callable[[], object]) -> GpuProfile:
    """Run `work` once under the profiler, whose own wait for the GPU at the end is not counted."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
    events = seen.key_averages()
    on_gpu = [e for e in events if e.device_type == DeviceType.CUDA and e.self_device_time_total > 0]
    times: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in on_gpu:
        times[event.key] += event.self_device_time_total
        launches[event.key] += event.count
    waits = Counter({e.key: e.count for e in events if e.device_type == DeviceType.CPU and WAITS.search(e.key)})
    waits["cudaDeviceSynchronize"] -= 1
    return GpuProfile(dict(times), dict(launches), dict(+waits))
