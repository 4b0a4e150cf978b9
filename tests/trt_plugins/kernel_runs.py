"""Run the CUDA kernel on a case and judge it: poisoned output, float64 truth, torch's own error beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from svdit.trt_plugins import cuda_op
from tests.trt_plugins.kernel_cases import KernelCase

GUARD = 4096
"""Elements before and after the output that the kernel must leave alone."""


@dataclass(frozen=True)
class Inputs:
    """q, k, v on the GPU; `hidden` marks key rows [B, N] that no query may see: they hold NaN."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    hidden: torch.Tensor


def inputs_of(case: KernelCase, seed: int = 0, magnitude: float = 1.0) -> Inputs:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    q, k, v = (
        (magnitude * torch.randn(case.shape, generator=generator, device="cuda")).to(dtype) for _ in range(3)
    )
    hidden = hidden_keys(case)
    k[hidden], v[hidden] = float("nan"), float("nan")
    return Inputs(q, k, v, hidden)


def hidden_keys(case: KernelCase) -> torch.Tensor:
    """bool [B, N]: text beyond text_len."""
    return torch.stack([torch.from_numpy(~case.valid_keys(b)) for b in range(case.shape[0])]).cuda()


def device_tables(case: KernelCase) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(x).cuda() for name, x in case.tables.items()}


def run(case: KernelCase, inputs: Inputs, tables: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """The kernel's output, written over NaN; asserts that the elements around it are untouched."""
    size = inputs.q.numel()
    storage = torch.full((size + 2 * GUARD,), float("nan"), dtype=inputs.q.dtype, device="cuda")
    storage[:GUARD], storage[GUARD + size :] = 7.0, 7.0
    out = storage[GUARD : GUARD + size].view(case.shape)
    tables = tables or device_tables(case)
    cuda_op.launch(
        inputs.q, inputs.k, inputs.v, out, tables, case.scale, case.text_tokens, case.text_first
    )
    torch.cuda.synchronize()
    assert (storage[:GUARD] == 7.0).all(), f"{case.name}: wrote before the output"
    assert (storage[GUARD + size :] == 7.0).all(), f"{case.name}: wrote behind the output"
    return out


@dataclass(frozen=True)
class Errors:
    """Squared norms over a whole case: of the truth, and of what the kernel and torch differ from it."""

    truth: float
    kernel: float
    torch: float


def judge(case: KernelCase, inputs: Inputs, out: torch.Tensor) -> Errors:
    """Compare with float64 head by head. Rows that keep nothing must be exactly zero."""
    totals = [0.0, 0.0, 0.0]
    for batch in range(case.shape[0]):
        visible = ~inputs.hidden[batch, :, None]
        for head in range(case.shape[2]):
            q = inputs.q[batch, :, head]
            k, v = (torch.where(visible, x[batch, :, head], 0) for x in (inputs.k, inputs.v))
            mask = torch.from_numpy(case.mask(batch, head)).cuda()
            got = out[batch, :, head].double()
            empty = ~mask.any(dim=1)
            where = f"{case.name} {case.dtype} {case.shape}, batch {batch}, head {head}"
            broken = got.isnan().any(dim=1).nonzero().flatten().tolist()
            assert not broken, f"{where}: NaN in rows {broken[:20]}"
            assert (got[empty] == 0).all(), f"{where}: rows without a key are not zero"
            truth = _truth(q, k, v, mask, case.scale)
            usual = _usual(q, k, v, mask, case.scale)
            usual[empty] = 0
            totals[0] += float(truth.square().sum())
            totals[1] += float((got - truth).square().sum())
            totals[2] += float((usual - truth).square().sum())
    return Errors(*totals)


def _truth(q, k, v, mask, scale):
    scores = (q.double() @ k.double().T * scale).masked_fill(~mask, float("-inf"))
    return torch.nan_to_num(torch.softmax(scores, dim=-1), nan=0.0) @ v.double()


def _usual(q, k, v, mask, scale):
    """torch's fused attention in the same type, which accumulates and rounds as any such kernel does."""
    tokens = mask.shape[0]
    padded = torch.zeros(tokens, -(-tokens // 8) * 8, dtype=torch.bool, device=mask.device)
    padded[:, :tokens] = mask
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        out = scaled_dot_product_attention(
            q[None, None], k[None, None], v[None, None], attn_mask=padded[None, None, :, :tokens], scale=scale
        )
    return out[0, 0].double()
