"""PSNR and SSIM as other projects define them, to set beside theirs; never instead of ours.

Published figures are comparable only within one convention. `--compat NAME` measures, from the same
frames and in float64:

    svg        PSNR: mean of the frames' dB, no cap, so one identical frame makes it infinite.
               SSIM: box of 11x11 with zeros around the frame.
    teacache   PSNR: mean of the frames' dB, MSE clamped at 1e-10 of the full range (100 dB).
               SSIM: Gaussian 11x11, sigma 1.5, valid positions.
    fastvideo  PSNR as teacache. SSIM: the same Gaussian with zeros around the frame.
    skimage    PSNR: mean of the frames' dB, no cap. SSIM: box of 7x7, sample covariance,
               3 pixels of border left out.

Two pairs of clips in all of them, PSNR in dB and SSIM: noise on every frame; and noise that grows
from a first frame without any, as in image-to-video.

                  even noise        growing noise
    ours          32.53  0.8403     26.17  0.6560
    svg           32.53  0.9133     inf    0.7780
    teacache      32.53  0.8403     36.99  0.6560
    fastvideo     32.53  0.8546     36.99  0.6836
    skimage       32.53  0.8610     inf    0.6843
    torchmetrics  32.53  0.8401     26.17  0.6558

torchmetrics, with data_range=255: PSNR of a whole clip is pooled as ours, SSIM counts the 5 pixels
of border too, mirrored; without them it is ours. scikit-image's SSIM with gaussian_weights, sigma
1.5 and use_sample_covariance=False is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, log10

import cv2
import numpy as np
import numpy.typing as npt

from vidsparse.quality.frames import Frame
from vidsparse.quality.metrics import psnr
from vidsparse.quality.ssim import C1, C2, TAPS

Plane = npt.NDArray[np.float64]
Window = Callable[[Plane], Plane]


@dataclass(frozen=True)
class Convention:
    """psnr: of a frame, from its MSE in squared 8-bit steps. ssim: of a pair of frames."""

    psnr: Callable[[float], float]
    ssim: Callable[[Frame, Frame], float]

    def frame(self, x: Frame, y: Frame) -> tuple[float, float]:
        """(PSNR in dB, SSIM) of one pair of frames."""
        difference = cv2.absdiff(x, y).astype(np.int32)
        mse = int(np.sum(difference * difference, dtype=np.int64)) / difference.size
        return self.psnr(mse), self.ssim(x, y)


def clip(rows: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Means over frames; an infinite PSNR makes the mean infinite."""
    psnrs, ssims = zip(*rows, strict=True)
    mean = inf if inf in psnrs else float(np.mean(psnrs))
    return {"psnr": mean, "ssim": float(np.mean(ssims))}


def _capped(mse: float) -> float:
    return 10 * log10(1 / max(mse / 255**2, 1e-10))


def _gaussian(border: int) -> Window:
    return lambda x: np.asarray(cv2.sepFilter2D(x, cv2.CV_64F, TAPS, TAPS, borderType=border))


def _box(side: int, border: int) -> Window:
    def mean(x: Plane) -> Plane:
        return np.asarray(cv2.boxFilter(x, cv2.CV_64F, (side, side), borderType=border))

    return mean


def _similarity(
    window: Window, margin: int, unbiased: float = 1.0
) -> Callable[[Frame, Frame], float]:
    """SSIM by a window of means without `margin` pixels of border; moments times `unbiased`."""

    def ssim(x: Frame, y: Frame) -> float:
        a, b = x.astype(np.float64), y.astype(np.float64)
        mu_a, mu_b = window(a), window(b)
        v_a, v_b = window(a * a) - mu_a * mu_a, window(b * b) - mu_b * mu_b
        cov = window(a * b) - mu_a * mu_b
        top = (2 * mu_a * mu_b + C1) * (2 * unbiased * cov + C2)
        found = top / ((mu_a**2 + mu_b**2 + C1) * (unbiased * (v_a + v_b) + C2))
        height, width = found.shape[:2]
        return float(found[margin : height - margin, margin : width - margin].mean())

    return ssim


ZEROS, MIRROR = cv2.BORDER_CONSTANT, cv2.BORDER_REFLECT_101

CONVENTIONS = {
    "svg": Convention(psnr, _similarity(_box(11, ZEROS), 0)),
    "teacache": Convention(_capped, _similarity(_gaussian(MIRROR), 5)),
    "fastvideo": Convention(_capped, _similarity(_gaussian(ZEROS), 0)),
    "skimage": Convention(psnr, _similarity(_box(7, MIRROR), 3, 49 / 48)),
}
