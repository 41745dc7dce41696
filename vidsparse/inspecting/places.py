"""From blocks to places: which tokens of the video a query tile reads, and at which level."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.geometry import token_order
from vidsparse.grid import TokenGrid
from vidsparse.plan import SKIP, BlockPlan

Volume = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeadPlan:
    """Of one head, on the CPU. levels: int8 [nq, nk], as `BlockPlan.levels`; order_q, order_k:
    int64 [S], as there, or None."""

    levels: Tensor
    order_q: Tensor | None = None
    order_k: Tensor | None = None

    @classmethod
    def of(cls, plan: BlockPlan, head: int) -> HeadPlan:
        """Of batch item 0."""
        orders = (None if x is None else x[0, head].cpu() for x in (plan.order_q, plan.order_k))
        return cls(plan.levels[0, head].cpu().clone(), *orders)


@dataclass(frozen=True)
class Places:
    """A grid in the order of a layout. cuts: blocks of queries and of keys.

    inverse_q, inverse_k: int64 [S], position among the queries and the keys of each token.
    """

    grid: TokenGrid
    inverse_q: Tensor
    inverse_k: Tensor
    cuts: tuple[Blocks, Blocks]

    @classmethod
    def of(cls, grid: TokenGrid, layout: object, cuts: tuple[Blocks, Blocks]) -> Places:
        """In the order that all heads share."""
        inverse = token_order(grid, layout)[1]
        return cls(grid, inverse, inverse, cuts)

    def under(self, plan: HeadPlan) -> Places:
        """In the orders of one head."""
        inverse_q, inverse_k = (
            inverse if order is None else order.argsort()[inverse]
            for inverse, order in ((self.inverse_q, plan.order_q), (self.inverse_k, plan.order_k))
        )
        return replace(self, inverse_q=inverse_q, inverse_k=inverse_k)

    def tile(self, query: tuple[int, int, int]) -> int:
        """The query block that holds the token at frame, row, column."""
        frame, row, column = query
        raster = (frame * self.grid.height + row) * self.grid.width + column
        at = self.inverse_q[self.grid.video_start + raster]
        return int(self.cuts[0].owner[at])

    def tokens(self, tile: int) -> npt.NDArray[np.bool_]:
        """bool [frames, height, width]: the tokens of a query block."""
        found: npt.NDArray[np.bool_] = (
            self._volume((self.cuts[0].owner == tile)[self.inverse_q]) != 0
        )
        return found

    def levels(self, levels: Tensor, rest: int, tile: int) -> Volume:
        """int [frames, height, width]: the level at which a query block reads every video token.

        levels: [nq, nk] of one head. `rest` where the plan does not list the block, as the plan
        has it: the level of the centroid, or SKIP.
        """
        row = levels[tile].long()
        row = torch.where(row == SKIP, OMITTED if rest != SKIP else SKIP, row)
        return self._volume(row[self.cuts[1].owner][self.inverse_k])

    def _volume(self, by_token: Tensor) -> Volume:
        """[frames, height, width] of values of all tokens."""
        grid = self.grid
        raster = by_token[grid.video_start : grid.video_start + grid.video_tokens]
        found: Volume = raster.long().reshape(grid.frames, grid.height, grid.width).numpy()
        return found


OMITTED = -2
"""Code of a block that is not listed and still gives its centroid."""


def frame_of(latent: int, latents: int, frames: int) -> int:
    """The video frame that shows a latent frame: the last that it covers, 0 for the first."""
    return round(latent * (frames - 1) / max(1, latents - 1))
