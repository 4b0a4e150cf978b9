"""Times of attention kernels on one GPU, side by side.

Method: inputs are independent standard normal numbers (zeros would draw less power and clock higher), seed 0.
Every implementation is warmed up twice; then rounds follow in which each implementation runs back to back for
a given time, so that the clock settles to what the power limit allows it, in an order that rotates from round
to round. Each call lies between its own pair of events; the median over all calls counts. The SM clock is read
throughout and the board's energy at both ends. Caches are left as the previous call left them: K and V of
one head alone exceed the L2 cache at these sizes. All implementations compute the same kept tiles; rates
are operations of the mask (4 x kept token pairs x head size) over time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from svdit.plans.errors import complain
from svdit.runtime.bench_cases import BLOCK, BenchCase

WARMUPS = 2


@dataclass
class Timing:
    """One implementation on one case."""

    name: str
    milliseconds: list[float] = field(default_factory=list)
    clocks: list[int] = field(default_factory=list)
    joules: float = 0.0
    seconds: float = 0.0
    error: str = ""

    @property
    def median(self) -> float:
        """Milliseconds."""
        return statistics.median(self.milliseconds)

    def summary(self) -> dict:
        """Plain JSON: median, range and number of calls."""
        return {
            "implementation": self.name,
            "latency_ms": round(self.median, 4),
            "latency_ms_range": [round(min(self.milliseconds), 4), round(max(self.milliseconds), 4)],
            "calls": len(self.milliseconds),
        }

    def to_json(self, case: BenchCase) -> dict:
        if self.error:
            return {"implementation": self.name, "error": self.error}
        return {
            **self.summary(),
            "tflops": round(case.flop / self.median / 1e9, 1),
            "sm_mhz": round(statistics.mean(self.clocks)) if self.clocks else None,
            "watts": round(self.joules / self.seconds) if self.joules else None,
        }


Implementation = Callable[["BenchCase", "Inputs"], Callable[[], object]]
"""Takes a case and its inputs, prepares everything that is constant, returns the call to time."""


@dataclass(frozen=True)
class Inputs:
    """q, k, v [1, N, H, D] on the GPU."""

    q: object
    k: object
    v: object


def inputs_of(case: BenchCase, dtype: str) -> Inputs:
    import torch

    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (
        torch.randn(case.shape, generator=generator, device="cuda", dtype=getattr(torch, dtype)) for _ in range(3)
    )
    return Inputs(q, k, v)


def ours(path: Path) -> Implementation:
    """The kernel of one built library."""

    def prepare(case: BenchCase, inputs: Inputs) -> Callable[[], object]:
        import torch

        from svdit.trt_plugins import cuda_library, cuda_op

        library = cuda_library.open_library(path)
        constants = {
            "stage": np.zeros(1, np.int32),
            "text_len": np.full(1, case.geometry.text_tokens, np.int32),
            "head_pattern": case.tables.head_pattern[0],
            "tile_offsets": case.tables.tile_offsets,
            "row_offsets": case.tables.row_offsets,
            "tile_index": case.tables.tile_index,
            "work_order": case.tables.work_order[0],
        }
        tables = {name: torch.from_numpy(x).cuda() for name, x in constants.items()}
        out = torch.empty_like(inputs.q)
        scale = case.geometry.head_dim**-0.5
        text = case.tables.text_tokens, case.tables.text_first
        return lambda: cuda_op.launch(inputs.q, inputs.k, inputs.v, out, tables, scale, *text, library)

    return prepare


def padded_masks(case: BenchCase) -> np.ndarray:
    """bool [H or 1, nT, nT]: the masks of all heads, each tile a block of its own, as other kernels need it."""
    names = case.heads[:1] if len(set(case.heads)) == 1 else case.heads
    return np.stack([case.masks[name] for name in names])


def flash_attention_4(case: BenchCase, inputs: Inputs) -> Callable[[], object]:
    """FlashAttention-4 (flash-attn-4, CuTe), block lists of 128 x 128; border tiles padded to whole blocks."""
    import torch
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    masks = padded_masks(case)
    tokens = masks.shape[-1] * BLOCK
    q, k, v = inputs.q, inputs.k, inputs.v
    if tokens != case.geometry.tokens:
        q, k, v = (
            torch.randn((1, tokens, *q.shape[2:]), device="cuda", dtype=q.dtype) for _ in range(3)
        )
    if masks.all():
        return lambda: _flash_attn_fwd(q, k, v)
    kept = torch.from_numpy(masks).cuda()
    count = kept.sum(-1).int()[None].contiguous()
    index = torch.argsort(~kept, dim=-1, stable=True).int()[None].contiguous()
    lists = BlockSparseTensorsTorch(torch.zeros_like(count), index, count, index, block_size=(BLOCK, BLOCK))
    return lambda: _flash_attn_fwd(q, k, v, block_sparse_tensors=lists)


def _fused(backend: str) -> Implementation:
    """torch's scaled_dot_product_attention on one backend, by its name in SDPBackend; dense only."""

    def prepare(case: BenchCase, inputs: Inputs) -> Callable[[], object]:
        from torch.nn import functional
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if set(case.heads) != {"full"}:
            raise complain(backend, f"case {case.name}", "a dense case")
        q, k, v = (x.transpose(1, 2).contiguous() for x in (inputs.q, inputs.k, inputs.v))

        def call() -> object:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return functional.scaled_dot_product_attention(q, k, v)

        return call

    return prepare


