"""Means of numbers that differ by orders of magnitude."""

from __future__ import annotations

import numpy as np
import pytest

from svdit.plans.numbers import geometric_mean


def test_one_odd_value_moves_a_geometric_mean_little():
    np.testing.assert_allclose(geometric_mean(np.array([[1.0, 3.0], [100.0, 3.0]])), [10.0, 3.0])
    assert geometric_mean(np.array([0.0, 0.0])) == 0.0
    np.testing.assert_allclose(geometric_mean(np.array([0.0, 4.0])), 4e-6, err_msg="a video without an error")
    videos = np.array([2.0, 3.0, 2.5, 2.0, 80.0])
    decibel = np.mean(-10 * np.log10(videos))
    assert -10 * np.log10(geometric_mean(videos)) == pytest.approx(decibel), "a mean PSNR goes by it"


def test_weights_count_a_value_several_times():
    values = np.array([[2.0, 0.0], [5.0, 7.0]])
    expected = geometric_mean(np.array([values[0]] + [values[1]] * 3))
    np.testing.assert_allclose(geometric_mean(values, [1, 3]), expected)
