"""PSNR, SSIM and temporal measures of a test clip against a reference clip, pair by pair of frames.

Peak 255, float64 throughout; sums of squared and of absolute differences are exact. ``PROTOCOL``
states the conventions, without which the numbers compare with nothing: published PSNR and SSIM of
video models follow several others.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from math import inf, isfinite, log10
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from vidsparse.quality.frames import Clip, Frame, iter_frames, open_clip
from vidsparse.quality.ssim import SSIM_SIDE, similarity

PSNR_CAP = 100.0

PROTOCOL = {
    "peak": 255,
    "planes": "RGB, 8 bit",
    "luma": "Y = 0.299 R + 0.587 G + 0.114 B (BT.601), not rounded",
    "psnr_pool": "10 log10(peak^2 / mean over frames of MSE)",
    "psnr_mean": "mean over frames of min(PSNR, cap)",
    "psnr_cap_db": PSNR_CAP,
    "ssim": "Gaussian 11x11, sigma 1.5, population weights, valid positions, mean over R, G, B",
    "tf": "1 - mean |x[t+1] - x[t]| / 255",
    "resize": "never",
}


@dataclass(frozen=True)
class FrameMetrics:
    """One frame pair. Differences are in 8-bit steps (0..255), PSNR in dB (inf when identical).

    `flick_ref` and `flick_test` are mean |frame t+1 - frame t| of each arm, None for the last
    frame; `changed_frac` is the share of channel values that differ at all.
    """

    t: int
    mse: float
    psnr: float
    mse_y: float
    psnr_y: float
    ssim: float
    ssim_y: float
    max_abs: int
    changed_frac: float
    flick_ref: float | None
    flick_test: float | None


@dataclass(frozen=True)
class ClipMetrics:
    """A clip pair. PSNR in dB (inf when identical), SSIM in [-1, 1], TF in [0, 1].

    psnr_pool: of the MSE averaged over frames, the headline. psnr_mean: mean of min(PSNR_t, 100);
    n_identical frames have MSE 0, n_capped are above 100 dB (the identical ones among them).
    psnr_y: pooled, on luma. ssim, ssim_y: means over frames; ssim_min: the lowest frame.
    worst_frame: highest MSE. worst_second: frames [start, stop) of the second with the lowest
    pooled PSNR. psnr_slope: least-squares slope of min(PSNR_t, 100), dB per second; negative is
    drift. tf_*: temporal flickering 1 - mean_t flick_t / 255 and tf_diff = tf_test - tf_ref.
    flicker_ratio: mean flick of test / of reference. None: what needs an fps, two frames or, for
    the ratio, a reference that changes, without it.
    """

    n_frames: int
    height: int
    width: int
    fps: float | None
    mse: float
    psnr_pool: float
    psnr_mean: float
    n_identical: int
    n_capped: int
    psnr_min: float
    worst_frame: int
    worst_second: tuple[int, int] | None
    psnr_worst_second: float | None
    psnr_slope: float | None
    mse_y: float
    psnr_y: float
    ssim: float
    ssim_min: float
    ssim_y: float
    tf_ref: float | None
    tf_test: float | None
    tf_diff: float | None
    flicker_ratio: float | None
    frames: tuple[FrameMetrics, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, `frames` as a list of dicts, `protocol`; infinite PSNR is None."""
        fields = asdict(self)
        fields["frames"] = [_without_infinity(frame) for frame in fields["frames"]]
        return {**_without_infinity(fields), "protocol": dict(PROTOCOL)}


def compare_clips(
    reference: Any, test: Any, *, fps: float | None = None, workers: int = 1
) -> ClipMetrics:
    """Measure `test` against `reference`; both are whatever `frames.iter_frames` takes.

    `fps` > 0 serves slope and worst second; by default it is what the files say. Raises ValueError
    when the files' fps differ, when there is no frame, and as `frame_pairs` does.
    """
    reference, test, fps = opened(reference, test, fps)
    rows = list(frame_pairs(reference, test, also=size_of, workers=workers))
    return summarise(tuple(frame for frame, _ in rows), rows[0][1] if rows else (0, 0), fps)


