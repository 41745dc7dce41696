"""Hilbert order: one generalised 3-D Hilbert curve through the whole video, any size.

Every run of tokens is compact at every length, so blocks need no tile shape and no alignment.
Source: Jenga, PSA and Rectified SpaAttn reorder tokens in this way.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vidsparse import curves
from vidsparse.grid import TokenGrid


@dataclass(frozen=True)
class Params:
    """No settings."""

    name: str = "hilbert"
    per_head: ClassVar[bool] = False


def video_order(grid: TokenGrid, params: Params) -> Tensor:
    """Tokens along the curve of `vidsparse.curves.hilbert`."""
    return curves.hilbert((grid.frames, grid.height, grid.width))
