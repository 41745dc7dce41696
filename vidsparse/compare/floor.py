"""What a lossy file alone costs: the PSNR between a clip and itself after its codec.

Codecs add noise and remove differences, so a PSNR measured on lossy files can be 9 dB too low or 5
dB too high, and no correction is possible; the floor says how much of a figure can be the codec's.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import cv2
import numpy as np

from vidsparse.quality.frames import Clip, Frame, iter_frames, write_preview
from vidsparse.quality.metrics import psnr

HEAD = 1 << 18
"""Bytes of a file in which an x264 stream names its settings."""
USUAL_CRF = 25.0
"""Of a stream that names none: what imageio's default quality 5 means."""


@dataclass(frozen=True)
class Floor:
    """psnr: pooled, in dB (inf: the codec lost nothing). exact: against the lossless frames; else
    guessed by encoding the decoded frames again, which is optimistic by some dB."""

    psnr: float
    exact: bool


def exact(original: Clip, lossy: Clip) -> Floor | None:
    """Of a lossy file, against the clip that it was made from; None if it is enlarged or cut."""
    try:
        return Floor(_pooled(iter_frames(original), iter_frames(lossy)), True)
    except ValueError:
        return None


def guessed(lossy: Clip) -> Floor:
    """Floor of a lossy clip whose original is not at hand."""
    with tempfile.TemporaryDirectory(prefix="vidsparse-") as folder:
        again = Path(folder) / "again.mp4"
        quality = min(10.0, max(1.0, 10 * (1 - _crf(lossy.path) / 51)))
        write_preview(again, _even(lossy), lossy.fps or 25, quality=quality)
        return Floor(_pooled(_even(lossy), iter_frames(again)), False)


def _even(clip: Clip) -> Iterator[Frame]:
    """Frames without the odd last row and column, which yuv420p does not have."""
    for frame in iter_frames(clip):
        height, width = (side - side % 2 for side in frame.shape[:2])
        yield np.ascontiguousarray(frame[:height, :width])


def _crf(path: Path) -> float:
    with path.open("rb") as stream:
        found = re.search(rb"\bcrf=(\d+\.?\d*)", stream.read(HEAD))
    return float(found[1]) if found else USUAL_CRF


def _pooled(x: Iterator[Frame], y: Iterator[Frame]) -> float:
    """PSNR of the MSE over all frames. Raises ValueError for frames that do not pair up."""
    total = values = 0
    for a, b in zip_longest(x, y):
        if a is None or b is None or a.shape != b.shape:
            raise ValueError("two clips of unlike size or length")
        difference = cv2.absdiff(a, b).astype(np.int32)
        total += int(np.sum(difference * difference, dtype=np.int64))
        values += difference.size
    if not values:
        raise ValueError("a clip without frames")
    return psnr(total / values)
