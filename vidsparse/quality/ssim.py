"""SSIM of one pair of frames: Wang et al. 2004, on R, G, B and luma at once.

Mean over valid positions of

    (2 mu_x mu_y + C1)(2 c + C2) / ((mu_x^2 + mu_y^2 + C1)(v_x + v_y + C2)),

moments weighted by an 11x11 Gaussian of sigma 1.5, population weights, peak 255, float64.
"""

import cv2
import numpy as np
import numpy.typing as npt

from vidsparse.quality.frames import Frame

SSIM_SIDE = 11
_LUMA = (0.299, 0.587, 0.114)
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_RADIUS = SSIM_SIDE // 2
TAPS = np.exp(-(np.arange(-_RADIUS, _RADIUS + 1) ** 2) / (2 * 1.5**2))
TAPS /= TAPS.sum()


def similarity(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Of the `planes` of two frames: (mean over R, G and B, on luma)."""
    mu_x, mu_y = _window_mean(x), _window_mean(y)
    mu_xy, mu_squares = mu_x * mu_y, mu_x * mu_x + mu_y * mu_y
    covariance = _window_mean(x * y) - mu_xy
    variances = _window_mean(x * x + y * y) - mu_squares  # v_x + v_y, never needed apart
    similarity = (2 * mu_xy + C1) * (2 * covariance + C2)
    similarity /= (mu_squares + C1) * (variances + C2)
    means = similarity.mean(axis=(0, 1))
    return float(means[:3].mean()), float(means[3])


def _window_mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(H, W, C) -> (H-10, W-10, C): Gaussian mean at the positions where the window fits."""
    filtered = cv2.sepFilter2D(values, cv2.CV_64F, TAPS, TAPS)
    return np.asarray(filtered[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS])


def planes(frame: Frame) -> npt.NDArray[np.float64]:
    """(H, W, 3) uint8 -> (H, W, 4) float64: R, G, B, Y."""
    rgb = frame.astype(np.float64)
    # Written out: a matrix product may round differently for equal pixels.
    luma = _LUMA[0] * rgb[..., 0] + _LUMA[1] * rgb[..., 1] + _LUMA[2] * rgb[..., 2]
    return np.dstack([rgb, luma])
