"""Stride: each head takes, of a few orders of the video, the one in which its pattern loses least.

An order of stride p puts token n at (n mod p, n div p):

    raster   p = 1:             frame after frame, for heads that look around in their frame
    row      p = width:         one column of the image after the other
    frame    p = height width:  one place in all frames after the other, for heads that look through
                                time: "token-major" in Sparse VideoGen (arXiv 2502.01776)

Some queries are computed exactly, and with the keys alone that the pattern holds for them in each
order; a head takes the order of the smallest mean squared error, the first of equals. The map that
is profiled is the one that runs. Source: Sparse VideoGen, whose orders are raster and frame, and
the grid of MMInference (arXiv 2504.16083), which adds the row.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.config import require
from vidsparse.draft import Draft
from vidsparse.grid import TokenGrid

STRIDES = ("raster", "row", "frame")


@dataclass(frozen=True)
class Params:
    """strides: orders to choose from, of raster, row, frame, each once.

    rows: queries of a head that are computed, >= 1; they cost rows / tokens of a dense call, and as
    much for every order. refresh: steps for which a choice is kept, >= 1.
    """

    name: str = "stride"
    strides: tuple[str, ...] = ("raster", "frame")
    rows: int = 64
    refresh: int = 1
    per_head: ClassVar[bool] = True
    axes: ClassVar[int] = 0
    by_pattern: ClassVar[bool] = True
    shared: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "strides", tuple(self.strides))
        named = {*self.strides}
        ok = named <= {*STRIDES} and 0 < len(named) == len(self.strides)
        require(ok, "layout.strides", self.strides, f"a list of {', '.join(STRIDES)}, each once")
        require(self.rows >= 1, "layout.rows", self.rows, "an integer >= 1")
        require(self.refresh >= 1, "layout.refresh", self.refresh, "an integer >= 1")


def video_order(grid: TokenGrid, params: Params) -> Tensor:
    """The order below those of the heads: raster."""
    return torch.arange(grid.video_tokens)


def head_orders(draft: Draft, grid: TokenGrid, params: Params) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries and of keys, the same, int64 [B, H, S], and bool [B, H]: who left the raster."""
    device = draft.q.device
    orders, places = candidates(grid, params.strides, device)
    errors = profile(draft, places, drawn(grid, params.rows, device))
    chosen = errors.argmin(-1)
    order = orders.index_select(0, chosen.flatten()).view(*chosen.shape, -1)
    return order, order, chosen != _raster(params.strides)


def _raster(strides: tuple[str, ...]) -> int:
    """Its place among the orders, -1 if it is none of them."""
    return strides.index("raster") if "raster" in strides else -1


@lru_cache(maxsize=16)
def candidates(
    grid: TokenGrid, strides: tuple[str, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """int64 [orders, S] twice: the token at each position, and the position of each token."""
    with torch.inference_mode(False):
        sizes = {"raster": 1, "row": grid.width, "frame": grid.height * grid.width}
        orders = torch.arange(grid.tokens).repeat(len(strides), 1)
        n = torch.arange(grid.video_tokens)
        for order, name in zip(orders, strides, strict=True):
            moved = torch.argsort(n % sizes[name], stable=True)
            order[grid.video_start : grid.video_start + len(n)] = moved + grid.video_start
        places = torch.argsort(orders, -1)
        return orders.to(device), places.to(device)


@lru_cache(maxsize=16)
def drawn(grid: TokenGrid, rows: int, device: torch.device) -> Tensor:
    """int64 [rows]: tokens of the video, at random, the same ones every time."""
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(0)
        some = torch.randperm(grid.video_tokens, generator=generator)[:rows]
        return (some + grid.video_start).to(device)


def profile(draft: Draft, places: Tensor, rows: Tensor) -> Tensor:
    """float32 [B, H, orders]: mean squared error of rows that read what is forced in an order."""
    assert draft.forced is not None, "of every call"
    q_owner, k_owner = (owner_on(b, places.device) for b in (draft.q_blocks, draft.k_blocks))
    kept = [
        draft.forced.index_select(
            0, q_owner.index_select(0, place.index_select(0, rows))
        ).index_select(1, k_owner.index_select(0, place))
        for place in places.unbind()
    ]  # bool [rows, S] each
    wide = torch.float64 if draft.q.dtype == torch.float64 else torch.float32
    found = []
    for b in range(draft.q.shape[0]):
        for h in range(draft.q.shape[1]):
            q, k, v = (x.select(0, b).select(0, h) for x in (draft.q, draft.k, draft.v))
            score = (q.index_select(0, rows).to(wide) * draft.scale) @ k.to(wide).mT
            exact = score.softmax(-1) @ v.to(wide)
            for mask in kept:
                out = score.masked_fill(mask.logical_not(), float("-inf")).softmax(-1) @ v.to(wide)
                found.append((out - exact).square().mean())
    shape = *draft.q.shape[:2], len(kept)
    return torch.stack(found).view(shape).float()


@lru_cache(maxsize=16)
def owner_on(blocks: Blocks, device: torch.device) -> Tensor:
    """int64 [S]: the block of each position, on a device."""
    with torch.inference_mode(False):
        return blocks.owner.to(device)
