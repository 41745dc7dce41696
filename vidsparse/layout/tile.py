"""Tile order: the video is cut into 3-D tiles, the tokens of a tile stand together.

Tiles follow each other as a snake (neighbours in the sequence are neighbours in the video), so that
a block stays compact also where the grid is no multiple of the tile and blocks straddle two tiles.
Inside a tile the order is Morton (Z-order) or Hilbert, so that also pairs, quadruples, ... of
consecutive tokens, which pooled levels average, are compact. Tile shapes: STA (arXiv 2502.04507)
uses 6x8x8, DraftAttention (arXiv 2505.14708) 1x8x16, PISA 1x8x8.

With `ragged`, blocks end with their tile, as DraftAttention has them: none holds tokens of two
tiles, and those of tiles that the border cuts are shorter, with means over the tokens that there
are. On a GPU short blocks are read beside the full ones, by the merge of the rest. The published
code takes grids alone that its tile divides; there both are the same.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vidsparse import curves
from vidsparse.config import require
from vidsparse.grid import TokenGrid


@dataclass(frozen=True)
class Params:
    """tile: frames, rows, columns of a tile, in tokens >= 1, 2^20 tokens together at most.

    inner: raster | morton | hilbert. ragged: whether every block ends with its tile; false: all
    blocks but the last are full.
    """

    name: str = "tile"
    tile: tuple[int, ...] = (2, 8, 8)
    inner: str = "morton"
    ragged: bool = False
    per_head: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", tuple(self.tile))
        for key, allowed in curves.tile_faults(self.tile, self.inner).items():
            require(False, f"layout.{key}", getattr(self, key), allowed)


def video_order(grid: TokenGrid, params: Params) -> Tensor:
    """Tokens sorted by (snake position of their tile, position inside the tile)."""
    return curves.tiles((grid.frames, grid.height, grid.width), params.tile, params.inner)


def pieces(grid: TokenGrid, params: Params) -> Tensor:
    """int64 [tiles]: tokens of each tile, in the order above."""
    return curves.tile_counts((grid.frames, grid.height, grid.width), params.tile)
