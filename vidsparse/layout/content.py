"""Content order: each head orders its queries, and its keys, by what they are.

Tokens that attend alike, or are attended alike, stand in one block wherever they are in the video.
Queries are compared in the metric Cov(k), keys in that of E[q q^T]: distances that the products
q . k see. In it rows are bisected at the median, down to blocks of equal size
(`vidsparse.bisection`): the idea of SVG2 (arXiv 2505.18875) without k-means, and without clusters
of unlike size.

    axes = n   on the n main axes of all rows of the head together, of which each part is cut
               across the one in which it varies most: after one projection all work is on n numbers
    axes = 0   each part across its own main axis: better by a tenth, at several times the cost

Not every head gains: where keys fill all of their dimensions, neighbours in the video are better
company. So the blocks of both orders are drafted, and a head takes that with less waste,

    waste = sum_ij m_ij 2 spread_ij     over the pairs outside the `NEAR` largest m of each row

m being the drafted mass (`vidsparse.draft`): mass times variance of the logits, what centroids get
wrong. Heads that stay, and everything that is not video, keep the order of the tiles below.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse import bisection, curves
from vidsparse.config import require
from vidsparse.draft import SCRATCH, Draft, taken
from vidsparse.grid import TokenGrid
from vidsparse.kernels.gpu import support

NEAR = 0.2
"""Share of a row's blocks, those of most mass, that are as good as read exactly."""


@dataclass(frozen=True)
class Params:
    """tile: frames, rows, columns of the tiles of the base order. inner: its order inside a tile.

    axes: 0, or how many main axes, 1 .. 64. refresh: steps for which an order is kept, >= 1; 4-step
    old ones cost a tenth of error. gate: whether heads choose; false: all are in content order.
    """

    name: str = "content"
    tile: tuple[int, ...] = (8, 4, 4)
    inner: str = "morton"
    axes: int = 6
    refresh: int = 4
    gate: bool = True
    per_head: ClassVar[bool] = True
    shared: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", tuple(self.tile))
        for key, allowed in curves.tile_faults(self.tile, self.inner).items():
            require(False, f"layout.{key}", getattr(self, key), allowed)
        require(0 <= self.axes <= 64, "layout.axes", self.axes, "an integer 0 .. 64")
        require(self.refresh >= 1, "layout.refresh", self.refresh, "an integer >= 1")


def video_order(grid: TokenGrid, params: Params) -> Tensor:
    """The order below those of the heads: tiles."""
    return curves.tiles((grid.frames, grid.height, grid.width), params.tile, params.inner)


def head_orders(draft: Draft, grid: TokenGrid, params: Params) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries and of keys, int64 [B, H, S], as `Draft` takes them, and bool [B, H]: who has one.

    draft: of the tokens in base order.
    """
    batch, heads, tokens, depth = draft.q.shape
    video = grid.video_start, grid.video_tokens
    base = torch.arange(tokens, device=draft.q.device) if draft.order_q is None else draft.order_q
    place = base.narrow(0, *video)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    at_once = max(1, SCRATCH // (grid.video_tokens * depth))
    for b, first in ((b, first) for b in range(batch) for first in range(0, heads, at_once)):
        some = first, min(at_once, heads - first)
        own = (x.narrow(0, b, 1).narrow(1, *some) for x in (draft.q, draft.k))
        own = (x.narrow(2, *video) if draft.order_q is None else taken(x, place) for x in own)
        q, k = (x.squeeze(0).float() for x in own)
        q, k = (torch.where(x.isfinite(), x, 0.0) for x in (q, k))
        sizes = draft.q_blocks.size, draft.k_blocks.size
        for part, rows, size in zip(found, _in_metric(q, k, params.axes), sizes, strict=True):
            order = bisection.bisected(rows, size, local=params.axes == 0)
            part.append(place.expand_as(order).gather(1, order))
    around = base.narrow(0, 0, video[0]), base.narrow(0, sum(video), tokens - sum(video))
    of_q, of_k = (_between(torch.cat(part).view(batch, heads, -1), *around) for part in found)
    if not params.gate:
        return of_q, of_k, torch.ones(batch, heads, dtype=torch.bool, device=base.device)
    draft = replace(draft, second=True)
    chosen = waste(draft.ordered(of_q, of_k)) < waste(draft)
    of_q, of_k = (torch.where(chosen.unsqueeze(-1), order, base) for order in (of_q, of_k))
    return of_q, of_k, chosen


def _between(orders: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Orders [B, H, n] of the video with the tokens around it."""
    parts = (x if x.ndim == 3 else x.expand(*orders.shape[:2], -1) for x in (before, orders, after))
    return torch.cat([*parts], -1)


def waste(draft: Draft) -> Tensor:
    """float32 [B, H]. Formula in the module docstring; text is left out, being exact."""
    cut, own = draft.k_blocks.on(draft.q.device), draft.q_blocks.on(draft.q.device)
    near = max(1, int(NEAR * int((~draft.k_blocks.text).sum())))
    if draft.in_triton:
        kernels = support.kernels("waste", draft.q)
        lost = kernels.lost_mass(draft.logits, draft.spread, cut.count, cut.text, near)
    else:
        logits = (draft.logits + cut.count.log()).masked_fill(cut.text, float("-inf"))
        mass = logits.softmax(-1)
        least = mass.topk(near, -1).values.narrow(-1, near - 1, 1)
        lost = (mass * draft.spread).masked_fill((mass >= least) | cut.text, 0.0).sum(-1)
    weight = own.count.masked_fill(own.text, 0).to(lost)
    return 2 * (lost @ weight) / weight.sum()


def _in_metric(q: Tensor, k: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """q, k [G, n, D] as rows that plain distances compare, [G, n, axes or D] each."""
    n, depth = q.shape[1:]
    q_mean, k_mean = q.mean(1, keepdim=True), k.mean(1, keepdim=True)
    products = q.mT @ q / n
    of_q = products - q_mean.mT @ q_mean
    of_k = k.mT @ k / n - k_mean.mT @ k_mean
    found = []
    for rows, spread, metric in ((q, of_q, of_k), (k, of_k, products)):
        length = bisection.factor(metric)
        if 0 < axes < depth:
            length = length @ bisection.main_axes(length.mT @ spread @ length, axes)
        found.append(rows @ length)
    return found[0], found[1]
