"""The video of the report page: reference, test and their difference stacked in one file.

One file cannot lose its synchrony: the page draws the three parts of every decoded frame. The
difference is eight times the absolute one, made from the frames that were measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from vidsparse.compare.comparison import Row
from vidsparse.quality.frames import Frame, enlarge, enlargement, iter_frames, write_seekable

GAIN = 8
SMALL = 320
"""Clips whose longer side is shorter are enlarged by whole numbers."""
FPS = 16.0
"""Of clips that do not say."""


@dataclass(frozen=True)
class Views:
    """The file, and size of one of the three views in it."""

    path: Path
    width: int
    height: int


def write_views(path: Path, row: Row, widest: int) -> Views:
    """Write the video of one row, no view wider than `widest` pixels."""
    metrics = row.measured.metrics
    scale = enlargement(metrics.height, metrics.width, SMALL)
    width, height = metrics.width * scale, metrics.height * scale
    if width > widest:
        width, height = widest, max(2, round(height * widest / width))
    width, height = width + width % 2, height + height % 2
    write_seekable(path, _stacked(row, scale, (width, height)), metrics.fps or FPS)
    return Views(path, width, height)


def _stacked(row: Row, scale: int, size: tuple[int, int]) -> Iterator[Frame]:
    count = row.measured.metrics.n_frames
    pairs = zip(iter_frames(row.reference.clip), iter_frames(row.test.clip), strict=False)
    for _, (x, y) in zip(range(count), pairs, strict=False):
        difference = cv2.convertScaleAbs(cv2.absdiff(x, y), alpha=GAIN)
        views = (np.asarray(difference) if n == 2 else (x, y)[n] for n in range(3))
        yield np.ascontiguousarray(np.concatenate([_sized(view, scale, size) for view in views]))


def _sized(view: Frame, scale: int, size: tuple[int, int]) -> Frame:
    """Enlarged by a whole number where that is the size, else resampled."""
    view = enlarge(view, scale)
    if (view.shape[1], view.shape[0]) == size:
        return view
    return np.asarray(cv2.resize(view, size, interpolation=cv2.INTER_AREA), np.uint8)