def size_of(x: Frame, y: Frame) -> tuple[int, int]:
    """(height, width) of a pair of frames; for the `also` of `frame_pairs`."""
    return x.shape[0], x.shape[1]


def opened(reference: Any, test: Any, fps: float | None) -> tuple[Any, Any, float | None]:
    """Paths opened as clips, and the frame rate of both: `fps`, or what the files say."""
    reference, fps_ref = _opened(reference)
    test, fps_test = _opened(test)
    if fps is None:
        if fps_ref and fps_test and fps_ref != fps_test:
            raise ValueError(
                f"the reference has {fps_ref:g} fps, the test {fps_test:g}; say which counts: fps"
            )
        return reference, test, fps_ref or fps_test or None
    if not (isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a positive number, got {fps!r}")
    return reference, test, float(fps)


def frame_pairs(
    reference: Any,
    test: Any,
    *,
    also: Callable[[Frame, Frame], Any] | None = None,
    workers: int = 1,
    trim: bool = False,
) -> Iterator[tuple[FrameMetrics, Any]]:
    """Measure frame by frame, in order. Yields the measures and what `also` says of the pair.

    Streams: two frames per arm in memory, and with `workers` threads one more each. trim: stop at
    the end of the shorter clip. Raises ValueError when frame counts or sizes differ, or when a side
    is below 11 pixels.
    """
    pairs = _pairs(iter_frames(reference, "reference"), iter_frames(test, "test"), trim)
    ahead = chain(pairs, [None])
    current = next(ahead)
    waiting: deque[Future[tuple[FrameMetrics, Any]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for t, after in enumerate(ahead):
                assert current is not None  # only the last one is
                waiting.append(pool.submit(_frame, t, current, after, also))
                current = after
                if len(waiting) >= workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def psnr(mse: float) -> float:
    """10 log10(255^2 / mse) in dB; inf for 0. `mse` >= 0 in squared 8-bit steps."""
    return 10 * log10(255**2 / mse) if mse > 0 else inf


def ssim(reference: Any, test: Any) -> tuple[float, float]:
    """SSIM of one pair of frames `(H, W, 3)`: (mean over R, G and B, on luma), each in [-1, 1].

    Wang et al. 2004: mean over valid positions of (2 mu_x mu_y + C1)(2 c + C2) /
    ((mu_x^2 + mu_y^2 + C1)(v_x + v_y + C2)), moments weighted by an 11x11 Gaussian of sigma 1.5.
    Raises ValueError below 11 pixels and for sizes that differ.
    """
    ((x, y),) = _pairs(iter_frames([reference], "reference"), iter_frames([test], "test"))
    return similarity(x, y)[:2]


def _frame(
    t: int,
    pair: tuple[Frame, Frame],
    after: tuple[Frame, Frame] | None,
    also: Callable[[Frame, Frame], Any] | None,
) -> tuple[FrameMetrics, Any]:
    """Measures of one pair of frames; after: the next pair, None at the end."""
    x, y = pair
    flicks = [
        float(np.mean(cv2.absdiff(b, a), dtype=np.float64))
        for a, b in zip(pair, after or (), strict=False)
    ]
    flick_ref, flick_test = flicks or (None, None)
    measures = FrameMetrics(t=t, flick_ref=flick_ref, flick_test=flick_test, **_measure(x, y))
    return measures, also(x, y) if also else None


def _measure(x: Frame, y: Frame) -> dict[str, Any]:
    difference = cv2.absdiff(x, y).astype(np.int32)
    mse = int(np.sum(difference * difference, dtype=np.int64)) / difference.size
    ssim_rgb, ssim_y, mse_y = similarity(x, y)
    return {
        "mse": mse,
        "psnr": psnr(mse),
        "mse_y": mse_y,
        "psnr_y": psnr(mse_y),
        "ssim": ssim_rgb,
        "ssim_y": ssim_y,
        "max_abs": int(difference.max()),
        "changed_frac": int(np.count_nonzero(difference)) / difference.size,
    }


def _opened(source: Any) -> tuple[Any, float | None]:
    if isinstance(source, str) or hasattr(source, "__fspath__"):
        source = open_clip(source)
    return source, source.fps if isinstance(source, Clip) else None


def _pairs(
    reference: Iterator[Frame], test: Iterator[Frame], trim: bool = False
) -> Iterator[tuple[Frame, Frame]]:
    for t, (x, y) in enumerate(zip_longest(reference, test)):
        if trim and (x is None or y is None):
            return
        if x is None or y is None:
            longer = t + 1 + sum(1 for _ in (test if x is None else reference))
            n_ref, n_test = (t, longer) if x is None else (longer, t)
            raise ValueError(f"the reference has {n_ref} frames, the test has {n_test}")
        _check_pair(x, y)
        yield x, y


def _check_pair(x: Frame, y: Frame) -> None:
    size_x, size_y = (f"{frame.shape[0]}x{frame.shape[1]}" for frame in (x, y))
    if x.shape != y.shape:
        raise ValueError(
            f"the reference is {size_x}, the test {size_y} (height x width); nothing is resized"
        )
    if min(x.shape[:2]) < SSIM_SIDE:
        raise ValueError(f"SSIM needs frames of at least {SSIM_SIDE}x{SSIM_SIDE}, got {size_x}")


def summarise(
    frames: tuple[FrameMetrics, ...], size: tuple[int, int], fps: float | None
) -> ClipMetrics:
    """The clip's figures from those of all its frames, in order; size: (height, width).

    Raises ValueError without a frame.
    """
    if not frames:
        raise ValueError("expected clips with at least one frame, got two without any")
    mse = np.array([frame.mse for frame in frames])
    capped = np.array([min(frame.psnr, PSNR_CAP) for frame in frames])
    ssim_rgb = [frame.ssim for frame in frames]
    mean_mse, mse_y = float(mse.mean()), float(np.mean([frame.mse_y for frame in frames]))
    flick_ref = [frame.flick_ref for frame in frames if frame.flick_ref is not None]
    flick_test = [frame.flick_test for frame in frames if frame.flick_test is not None]
    moving = bool(flick_ref)
    mean_ref, mean_test = (float(np.mean(f)) if moving else 0.0 for f in (flick_ref, flick_test))
    second = _worst_second(mse, fps) if fps else None
    return ClipMetrics(
        n_frames=len(frames),
        height=size[0],
        width=size[1],
        fps=fps,
        mse=mean_mse,
        psnr_pool=psnr(mean_mse),
        psnr_mean=float(capped.mean()),
        n_identical=sum(frame.mse == 0 for frame in frames),
        n_capped=sum(frame.psnr > PSNR_CAP for frame in frames),
        psnr_min=min(frame.psnr for frame in frames),
        worst_frame=int(mse.argmax()),
        worst_second=second,
        psnr_worst_second=psnr(float(mse[slice(*second)].mean())) if second else None,
        psnr_slope=_slope(capped) * fps if fps and moving else None,
        mse_y=mse_y,
        psnr_y=psnr(mse_y),
        ssim=float(np.mean(ssim_rgb)),
        ssim_min=min(ssim_rgb),
        ssim_y=float(np.mean([frame.ssim_y for frame in frames])),
        tf_ref=1 - mean_ref / 255 if moving else None,
        tf_test=1 - mean_test / 255 if moving else None,
        tf_diff=(mean_ref - mean_test) / 255 if moving else None,
        flicker_ratio=mean_test / mean_ref if mean_ref else None,
        frames=frames,
    )


def _worst_second(mse: npt.NDArray[np.float64], fps: float) -> tuple[int, int]:
    length = min(len(mse), max(1, round(fps)))
    start = int(np.convolve(mse, np.ones(length), mode="valid").argmax())
    return start, start + length


def _slope(values: npt.NDArray[np.float64]) -> float:
    """Least-squares slope of `values` over their index; at least two values."""
    t = np.arange(len(values)) - (len(values) - 1) / 2
    return float(t @ values / (t @ t))


def _without_infinity(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in fields.items()}
