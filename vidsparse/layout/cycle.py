"""Cycle: layers take turns in three orders of the video; blocks are strips, columns, cells.

    layer mod 3 = 0   frames:   raster order, a block lies in a few frames
                  1   columns:  tiles of all frames, `cell` rows and columns wide
                  2   cells:    tiles of `tile` frames, rows and columns

Source: VMoBA (arXiv 2506.23858), where a chunk is a 7th, 40th or 60th of the video and the grid
must divide; here a chunk is a block of keys, and no size divides anything. Queries and keys stand
in the same order; it follows from the layer alone, and is gathered per call as orders of heads.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse import curves
from vidsparse.config import require
from vidsparse.draft import Draft
from vidsparse.grid import TokenGrid


@dataclass(frozen=True)
class Params:
    """cell: rows, columns of a column. tile: frames, rows, columns of a cell. In tokens, >= 1."""

    name: str = "cycle"
    cell: tuple[int, ...] = (2, 4)
    tile: tuple[int, ...] = (4, 4, 8)
    per_head: ClassVar[bool] = True
    shared: ClassVar[bool] = True
    refresh: ClassVar[int] = 1
    axes: ClassVar[int] = 0

    def __post_init__(self) -> None:
        for key in ("cell", "tile"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        ok = len(self.cell) == 2 and min(self.cell) >= 1
        require(ok, "layout.cell", self.cell, "two integers >= 1 (rows, columns)")
        for key, allowed in curves.tile_faults(self.tile, "morton").items():
            require(False, f"layout.{key}", getattr(self, key), allowed)


def video_order(grid: TokenGrid, params: Params) -> Tensor:
    """The order below those of the layers: raster."""
    return torch.arange(grid.video_tokens)


def head_orders(draft: Draft, grid: TokenGrid, params: Params) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries and of keys, the same, int64 [B, H, S], and bool [B, H]: all but the raster."""
    turn = 0 if draft.context is None else draft.context.layer % 3
    heads = draft.q.shape[:2]
    order = turned(grid, params, turn, draft.q.device).expand(*heads, -1)
    who = torch.full(heads, turn > 0, dtype=torch.bool, device=draft.q.device)
    return order, order, who


@lru_cache(maxsize=16)
def turned(grid: TokenGrid, params: Params, turn: int, device: torch.device) -> Tensor:
    """int64 [S]: the order of every third layer, on a device."""
    with torch.inference_mode(False):
        order = torch.arange(grid.tokens)
        if turn:
            tile = (grid.frames, *params.cell) if turn == 1 else params.tile
            inner = "raster" if turn == 1 else "morton"
            moved = curves.tiles((grid.frames, grid.height, grid.width), tile, inner)
            order[grid.video_start : grid.video_start + len(moved)] = moved + grid.video_start
        return order.to(device)
