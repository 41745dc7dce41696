"""What follows from the grid and the config alone: token order, blocks, forced blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vidsparse import registry
from vidsparse.blocks import Blocks
from vidsparse.config import Force
from vidsparse.force import forced_blocks
from vidsparse.grid import TokenGrid


@dataclass(frozen=True)
class Geometry:
    """Of one grid and method. order, inverse: as `token_order`; forced: bool [nq, nk]."""

    order: Tensor
    inverse: Tensor
    q_blocks: Blocks
    k_blocks: Blocks
    forced: Tensor


def token_order(grid: TokenGrid, layout: Any) -> tuple[Tensor, Tensor]:
    """Sequence order of a layout and its inverse, int64 [grid.tokens] each; None: as they stand.

    x[order] is the sequence in layout order, x[order][inverse] is x. What is not video keeps its
    place, and no token crosses a cut of the grid.
    """
    order = torch.arange(grid.tokens)
    if layout is None:
        return order, order
    method = registry.method("layout", layout.name)
    for begin, end in pairwise((0, *grid.cuts, grid.frames)):
        first = grid.video_start + begin * grid.height * grid.width
        part = TokenGrid(end - begin, grid.height, grid.width)
        order[first : first + part.tokens] = method.video_order(part, layout) + first
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(grid.tokens)
    return order, inverse


@lru_cache(maxsize=16)
def plan_geometry(
    grid: TokenGrid, layout: Any, force: Force, block_q: int, block_k: int, device: torch.device
) -> Geometry:
    """Order, blocks and forced blocks on a device; a pure function, the last results are kept."""
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        order, inverse = token_order(grid, layout)
        q_blocks, k_blocks = Blocks.cut(grid, block_q), Blocks.cut(grid, block_k)
        own_block = force.own_block and not (layout is not None and layout.per_head)
        force = replace(force, own_block=own_block)
        forced = forced_blocks(force, grid, order, q_blocks, k_blocks)
        order, inverse, forced = (x.to(device) for x in (order, inverse, forced))
        return Geometry(order, inverse, q_blocks, k_blocks, forced)
