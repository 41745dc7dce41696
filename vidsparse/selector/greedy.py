"""Greedy: as many tokens as the mass of a row asks for, spent on the blocks of the best scores.

How much and on what are two questions. The budget of a row is the tokens of the smallest set of
blocks that holds the mass p by the logits of block means, at least floor(2 reserve nk) blocks. The
max(1, floor(reserve nk)) blocks of the largest mass are exact in any case; then blocks are taken by
falling score, those of one score by falling mass, while what has been taken before is less than the
budget. Source: SVG-EAR (arXiv 2603.08982), with scores of estimator `ear`; with those of `proxy`
and reserve 0, ProxyAttn. `schedule.density` caps a row.

Of scores that know clusters, the same is done with clusters of keys for every cluster of queries,
and a row reads the blocks that they touch, those of most mass if they are more than the cap.
"""

from dataclasses import dataclass, replace
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.clusters import ClusterScores
from vidsparse.config import require
from vidsparse.plan import SKIP, Scores


@dataclass(frozen=True)
class Params:
    """p: mass to reach, in (0, 1]. reserve: share of the blocks that is exact by mass, in [0, 0.5];
    0: none is."""

    name: str = "greedy"
    p: float = 0.85
    reserve: float = 0.1
    levels: ClassVar[tuple[int, ...]] = (0,)
    spends_budget: ClassVar[bool] = False
    needs_mass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(0 < self.p <= 1, "selector.p", self.p, "a number in (0, 1]")
        require(0 <= self.reserve <= 0.5, "selector.reserve", self.reserve, "a number in [0, 0.5]")


def select(
    scores: Scores, forced: Tensor, density: float, k_blocks: Blocks, params: Params
) -> Tensor:
    """Levels 0 and SKIP, int8 [B, H, nq, nk]. Forced blocks come first, their tokens count."""
    nk = len(k_blocks)
    cap = max(1, int(density * nk + 1e-9))
    if scores.clusters is not None:
        keep = scores.touched(_of_clusters(scores.clusters, params), forced, 1, cap) | forced
    else:
        by_mass = scores
        if scores.logits is not None:
            by_mass = replace(scores, value=scores.logits(), kind="logit")
        mass, value = by_mass.mass(k_blocks), scores.value
        order = by_mass.weighted(k_blocks).ranked(torch.zeros_like(forced))
        count = k_blocks.on(value.device).count.expand(value.shape)
        fixed = _first(order, min(_reserved(nk, params), cap)) | forced
        most = density * k_blocks.tokens + 1e-6
        keep = _bought(order, mass, value, count, fixed, most, params)
    return torch.where(keep, 0, SKIP).to(torch.int8)


def _of_clusters(clusters: ClusterScores, params: Params) -> Tensor:
    """bool [B, H, Cq, Ck]: the pairs that are chosen, by what they are worth."""
    mass = clusters.mass
    value = mass if clusters.worth is None else clusters.worth
    order = mass.argsort(dim=-1, descending=True, stable=True)
    count = clusters.k.count.unsqueeze(-2).expand(mass.shape)
    fixed = _first(order, _reserved(mass.shape[-1], params))
    return _bought(order, mass, value, count, fixed, inf, params)


def _reserved(many: int, params: Params) -> int:
    """How many blocks, or clusters, of so many are exact by mass."""
    return max(1, int(params.reserve * many + 1e-9)) if params.reserve > 0 else 0


def _first(order: Tensor, many: int) -> Tensor:
    """bool like order: the ids that stand first in it."""
    first = (torch.arange(order.shape[-1], device=order.device) < many).expand(order.shape)
    return torch.zeros_like(first).scatter_(-1, order, first)


def _bought(
    order: Tensor,
    mass: Tensor,
    value: Tensor,
    count: Tensor,
    fixed: Tensor,
    most: float,
    params: Params,
) -> Tensor:
    """bool [..., n]: `fixed`, and what is taken after it. order: int64, ids by falling mass. mass,
    value, what ranks, and count, the tokens: of each. most: tokens that are taken of a row."""
    places = torch.arange(order.shape[-1], device=order.device)
    held = mass.double().nan_to_num(0.0).gather(-1, order)
    before = held.cumsum(-1) - held
    least = max(1, int(2 * params.reserve * len(places) + 1e-9))
    counted = (before < params.p * held.sum(-1, keepdim=True) - 1e-12) | (places < least)
    budget = (count.gather(-1, order) * counted).sum(-1, keepdim=True)

    value = value.nan_to_num(nan=inf).gather(-1, order)
    ranked = order.gather(-1, value.argsort(dim=-1, descending=True, stable=True))
    behind = fixed.gather(-1, ranked).logical_not().byte()
    ranked = ranked.gather(-1, behind.argsort(dim=-1, stable=True))
    cost = count.gather(-1, ranked)
    spent = cost.cumsum(-1)
    wanted = ((spent - cost < budget) & (spent <= most)) | (places < 1)
    return torch.zeros_like(wanted).scatter_(-1, ranked, wanted) | fixed
