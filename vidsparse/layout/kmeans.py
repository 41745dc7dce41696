"""K-means: each head puts queries, and keys, that are near each other in one cluster.

    cluster of x = argmin_c |x - mu_c|^2,     mu_c = mean of its tokens       (Lloyd, Euclidean)

for queries and for keys apart, on q and k after norm and RoPE; the tokens of a cluster stand
together, in the order below, and clusters in that of their numbers. `estimator.name=clusters` then
chooses among clusters, whatever their size; estimators of blocks see equal blocks cut over them.
Source: SVG2 (arXiv 2505.18875): 300 clusters of queries and 1000 of keys for the 75,600 tokens of
720p, 50 iterations at the first sparse step of a run, then 2 in each from the centroids of the one
before. It starts from random tokens, this from tokens at equal distances in the order below, so
that the same tokens always give the same clusters. A cluster that loses all of its tokens keeps its
centroid, and may win some back. The history of a video is clustered with it, text is not.

Costs iterations (clusters_q + clusters_k) / (2 N) of a dense call, and the centroids are kept: of
each head, with N tokens, C clusters, D channels and i iterations, for queries and for keys,

    i 2 N C D FLOPs in float32,   i N (16 C + 16 D + 48) + N (14 D + 8) bytes,   C (4 D + 8) kept

since the products of a token with C centroids are written, read twice and written again, and rows
are read, sorted by cluster, and summed.
"""

from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse import curves
from vidsparse.clusters import Clusters
from vidsparse.config import require
from vidsparse.draft import Draft, Making, Orders, scratch, strips
from vidsparse.grid import TokenGrid

ITERATION, NEAR, GROUP, SEEDS, WHOLE = 16, 3, 4, 6, 6
"""Operations: of an iteration beside the search for the nearest; of each part of that search; of
heads that are taken at once, beside iterations, and for seeds; of all heads together."""


@dataclass(frozen=True)
class Params:
    """clusters_q, clusters_k: of queries and of keys, as a share of the tokens if a float in
    (0, 1), as a number if an integer >= 1; at most one a token, at least one.

    iterations: of the first step of a run, refine: of later ones, >= 1. refresh: steps for which an
    order and its clusters are kept, >= 1. tile: frames, rows, columns of the tiles of the order
    below. inner: its order inside a tile.
    """

    name: str = "kmeans"
    clusters_q: int | float = 0.00397
    clusters_k: int | float = 0.01323
    iterations: int = 50
    refine: int = 2
    refresh: int = 1
    tile: tuple[int, ...] = (8, 4, 4)
    inner: str = "morton"
    per_head: ClassVar[bool] = True
    shared: ClassVar[bool] = False
    clusters: ClassVar[bool] = True
    axes: ClassVar[int] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", tuple(self.tile))
        for key, allowed in curves.tile_faults(self.tile, self.inner).items():
            require(False, f"layout.{key}", getattr(self, key), allowed)
        for key in ("clusters_q", "clusters_k"):
            value = getattr(self, key)
            ok = value >= 1 if isinstance(value, int) else 0 < value < 1
            require(ok, f"layout.{key}", value, "a share in (0, 1), or an integer >= 1")
        for key in ("iterations", "refine", "refresh"):
            require(getattr(self, key) >= 1, f"layout.{key}", getattr(self, key), "an integer >= 1")

    @property
    def steady(self) -> "Params":
        """What a step of a run does that is not the first one."""
        return replace(self, iterations=self.refine)

    def making(self, tokens: int, heads: int, head_dim: int, first: bool) -> Making:
        """Formula in the module docstring. tokens: that are clustered. first: of a run."""
        rounds = self.iterations if first else self.refine
        clusters = number(self.clusters_q, tokens), number(self.clusters_k, tokens)
        flops = moved = launches = kept = 0.0
        for count in clusters:
            flops += rounds * 2.0 * tokens * count * head_dim
            moved += tokens * (rounds * (16.0 * count + 16 * head_dim + 48) + 14 * head_dim + 8)
            kept += count * (4.0 * head_dim + 8)
            launches += WHOLE
            for some in strips(heads, tokens * head_dim):
                parts = len([*strips(tokens, (some.stop - some.start) * count)])
                launches += GROUP + SEEDS * first + rounds * (ITERATION + NEAR * parts)
        return Making(heads * flops, heads * moved, launches, heads * kept, clusters)


def video_order(grid: TokenGrid, params: Params) -> Tensor:
    """The order below those of the heads: tiles."""
    return curves.tiles((grid.frames, grid.height, grid.width), params.tile, params.inner)


