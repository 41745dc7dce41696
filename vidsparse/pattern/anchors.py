"""Anchors: every frame reads the frames around it, and some that all read, others in each step.

    frame a reads frame b:  |a - b| <= window,  or  b = step (mod period)

Every step has other anchors, so that over `period` steps each frame has been one: what is global is
tied to no fixed grid of frames. After LVSA (arXiv 2605.31057), of which the paper's words were at
hand and no code: that anchors are whole frames, every `period`-th, and move by one a step, is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.config import require
from vidsparse.places import Places
from vidsparse.plan import StepContext


@dataclass(frozen=True)
class Params:
    """window: frames to both sides, >= 0; -1: the most that `schedule.density` pays for.

    period: frames from one anchor to the next, >= 1.
    """

    name: str = "anchors"
    window: int = -1
    period: int = 8
    of_video: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.window >= -1, "pattern.window", self.window, "an integer >= 0, or -1")
        require(self.period >= 1, "pattern.period", self.period, "an integer >= 1")


def settings(places: Places, density: float, params: Params) -> Sequence[Params]:
    """Itself, or all windows."""
    if params.window >= 0:
        return (params,)
    return [replace(params, window=n) for n in range(places.grid.frames - 1, -1, -1)]


def blocks(places: Places, phase: int, params: Params) -> Tensor:
    """bool [nq, nk]: blocks with any two tokens of which one reads the other."""
    frame = torch.arange(places.grid.frames)
    near = (frame[:, None] - frame).abs() <= params.window
    read = near | (frame % params.period == phase)
    whole = 1, places.grid.height, places.grid.width
    rows, columns = (
        places.held(b, whole).flatten(1).float() for b in (places.q_blocks, places.k_blocks)
    )
    return rows @ read.float() @ columns.T > 0


def phase(context: StepContext | None, params: Params) -> int:
    """Which frames are anchors: the step, in periods."""
    return 0 if context is None else context.step % params.period
