"""Error-aware scores of clusters: what a cluster of queries would lose of one that is a centroid.

    E_ab = sum_{n in b} | exp(s qbar_a . k_n) v_n - exp(s qbar_a . kbar_b) vbar_b |^2
    worth_ab = ln E_ab - gamma ln n_b

over the clusters that the layout has made; mass is that of `clusters`. Selector greedy says by mass
how much a cluster of queries reads, and spends it on what is worth most. What it leaves out is read
as the centroids of blocks, which are cut over the clusters. Source: SVG-EAR (arXiv 2603.08982).
Costs clusters of queries / (2 N) of a dense call, and reads the values.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse import inside
from vidsparse.clusters import ClusterScores
from vidsparse.config import require
from vidsparse.draft import Draft, strips
from vidsparse.plan import ScoreKind, Scores


@dataclass(frozen=True)
class Params:
    """gamma: errors are divided by n_b^gamma, in [0, 2]; 1: what a cluster loses per token."""

    name: str = "cluster_errors"
    gamma: float = 1.0
    kind: ClassVar[ScoreKind] = "mass"
    spread: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = True
    of_clusters: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 <= self.gamma <= 2, "estimator.gamma", self.gamma, "a number in [0, 2]")


def estimate(draft: Draft, params: Params) -> Scores:
    """Mass float32 [B, H, nq, nk], and of the clusters their mass and what they are worth."""
    assert draft.clusters is not None, "checked by SparseConfig"
    found = ClusterScores.by_centroids(*draft.clusters, draft.q_blocks, draft.k_blocks, draft.scale)
    places = torch.arange(found.k.tokens, device=draft.q.device) + found.k.first

    def errors(b: int, h: int) -> Tensor:
        of = b, h, places
        k, v = (inside.head(x, draft.order_k, *of) for x in (draft.k, draft.v))
        q_means, k_means, count = (
            x.select(0, b).select(0, h) for x in (found.q.centroid, found.k.centroid, found.k.count)
        )
        return logarithms(q_means.to(k) * draft.scale, k_means.to(k), k, v, count)

    worth = inside.by_head(draft, errors)
    if params.gamma:
        worth = worth - params.gamma * found.k.count.clamp(min=1).to(worth).log().unsqueeze(-2)
    found = replace(found, worth=worth)
    return Scores(found.on_blocks(), params.kind, exact=found.text, clusters=found)


def logarithms(q_means: Tensor, k_means: Tensor, k: Tensor, v: Tensor, count: Tensor) -> Tensor:
    """ln E_ab of one head, [Cq, Ck], -inf of empty clusters. q_means [Cq, D], scaled; k_means
    [Ck, D]; k, v [N, D] by cluster; count: int64 [Ck].

    Exponentials are taken relative to the largest of their pair, so that none of any size is lost.
    """
    owner = torch.arange(len(count), device=k.device).repeat_interleave(count, output_size=len(k))

    def sums(x: Tensor, how: str = "sum") -> Tensor:
        return torch.segment_reduce(x, how, lengths=count, axis=0, unsafe=True)

    v_means = sums(v) / count.clamp(min=1).unsqueeze(-1)
    squares = v.square().sum(-1, keepdim=True)
    crosses = (v * v_means.index_select(0, owner)).sum(-1, keepdim=True)
    whole, found = count * v_means.square().sum(-1), []
    for some in strips(len(q_means), len(k)):
        q = q_means.narrow(0, some.start, some.stop - some.start)
        logits = k @ q.mT
        top = sums(logits, "max")
        near = (logits - top.index_select(0, owner)).exp()
        far = (k_means @ q.mT - top).exp()
        errors = sums(near.square() * squares) - 2 * far * sums(near * crosses)
        errors = errors + far.square() * whole.unsqueeze(-1)
        found.append((errors.clamp(min=0).log() + 2 * top).mT)
    return torch.cat(found).masked_fill(count == 0, float("-inf"))
