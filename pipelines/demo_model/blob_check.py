"""Judge a video with OpenCV: the colour of the moving blob and the direction in which its centroid
goes.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from clips import COLOURS

SATURATION_FLOOR = 0.45  # objects are above 0.85, backgrounds below 0.25
MINIMUM_AREA_PX = 20
MINIMUM_TRAVEL_PX = 4.0


@dataclass(frozen=True)
class Verdict:
    """What was seen; None where no blob, or no clear motion, was found."""

    colour: str | None
    direction: str | None
    travel_px: tuple[float, float]
    frames_with_blob: int


def colour_name(hue_degrees: float) -> str:
    """The object colour whose hue (degrees, 0..360) is nearest on the circle."""
    hues = {
        name: float(cv2.cvtColor(np.float32([[rgb]]), cv2.COLOR_RGB2HSV)[0, 0, 0])
        for name, rgb in COLOURS.items()
    }
    return min(hues, key=lambda name: abs((hue_degrees - hues[name] + 180) % 360 - 180))


def largest_blob(frame: np.ndarray) -> tuple[np.ndarray, tuple[float, float]] | None:
    """Mask [H, W] and centroid (x, y) px of the largest saturated blob of an RGB frame, float32 in
    0..1.
    """
    saturation = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV)[..., 1]
    mask = (saturation > SATURATION_FLOOR).astype(np.uint8)
    count, labels, stats, centroids = cv2.connectedComponentsWithStats(mask, connectivity=8)
    if count < 2:
        return None
    best = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    if stats[best, cv2.CC_STAT_AREA] < MINIMUM_AREA_PX:
        return None
    return labels == best, (float(centroids[best][0]), float(centroids[best][1]))


def judge(video: np.ndarray) -> Verdict:
    """Judge an RGB video [F, H, W, 3], float in 0..1 or uint8.

    Colour: the circular mean hue over all blob pixels, weighted by saturation. Direction: the slope
    of a straight line through the centroids, times the number of frames; the longer axis must move
    MINIMUM_TRAVEL_PX at least and twice as far as the other.
    """
    if video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"expected a video of shape [F, H, W, 3], got {video.shape}")
    frames = video.astype(np.float32) / (255.0 if video.dtype == np.uint8 else 1.0)
    times, centres, hue_vector = [], [], np.zeros(2)
    for time, frame in enumerate(frames):
        blob = largest_blob(np.ascontiguousarray(frame))
        if blob is None:
            continue
        mask, centre = blob
        hsv = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2HSV)[mask]
        angle, weight = np.deg2rad(hsv[:, 0]), hsv[:, 1]
        hue_vector += np.array([(np.cos(angle) * weight).sum(), (np.sin(angle) * weight).sum()])
        times.append(time)
        centres.append(centre)
    if len(times) < max(2, len(frames) // 2):
        return Verdict(None, None, (0.0, 0.0), len(times))
    colour = colour_name(float(np.rad2deg(np.arctan2(hue_vector[1], hue_vector[0])) % 360))
    slope = np.polyfit(times, np.array(centres), 1)[0]
    travel = (float(slope[0] * (len(frames) - 1)), float(slope[1] * (len(frames) - 1)))
    return Verdict(colour, direction_name(travel), travel, len(times))


def direction_name(travel_px: tuple[float, float]) -> str | None:
    """left, right, up or down for a travel (x, y) in px, None where it is too short or too
    slanted.
    """
    dx, dy = travel_px
    longer, shorter = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if longer < MINIMUM_TRAVEL_PX or longer < 2 * shorter:
        return None
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"
