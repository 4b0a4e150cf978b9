"""The one accuracy rule: relative L2 error of every (batch, head) slice, and exact zeros stay zeros.

Slices, because one wrong head among many hardly moves the error of the whole tensor. The truth must
be computed from the inputs that the candidate saw, that is, after rounding them to its type.
"""

from __future__ import annotations

import numpy as np

LIMITS = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}
"""Largest relative L2 error. For 16-bit types about three times what rounding the weights and the
output to that type costs (unit roundoff 2**-11 and 2**-8)."""


def rel_l2(got, truth) -> float:
    """|got - truth| / |truth| over all elements; 0 / 0 is 0."""
    got, truth = np.asarray(got, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    error = float(np.linalg.norm(got - truth))
    return error / float(np.linalg.norm(truth)) if error else 0.0


def worst_slice(got, truth) -> tuple[float, tuple[int, int]]:
    """(largest rel L2 over batch elements and heads, where it is) of [B, N, H, D] arrays."""
    errors = {
        (b, h): rel_l2(got[b, :, h], truth[b, :, h]) for b in range(truth.shape[0]) for h in range(truth.shape[2])
    }
    where = max(errors, key=lambda key: errors[key])
    return errors[where], where


def check_attention(got, truth, dtype: str, what: object = "") -> float:
    """Raise AssertionError unless `got` [B, N, H, D] keeps the rule against a float64 truth; the error."""
    got, truth = np.asarray(got, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if got.shape != truth.shape:
        raise AssertionError(f"{what}: shape {got.shape}, expected {truth.shape}")
    if not np.isfinite(got).all():
        raise AssertionError(f"{what}: {int((~np.isfinite(got)).sum())} values are not finite")
    silent = (truth == 0).all(axis=-1)
    if np.any(got[silent]):
        b, n, h = np.argwhere(silent & np.any(got != 0, axis=-1))[0]
        raise AssertionError(f"{what}: batch {b} row {n} head {h} keeps nothing but is not zero")
    error, (b, h) = worst_slice(got, truth)
    if error > LIMITS[dtype]:
        raise AssertionError(f"{what}: rel L2 {error:.3g} > {LIMITS[dtype]:g} in batch {b} head {h} ({dtype})")
    return error
