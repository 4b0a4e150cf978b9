"""Metrics against their formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from svdit.plans.errors import SvditError
from svdit.runtime.metrics import max_abs_error, psnr, rel_l2_error, ssim


def videos(seed: int = 0, side: int = 16) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    first = random.integers(0, 256, (3, side, side + 4, 3), dtype=np.uint8)
    noise = random.integers(-20, 21, first.shape)
    return first, np.clip(first.astype(int) + noise, 0, 255).astype(np.uint8)


def windowed_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004 on one frame: 7 x 7 uniform windows inside the frame, sample covariance, per channel."""
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for channel in range(3):
        x, y = a[..., channel].astype(np.float64), b[..., channel].astype(np.float64)
        for i in range(x.shape[0] - 6):
            for j in range(x.shape[1] - 6):
                p, q = x[i : i + 7, j : j + 7].ravel(), y[i : i + 7, j : j + 7].ravel()
                (vp, cov), (_, vq) = np.cov(p, q, ddof=1)
                values.append(
                    (2 * p.mean() * q.mean() + c1)
                    * (2 * cov + c2)
                    / ((p.mean() ** 2 + q.mean() ** 2 + c1) * (vp + vq + c2))
                )
    return float(np.mean(values))


def test_psnr_formula():
    first, second = videos()
    mse = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    assert psnr(first, second) == pytest.approx(10 * math.log10(255**2 / mse), rel=1e-12)
    assert psnr(first, first) == math.inf


def test_ssim_formula():
    first, second = videos(side=10)
    expected = np.mean([windowed_ssim(a, b) for a, b in zip(first, second, strict=True)])
    assert ssim(first, second) == pytest.approx(expected, rel=1e-9)
    assert ssim(first, first) == pytest.approx(1.0, abs=1e-12)


def test_tensor_errors_formula():
    reference, value = np.array([3.0, -4.0], np.float32), np.array([3.0, -1.0], np.float32)
    assert max_abs_error(reference, value) == 3.0
    assert rel_l2_error(reference, value) == 3.0 / 5.0
    assert rel_l2_error(np.zeros(2), np.zeros(2)) == 0.0
    assert rel_l2_error(np.zeros(2), np.ones(2)) == math.inf


@pytest.mark.parametrize("metric", [psnr, ssim, max_abs_error, rel_l2_error])
def test_unequal_shapes_are_refused(metric):
    with pytest.raises(SvditError, match=rf"{metric.__name__}: got shapes \(2, 8, 8, 3\) and \(1, 8, 8, 3\)"):
        metric(np.zeros((2, 8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3), np.uint8))


def test_ssim_needs_a_window():
    with pytest.raises(SvditError, match="ssim: got frames of 6 x 8; expected at least 7 pixels a side"):
        ssim(np.zeros((1, 6, 8, 3), np.uint8), np.zeros((1, 6, 8, 3), np.uint8))
