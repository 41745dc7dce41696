"""From blocks to places: which tokens of the video a query tile reads, and at which level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.geometry import token_order
from vidsparse.grid import TokenGrid
from vidsparse.plan import SKIP

Volume = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Places:
    """A grid in the order of a layout. cuts: blocks of queries and of keys."""

    grid: TokenGrid
    inverse: Tensor
    cuts: tuple[Blocks, Blocks]

    @classmethod
    def of(cls, grid: TokenGrid, layout: object, cuts: tuple[Blocks, Blocks]) -> Places:
        return cls(grid, token_order(grid, layout)[1], cuts)

    def tile(self, query: tuple[int, int, int]) -> int:
        """The query block that holds the token at frame, row, column."""
        frame, row, column = query
        raster = (frame * self.grid.height + row) * self.grid.width + column
        at = self.inverse[self.grid.video_start + raster]
        return int(self.cuts[0].owner[at])

    def tokens(self, tile: int) -> npt.NDArray[np.bool_]:
        """bool [frames, height, width]: the tokens of a query block."""
        found: npt.NDArray[np.bool_] = self._volume(self.cuts[0].owner == tile) != 0
        return found

    def levels(self, levels: Tensor, rest: int, tile: int) -> Volume:
        """int [frames, height, width]: the level at which a query block reads every video token.

        levels: [nq, nk] of one head. `rest` where the plan does not list the block, as the plan
        has it: the level of the centroid, or SKIP.
        """
        row = levels[tile].long()
        row = torch.where(row == SKIP, OMITTED if rest != SKIP else SKIP, row)
        return self._volume(row[self.cuts[1].owner])

    def _volume(self, by_place: Tensor) -> Volume:
        """[frames, height, width] of values in layout order."""
        grid = self.grid
        raster = by_place[self.inverse][grid.video_start : grid.video_start + grid.video_tokens]
        found: Volume = raster.long().reshape(grid.frames, grid.height, grid.width).numpy()
        return found


OMITTED = -2
"""Code of a block that is not listed and still gives its centroid."""


def frame_of(latent: int, latents: int, frames: int) -> int:
    """The video frame that shows a latent frame: the last that it covers, 0 for the first."""
    return round(latent * (frames - 1) / max(1, latents - 1))
