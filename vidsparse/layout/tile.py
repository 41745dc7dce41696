"""Tile order: the video is cut into 3-D tiles, the tokens of a tile stand together.

Tiles follow each other as a snake (neighbours in the sequence are neighbours in the video), so that
a block stays compact also where the grid is no multiple of the tile and blocks straddle two tiles.
Inside a tile the order is Morton (Z-order) or Hilbert, so that also pairs, quadruples, ... of
consecutive tokens, which pooled levels average, are compact. Tile shapes: STA (arXiv 2502.04507)
uses 6x8x8, DraftAttention (arXiv 2505.14708) 1x8x16, PISA 1x8x8.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vidsparse import curves
from vidsparse.config import require
from vidsparse.grid import TokenGrid

INNER = ("raster", "morton", "hilbert")
MAX_TILE = 1 << 20


@dataclass(frozen=True)
class Params:
    """tile: frames, rows, columns of a tile, in tokens >= 1, 2^20 tokens together at most.

    inner: raster | morton | hilbert.
    """

    name: str = "tile"
    tile: tuple[int, ...] = (2, 8, 8)
    inner: str = "morton"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", tuple(self.tile))
        ok = len(self.tile) == 3 and min(self.tile) >= 1 and math.prod(self.tile) <= MAX_TILE
        allowed = f"three integers >= 1 (frames, rows, columns), a product of at most {MAX_TILE:,}"
        require(ok, "layout.tile", self.tile, allowed)
        require(self.inner in INNER, "layout.inner", self.inner, ", ".join(INNER))


def video_order(grid: TokenGrid, params: Params) -> Tensor:
    """Tokens sorted by (snake position of their tile, position inside the tile)."""
    axes = (grid.frames, grid.height, grid.width)
    coords = torch.meshgrid(*(torch.arange(n) for n in axes), indexing="ij")
    tiles = [-(-n // t) for n, t in zip(axes, params.tile, strict=True)]
    tile = [c // t for c, t in zip(coords, params.tile, strict=True)]
    inside = [c % t for c, t in zip(coords, params.tile, strict=True)]
    row = tile[0] * tiles[1] + torch.where(tile[0] % 2 == 0, tile[1], tiles[1] - 1 - tile[1])
    column = torch.where(row % 2 == 0, tile[2], tiles[2] - 1 - tile[2])
    area = params.tile[0] * params.tile[1] * params.tile[2]
    key = _rank(params)[tuple(inside)] + area * (row * tiles[2] + column)
    return torch.argsort(key.flatten())


def _rank(params: Params) -> Tensor:
    """int64 [tile]: the position of each token inside a full tile; partial tiles keep the order."""
    t, h, w = params.tile
    area = t * h * w
    rank = torch.arange(area)
    if params.inner != "raster":
        curve = curves.morton if params.inner == "morton" else curves.hilbert
        rank[curve((t, h, w))] = torch.arange(area)
    return rank.view(params.tile)
