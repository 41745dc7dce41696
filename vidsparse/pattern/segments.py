"""Segments: the key blocks in the query block's own piece of the sequence.

Source: PBS-Attn (arXiv 2510.21270), which keeps the segment within which it sorts keys (layout
`keysort`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.config import require
from vidsparse.places import Places
from vidsparse.plan import StepContext


@dataclass(frozen=True)
class Params:
    """segment: tokens, >= 1, counted from the first of the video in the order of the layout."""

    name: str = "segments"
    segment: int = 256
    of_video: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.segment >= 1, "pattern.segment", self.segment, "an integer >= 1")


def settings(places: Places, density: float, params: Params) -> Sequence[Params]:
    """Itself."""
    return (params,)


def blocks(places: Places, phase: int, params: Params) -> Tensor:
    """bool [nq, nk]: blocks of the video that have tokens in a segment of the row."""
    runs = []
    for cut in (places.q_blocks, places.k_blocks):
        first = cut.start - places.grid.video_start
        inside = (first >= 0) & (first < places.grid.video_tokens)
        last = torch.where(inside, (first + cut.count - 1) // params.segment, -1)
        runs.append((torch.where(inside, first // params.segment, 0), last))
    (q_first, q_last), (k_first, k_last) = runs
    return (q_first[:, None] <= k_last) & (k_first <= q_last[:, None])


def phase(context: StepContext | None, params: Params) -> int:
    """The same always."""
    return 0
