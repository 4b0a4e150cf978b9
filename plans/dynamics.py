"""How much an attention error at one denoising step weighs in the finished video.

A noise schedule has S steps and S + 1 levels: the latent at level i is signal[i] * picture + noise[i] * normal noise,
with signal 1 and noise 0 at the end. The weights are those of pictures that vary `spread` times as much as the noise:

- What attention adds at level i concerns the part of the picture that the latent does not fix yet. Its size in units
  of noise is A(i) = 1 / sqrt(signal[i]^2 + (noise[i] / spread)^2), and so is the error in the predicted velocity.
- The step from i to i + 1 puts |signal[i] * noise[i+1] - signal[i+1] * noise[i]| of that error into the latent.
- Later steps make A(i + 1) of it, since the picture grows from signal[i + 1] to 1 and the error with it.

Errors of different steps count as independent, so the squares of these factors multiply squared errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from svdit.plans.errors import complain
from svdit.plans.fields import number

DEFAULT_SPREAD = 3.0
"""Fitted to 38 plans of the tiny model, see docs/search.md; `fit_spread` fits it to runs of your own."""
SPREADS = np.geomspace(1.0, 200.0, 107)
"""What `fit_spread` tries, 5 % apart."""


def check_spread(spread: float, subject: str = "spread") -> float:
    expected = "a number of at least 1"
    if number(spread, subject, expected) < 1:
        raise complain(subject, spread, expected, f"the default is {DEFAULT_SPREAD:g}; see docs/search.md")
    return float(spread)


def step_weights(signal: np.ndarray, noise: np.ndarray, spread: float = DEFAULT_SPREAD) -> np.ndarray:
    """[S] weights with mean 1 from the S + 1 levels of a schedule. Raises SvditError for levels that are none."""
    signal, noise = np.asarray(signal, dtype=np.float64), np.asarray(noise, dtype=np.float64)
    check_spread(spread)
    if signal.ndim != 1 or signal.shape != noise.shape or len(signal) < 2:
        raise complain("noise schedule", f"shapes {signal.shape} and {noise.shape}", "two equal lists of at least two")
    if not (np.isfinite(signal).all() and np.isfinite(noise).all() and (np.hypot(signal, noise) > 0).all()):
        raise complain("noise schedule", "levels that are not finite or all zero", "a signal or noise share at each")
    injected = np.abs(signal[:-1] * noise[1:] - signal[1:] * noise[:-1])
    open_part = 1.0 / np.hypot(signal, noise / spread)
    weight = np.square(injected * open_part[:-1] * open_part[1:])
    if not weight.sum() > 0:
        raise complain("noise schedule", "levels that never change", "a schedule from noise to picture")
    return weight / weight.mean()


@dataclass(frozen=True)
class SpreadFit:
    """The best spread, and how well the predicted errors then follow the measured ones.

    residual_db  standard deviation of measured minus predicted decibels, their mean difference taken out
    rank         Spearman's correlation between predicted and measured errors
    """

    spread: float
    residual_db: float
    rank: float


def fit_spread(signal: np.ndarray, noise: np.ndarray, errors: np.ndarray, measured_db: Sequence[float]) -> SpreadFit:
    """Calibrate on runs of whole plans.

    errors [R, S]    relative attention error of each step of each plan, mean over layers and heads
    measured_db [R]  PSNR (or any decibels, higher is better) of the videos that the plans made
    """
    from scipy.stats import spearmanr

    errors, measured = np.asarray(errors, dtype=np.float64), np.asarray(measured_db, dtype=np.float64)
    if errors.shape != (len(measured), len(signal) - 1) or len(measured) < 3:
        raise complain("runs", f"errors of shape {errors.shape}", f"[runs, {len(signal) - 1}] with at least 3 runs")
    best: SpreadFit | None = None
    for spread in SPREADS:
        total = errors @ step_weights(signal, noise, spread)
        if not (total > 0).all():
            raise complain("runs", "a plan without error", "plans that are sparse somewhere", "leave dense runs out")
        predicted = -10 * np.log10(total)
        residual = float(np.std(measured - predicted))
        if best is None or residual < best.residual_db:
            best = SpreadFit(float(spread), residual, float(spearmanr(predicted, measured).statistic))
    assert best is not None
    return best
