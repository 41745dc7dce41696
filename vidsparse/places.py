"""Places: where the tokens of every block stand in the video."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid


@dataclass(frozen=True, eq=False)
class Places:
    """Of the blocks of a grid in a token order; all tensors are on the CPU.

    order: int64 [grid.tokens], raster position of the token at each position of the sequence.
    """

    grid: TokenGrid
    order: Tensor
    q_blocks: Blocks
    k_blocks: Blocks

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Frames, rows, columns of the video."""
        return self.grid.frames, self.grid.height, self.grid.width

    @cached_property
    def raster(self) -> Tensor:
        """int64 [tokens]: index of each position's token in the raster video; -1: not video."""
        index = self.order - self.grid.video_start
        return index.masked_fill((index < 0) | (index >= self.grid.video_tokens), -1)

    def tiles(self, tile: tuple[int, ...]) -> tuple[int, int, int]:
        """Numbers of tiles of frames, rows, columns that cover the video, the last ones cut."""
        frames, rows, columns = (-(-n // t) for n, t in zip(self.sizes, tile, strict=True))
        return frames, rows, columns

    def held(self, blocks: Blocks, tile: tuple[int, ...]) -> Tensor:
        """bool [n, tiles of frames, of rows, of columns]: of which tiles a block holds tokens."""
        counts = self.tiles(tile)
        video = self.raster >= 0
        place = torch.unravel_index(self.raster[video], self.sizes)
        in_tiles = (axis // t for axis, t in zip(place, tile, strict=True))
        out = torch.zeros(len(blocks), *counts, dtype=torch.bool)
        out[(blocks.owner[video], *in_tiles)] = True
        return out

    def share(self, blocks: Tensor) -> float:
        """Share of all pairs of tokens in a map of blocks, bool [..., nq, nk]."""
        rows, columns = self.q_blocks.count.double(), self.k_blocks.count.double()
        pairs = (blocks.double() @ columns) @ rows
        return float(pairs.mean() / (rows.sum() * columns.sum()))
