"""How far two videos or two tensors are apart."""

from __future__ import annotations

import math

import numpy as np

from svdit.plans.errors import complain

SSIM_WINDOW = 7


def _same_shape(a: np.ndarray, b: np.ndarray, subject: str) -> None:
    if a.shape != b.shape:
        raise complain(subject, f"shapes {a.shape} and {b.shape}", "equal shapes")


def psnr(reference: np.ndarray, video: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 videos [F, H, W, 3], over all pixels; inf when identical."""
    from skimage.metrics import peak_signal_noise_ratio

    _same_shape(reference, video, "psnr")
    if np.array_equal(reference, video):
        return math.inf
    return float(peak_signal_noise_ratio(reference, video, data_range=255))


def ssim(reference: np.ndarray, video: np.ndarray) -> float:
    """Structural similarity of uint8 videos [F, H, W, 3]: mean over frames, 7 x 7 uniform window."""
    from skimage.metrics import structural_similarity

    _same_shape(reference, video, "ssim")
    if min(video.shape[1:3]) < SSIM_WINDOW:
        raise complain(
            "ssim", f"frames of {video.shape[1]} x {video.shape[2]}", f"at least {SSIM_WINDOW} pixels a side"
        )
    return float(
        np.mean(
            [
                structural_similarity(a, b, data_range=255, channel_axis=-1, win_size=SSIM_WINDOW)
                for a, b in zip(reference, video, strict=True)
            ]
        )
    )


def max_abs_error(reference: np.ndarray, value: np.ndarray) -> float:
    """Largest absolute difference, in float64."""
    _same_shape(reference, value, "max_abs_error")
    return float(np.abs(value.astype(np.float64) - reference.astype(np.float64)).max(initial=0.0))


def rel_l2_error(reference: np.ndarray, value: np.ndarray) -> float:
    """|value - reference| / |reference| in the Euclidean norm, float64; inf against a reference of zeros."""
    _same_shape(reference, value, "rel_l2_error")
    gap = float(np.linalg.norm((value.astype(np.float64) - reference.astype(np.float64)).ravel()))
    size = float(np.linalg.norm(reference.astype(np.float64).ravel()))
    return gap / size if size else (math.inf if gap else 0.0)
