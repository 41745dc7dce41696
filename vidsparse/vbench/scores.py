"""A result file of VBench -> figures per clip, averages, Quality / Semantic / Total.

Its averages are not taken as they are: that of imaging_quality is in 1 / 100 of its per-clip
values, dynamic_degree and human_action give true and false, and subject_consistency averages over
pairs of frames on one GPU but over clips on several. So the average over clips is computed here,
in one unit, and theirs stands beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from vidsparse.vbench.dimensions import DIMENSIONS, PER_CLIP_SCALE, QUALITY_SHARE


@dataclass(frozen=True)
class Judged:
    """A dimension. clips: path of the video -> value, in the unit of the average.

    reported: VBench's own average.
    """

    clips: Mapping[str, float]
    reported: float

    @property
    def average(self) -> float:
        return fmean(self.clips.values())


@dataclass(frozen=True)
class Scores:
    """In 0 .. 1. None: a dimension that it needs is missing."""

    quality: float | None
    semantic: float | None
    total: float | None


def read_results(file: Path) -> dict[str, Judged]:
    """Dimension -> what a result file says. Raises ValueError that names what is wrong with it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as a result of VBench: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file}: expected dimensions of VBench and their results")
    found = {}
    for name, value in content.items():
        if name not in DIMENSIONS:
            raise ValueError(
                f"{file}: {name!r} is no dimension of VBench 0.1.5: {', '.join(DIMENSIONS)}"
            )
        try:
            found[name] = _judged(name, value)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{file}: {name}: {error}") from error
    return found


def scores(averages: Mapping[str, float]) -> Scores:
    """Of the averages by dimension.

    n = weight (x - low) / (high - low). Quality: sum of n over its 7 dimensions by their weights;
    Semantic: likewise over its 9; Total: (4 Quality + Semantic) / 5. The official script counts a
    missing dimension as 0; here there is no score without it.
    """
    quality, semantic = (_group(averages, group) for group in ("quality", "semantic"))
    total = None
    if quality is not None and semantic is not None:
        total = QUALITY_SHARE * quality + (1 - QUALITY_SHARE) * semantic
    return Scores(quality, semantic, total)


def _group(averages: Mapping[str, float], group: str) -> float | None:
    members = {name: one for name, one in DIMENSIONS.items() if one.group == group}
    if members.keys() - averages.keys():
        return None
    return sum(
        one.weight * (averages[name] - one.low) / (one.high - one.low)
        for name, one in members.items()
    ) / sum(one.weight for one in members.values())


def _judged(name: str, value: Any) -> Judged:
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], list)):
        raise ValueError("expected [average, [results of clips]]")
    reported, rows = _number(value[0], "its average"), value[1]
    scale = PER_CLIP_SCALE.get(name, 1.0)
    clips: dict[str, float] = {}
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("video_path"), str):
            raise ValueError("expected a video_path and video_results of every clip")
        path = row["video_path"]
        found = _number(row.get("video_results"), path) / scale
        if clips.setdefault(path, found) != found:
            raise ValueError(f"{path} has two results that differ")
    if not clips:
        raise ValueError("it judged no clip")
    return Judged(clips, reported)


def _number(value: Any, what: str) -> float:
    if not isinstance(value, int | float) or not isfinite(value):  # bool is an int: 1 or 0
        raise ValueError(f"{what} is {value!r}, expected a number")
    return float(value)
