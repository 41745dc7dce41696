"""Keysort: in every piece of the video each head puts the keys that most queries look at in front.

    mass_n = mean_i softmax_n(s qbar_i . k_n)      over the query blocks i, n any key
    order_k: in each segment of the order below, its keys by falling mass; queries stay

Attention does not ask in which order keys stand, so that full blocks of the keys that matter and
blocks of the rest can be told apart. Source: PBS-Attn (arXiv 2510.21270), where segments are causal
and the last 128 queries speak for all. Neighbours in a block are alike in mass, not in what they
are: pooled levels between exact and the centroid say little here. Costs nq / N of a dense call's
first product.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse import curves
from vidsparse.config import require
from vidsparse.draft import Draft
from vidsparse.grid import TokenGrid


@dataclass(frozen=True)
class Params:
    """tile: frames, rows, columns of the tiles of the order below. inner: its order inside a tile.

    segment: tokens, in that order, among which keys are sorted, >= 1; best a few blocks of them, as
    in `pattern.segment`. refresh: steps for which an order is kept, >= 1.
    """

    name: str = "keysort"
    tile: tuple[int, ...] = (4, 8, 8)
    inner: str = "morton"
    segment: int = 256
    refresh: int = 1
    per_head: ClassVar[bool] = True
    shared: ClassVar[bool] = False
    axes: ClassVar[int] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", tuple(self.tile))
        for key, allowed in curves.tile_faults(self.tile, self.inner).items():
            require(False, f"layout.{key}", getattr(self, key), allowed)
        require(self.segment >= 1, "layout.segment", self.segment, "an integer >= 1")
        require(self.refresh >= 1, "layout.refresh", self.refresh, "an integer >= 1")


def video_order(grid: TokenGrid, params: Params) -> Tensor:
    """The order of queries, and that of the segments: tiles."""
    return curves.tiles((grid.frames, grid.height, grid.width), params.tile, params.inner)


def head_orders(draft: Draft, grid: TokenGrid, params: Params) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries, as below; of keys, int64 [B, H, S]; and bool [B, H]: all heads have one."""
    batch, heads, tokens, _ = draft.q.shape
    device, first, count = draft.q.device, grid.video_start, grid.video_tokens
    base = torch.arange(tokens, device=device) if draft.order_q is None else draft.order_q
    place = base.narrow(0, first, count)
    scaled = draft.q_means * draft.scale
    orders = []
    for b in range(batch):
        for h in range(heads):
            keys = draft.k.select(0, b).select(0, h).to(scaled.dtype)
            weight = (scaled.select(0, b).select(0, h) @ keys.mT).softmax(-1)
            mass = weight.mean(0).index_select(0, place)
            video = place.index_select(0, sorted_within(mass, params.segment))
            after = first + count
            parts = base.narrow(0, 0, first), video, base.narrow(0, after, tokens - after)
            orders.append(torch.cat(parts))
    order_k = torch.stack(orders).view(batch, heads, tokens)
    order_q = base.expand(batch, heads, tokens)
    return order_q, order_k, torch.ones(batch, heads, dtype=torch.bool, device=device)


def sorted_within(mass: Tensor, segment: int) -> Tensor:
    """int64 [n]: the order of numbers [n] >= 0 that falls in every `segment` of them; of equals the
    first comes first."""
    count = len(mass)
    segments = -(-count // segment)
    missing = segments * segment - count
    padded = torch.cat([mass, mass.new_full((missing,), float("-inf"))]).view(segments, segment)
    ranked = padded.argsort(dim=-1, descending=True, stable=True)
    begin = torch.arange(segments, device=mass.device).unsqueeze(1) * segment
    return (ranked + begin).flatten().narrow(0, 0, count)
