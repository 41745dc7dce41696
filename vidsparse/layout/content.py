"""Content order: each head orders its queries, and its keys, by what they are.

Tokens that attend alike, or are attended alike, stand in one block wherever they are in the video.
Queries are compared in the metric Cov(k), keys in that of E[q q^T]: distances that the products
q . k see. In it rows are bisected at the median, down to blocks of equal size
(`vidsparse.bisection`): the idea of SVG2 (arXiv 2505.18875) without k-means (layout `kmeans`), and
without clusters of unlike size.

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
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse import bisection, curves
from vidsparse.config import require
from vidsparse.draft import Draft, scratch, strips, taken
from vidsparse.grid import TokenGrid
from vidsparse.kernels.cpu.threads import each
from vidsparse.kernels.gpu import support

Pair = tuple[Tensor, Tensor]

MANY = 1 << 20
"""Numbers of rows that are bisected at once, at most, unless those of one head are more."""

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
    batch, heads, tokens, _ = draft.q.shape
    video = grid.video_start, grid.video_tokens
    base = torch.arange(tokens, device=draft.q.device) if draft.order_q is None else draft.order_q
    make = _in_triton if draft.in_triton and params.axes else _in_torch
    around = base.narrow(0, 0, video[0]), base.narrow(0, sum(video), tokens - sum(video))
    found = make(draft, base.narrow(0, *video), video, params.axes)
    of_q, of_k = (_between(x.view(batch, heads, -1), *around) for x in found)
    if not params.gate:
        return of_q, of_k, torch.ones(batch, heads, dtype=torch.bool, device=base.device)
    draft = replace(draft, second=True)
    chosen = waste(draft.ordered(of_q, of_k)) < waste(draft)
    of_q, of_k = (torch.where(chosen.unsqueeze(-1), order, base) for order in (of_q, of_k))
    return of_q, of_k, chosen


def _in_torch(
    draft: Draft, place: Tensor, video: tuple[int, int], axes: int
) -> tuple[Tensor, Tensor]:
    """Orders of queries and of keys, tokens [B, H, n].

    place: int64 [n], the tokens in base order. video: first position and number of them. Heads are
    projected a few at once, on a CPU, where that is one, each on a thread of its own: with the same
    result for any number of threads. Many more are bisected at once, as threads would wait for each
    other between its many small operations.
    """
    batch, heads, _, depth = draft.q.shape
    width = min(axes, depth) or depth
    rows = draft.q.new_empty(2, batch, heads, len(place), width, dtype=torch.float32)

    def project(some: tuple[int, slice]) -> None:
        own = (x[some].unsqueeze(0) for x in (draft.q, draft.k))
        own = (x.narrow(2, *video) if draft.order_q is None else taken(x, place) for x in own)
        q, k = (x.squeeze(0).float().nan_to_num(0.0, 0.0, 0.0) for x in own)
        of_q, of_k = ((x.mT @ x / len(place), x.mean(1, keepdim=True)) for x in (q, k))
        bases = [_basis(*pair, axes) for pair in _metrics(of_q, of_k)]
        for out, x, basis in zip(rows, (q, k), bases, strict=True):
            out[some] = x @ basis

    strip = strips(heads, len(place) * depth, scratch(draft.q))
    each([*product(range(batch), strip)], project, on_threads=draft.q.device.type == "cpu")
    cuts = draft.q_blocks.size, draft.k_blocks.size
    if cuts[0] == cuts[1]:
        of_q, of_k = _bisected(rows, place, cuts[0], axes == 0)
    else:
        both = zip(rows, cuts, strict=True)
        of_q, of_k = (_bisected(one, place, size, axes == 0) for one, size in both)
    return of_q, of_k


def _bisected(rows: Tensor, place: Tensor, size: int, local: bool) -> Tensor:
    """rows [..., n, A] -> [..., n]: `place` in the order of each group of rows."""
    groups = rows.flatten(0, -3)
    found = place.new_empty(groups.shape[:-1])

    def bisect(some: slice) -> None:
        found[some] = place[bisection.bisected(groups[some], size, local)]

    parts = [*strips(len(groups), groups[0].numel(), MANY)]
    each(parts, bisect, on_threads=rows.device.type == "cpu" and len(parts) > 1)
    return found.view(rows.shape[:-1])


def _in_triton(
    draft: Draft, place: Tensor, video: tuple[int, int], axes: int
) -> tuple[Tensor, Tensor]:
    """The same blocks in int32, [B, H, n], for axes > 0; all heads at once."""
    kernels = support.kernels("projection", draft.q)
    operands = draft.q, draft.k
    sums = (kernels.grams(x, *video) for x in operands)
    of_q, of_k = (
        (gram.flatten(0, 1) / len(place), total.flatten(0, 1).unsqueeze(1) / len(place))
        for gram, total in sums
    )
    spread, metric = (torch.cat(x) for x in zip(*_metrics(of_q, of_k), strict=True))
    basis = _basis(spread, metric, axes)
    bases = basis.view(2, *draft.q.shape[:2], *basis.shape[1:])
    rows = [
        kernels.project(x, own, draft.order_q, *video)
        for x, own in zip(operands, bases, strict=True)
    ]
    sizes = [draft.q_blocks.size, draft.k_blocks.size]
    found: Tensor = support.kernels("bisect", draft.q).bisect(torch.cat(rows), place.int(), sizes)
    order_q, order_k = found.chunk(2)
    return order_q, order_k


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
        lost: Tensor = kernels.lost_mass(draft.logits, draft.spread, cut.count, cut.text, near)
    else:
        logits = (draft.logits + cut.count.log()).masked_fill(cut.text, float("-inf"))
        mass = logits.softmax(-1)
        least = mass.topk(near, -1).values.narrow(-1, near - 1, 1)
        lost = (mass * draft.spread).masked_fill((mass >= least) | cut.text, 0.0).sum(-1)
    weight = own.count.masked_fill(own.text, 0).to(lost)
    found: Tensor = 2 * (lost @ weight) / weight.sum()
    return found


def _metrics(of_q: tuple[Tensor, Tensor], of_k: tuple[Tensor, Tensor]) -> list[Pair]:
    """For queries and for keys: the covariance [G, D, D] of their rows, and the metric of them.

    of_q, of_k: their mean x^T x [G, D, D] and mean x [G, 1, D].
    """
    (products, q_mean), (k_products, k_mean) = of_q, of_k
    spread_q, spread_k = products - q_mean.mT @ q_mean, k_products - k_mean.mT @ k_mean
    return [(spread_q, spread_k), (spread_k, products)]


def _basis(spread: Tensor, metric: Tensor, axes: int) -> Tensor:
    """[G, D, axes or D]: plain distances of rows x basis compare them."""
    length = bisection.factor(metric)
    if 0 < axes < length.shape[1]:
        length = length @ bisection.main_axes(length.mT @ spread @ length, axes)
    return length