def flex_attention(case: BenchCase, inputs: Inputs) -> Callable[[], object]:
    """torch's FlexAttention, compiled, with a block mask of the same tiles; uniform cases only."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask
    from torch.nn.attention.flex_attention import flex_attention as flex

    if not case.is_uniform:
        raise complain("flex", f"case {case.name}", "a case with one mask on whole tiles")
    kept = torch.from_numpy(padded_masks(case)).cuda()[None]
    count = kept.sum(-1).int()
    index = torch.argsort(~kept, dim=-1, stable=True).int()
    none = torch.zeros_like(count)
    mask = BlockMask.from_kv_blocks(none, index, count, index, BLOCK_SIZE=BLOCK)
    compiled = torch.compile(flex, dynamic=False)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (inputs.q, inputs.k, inputs.v))
    return lambda: compiled(q, k, v, block_mask=mask)


PEERS: dict[str, Implementation] = {
    "fa4": flash_attention_4,
    "cudnn": _fused("CUDNN_ATTENTION"),
    "flash": _fused("FLASH_ATTENTION"),
    "flex": flex_attention,
}


def time_case(
    case: BenchCase, implementations: dict[str, Implementation], dtype: str, rounds: int, seconds: float
) -> list[Timing]:
    """Interleaved timings of one case; an implementation that cannot run it says why in `error`.

    rounds: how often each has its turn; seconds: how long a turn lasts at least.
    """
    import torch

    inputs = inputs_of(case, dtype)
    calls: dict[str, Callable[[], object]] = {}
    timings = {name: Timing(name) for name in implementations}
    for name, prepare in implementations.items():
        try:
            calls[name] = prepare(case, inputs)
            for _ in range(WARMUPS):
                calls[name]()
            torch.cuda.synchronize()
        except Exception as error:  # a peer may fail in any way; the others still count
            timings[name].error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            calls.pop(name, None)
    board = Board()
    names = list(calls)
    for name in turns(names, rounds):
        _take_turn(calls[name], timings[name], board, seconds)
    return list(timings.values())


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Every name once a round, in an order that rotates from round to round."""
    for r in range(rounds):
        first = r % len(names) if names else 0
        yield from (*names[first:], *names[:first])


def _take_turn(call: Callable[[], object], timing: Timing, board: Board, seconds: float) -> None:
    import torch

    energy, begin = board.joules(), time.perf_counter()
    events = []
    while not events or time.perf_counter() - begin < seconds:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        events.append((start, stop))
        if len(events) > 1:  # one call is always queued behind the running one
            events[-2][1].synchronize()
            timing.clocks += board.megahertz()
    torch.cuda.synchronize()
    timing.seconds += time.perf_counter() - begin
    timing.joules += board.joules() - energy
    timing.milliseconds += [start.elapsed_time(stop) for start, stop in events]


class Board:
    """Clock and energy counter of the current GPU through NVML; nothing where NVML is not to be had."""

    def __init__(self) -> None:
        try:
            import pynvml
            import torch

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
            self.megahertz()
            self.joules()
        except Exception:  # the package, the library, the right or the counter may be missing
            self._nvml = None

    def megahertz(self) -> list[int]:
        if self._nvml is None:
            return []
        return [self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)]

    def joules(self) -> float:
        if self._nvml is None:
            return 0.0
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000.0


def gpu_description() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        raise complain("GPU", "none", "a CUDA GPU", "run the benchmark on the machine that it is about")
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": properties.name, "torch": torch.__version__, "cuda": str(torch.version.cuda)}
