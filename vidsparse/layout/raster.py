"""Raster order: frame, row, column, as the model has it. Blocks are strips of a few rows."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.grid import TokenGrid


@dataclass(frozen=True)
class Params:
    """No settings."""

    name: str = "raster"
    per_head: ClassVar[bool] = False


def video_order(grid: TokenGrid, params: Params) -> Tensor:
    """The identity."""
    return torch.arange(grid.video_tokens)