def head_orders(draft: Draft, grid: TokenGrid, params: Params) -> Orders:
    """Of queries and of keys, int64 [B, H, S], who has one: all; and the clusters of both.

    draft: of the tokens in base order, with the clusters of an earlier step if there are any.
    """
    batch, heads, tokens, _ = draft.q.shape
    base = torch.arange(tokens, device=draft.q.device) if draft.order_q is None else draft.order_q
    first, many = grid.text_tokens if grid.text_first else 0, grid.other_tokens
    text = base.narrow(0, 0, first), base.narrow(0, first + many, tokens - first - many)
    before, after = (x.expand(batch, heads, -1) for x in text)

    def sorted_by(x: Tensor, wanted: float, known: Clusters | None) -> tuple[Tensor, Clusters]:
        start, rounds = (known.centroid, params.refine) if known else (None, params.iterations)
        place = base.narrow(0, first, many)
        order, count, centroid = clustered(x, place, number(wanted, many), rounds, start)
        return torch.cat([before, order, after], -1), Clusters(count, centroid, first, many)

    of_q, of_k = draft.clusters or (None, None)
    order_q, found_q = sorted_by(draft.q, params.clusters_q, of_q)
    order_k, found_k = sorted_by(draft.k, params.clusters_k, of_k)
    who = torch.ones(batch, heads, dtype=torch.bool, device=base.device)
    return Orders(order_q, order_k, who, (found_q, found_k))


def number(wanted: int | float, tokens: int) -> int:
    """Clusters that a setting means for so many tokens, rounded."""
    share = wanted if isinstance(wanted, int) else round(wanted * tokens)
    return max(1, min(share, tokens))


def clustered(
    x: Tensor, place: Tensor, clusters: int, iterations: int, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens `place` of x [B, H, S, D] by cluster, int64 [B, H, n]; how many each cluster has,
    int64 [B, H, C]; its mean, float32 (float64 of float64) [B, H, C, D]. A few heads at once.

    place: int64 [n]. start: centroids; None: of tokens at equal distances. What is not finite
    counts as 0.
    """
    batch, heads, _, depth = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for b, some in product(range(batch), strips(heads, len(place) * depth, scratch(x))):
        cut = some.start, some.stop - some.start
        rows = x.select(0, b).narrow(0, *cut).index_select(1, place)
        rows = rows.to(wide).nan_to_num(0.0, 0.0, 0.0)
        means = seeds(rows, clusters) if start is None else start.select(0, b).narrow(0, *cut)
        for _ in range(iterations):
            ranks, sizes, means = iterated(rows, means)
        order = place.index_select(0, ranks.flatten()).view(ranks.shape)
        found.append((order, sizes, means))
    order, count, centroid = (
        torch.cat(x).unflatten(0, (batch, heads)) for x in zip(*found, strict=True)
    )
    return order, count, centroid


def seeds(rows: Tensor, clusters: int) -> Tensor:
    """[G, C, D] of rows [G, n, D]: those in the middle of equal parts of the n."""
    at = (torch.arange(clusters, device=rows.device) * 2 + 1) * rows.shape[1] // (2 * clusters)
    return rows.index_select(1, at)


def iterated(rows: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One iteration of Lloyd: rows [G, n, D] by cluster, int64 [G, n]; tokens of each cluster,
    int64 [G, C]; and their means, [G, C, D], of an empty one what it was.

    The same on every run: means are sums over sorted rows, which no device adds in another order.
    """
    groups, _, depth = rows.shape
    clusters = means.shape[1]
    owner = nearest(rows, means)
    ranks = owner.argsort(dim=-1, stable=True)
    bounds = torch.arange(clusters + 1, device=rows.device).repeat(groups, 1)
    count = torch.searchsorted(owner.gather(-1, ranks), bounds).diff(dim=-1)
    moved = rows.gather(1, ranks.unsqueeze(-1).expand(rows.shape)).flatten(0, 1)
    sums = torch.segment_reduce(moved, "sum", lengths=count.flatten(), axis=0, unsafe=True)
    sums = sums.view(groups, clusters, depth)
    full = count.unsqueeze(-1)
    return ranks, count, torch.where(full > 0, sums / full.clamp(min=1), means)


def nearest(rows: Tensor, means: Tensor) -> Tensor:
    """int64 [G, n]: the cluster of each row; |x|^2 is the same for all and left out."""
    half = 0.5 * means.square().sum(-1).unsqueeze(1)
    found = []
    for some in strips(rows.shape[1], rows.shape[0] * means.shape[1], scratch(rows)):
        near = rows.narrow(1, some.start, some.stop - some.start)
        found.append((near @ means.mT).sub_(half).argmax(-1))
    return torch.cat(found, 1)
