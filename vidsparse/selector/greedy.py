"""Greedy: as many tokens as the mass of a row asks for, spent on the blocks of the best scores.

How much and on what are two questions. The budget of a row is the tokens of the smallest set of
blocks, with the forced ones in it, that holds the mass p by the logits of block means, at least
floor(2 reserve nk) blocks. The max(1, floor(reserve nk)) blocks of the largest mass are exact
whatever their score; then blocks are taken by falling score, those of one score by falling mass,
while what has been taken before is less than the budget. Source: SVG-EAR (arXiv 2603.08982), with
scores of estimator `ear`; with those of `proxy` and reserve 0, ProxyAttn. `schedule.density` caps a
row.

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
    cap = density * k_blocks.tokens + 1e-6
    if scores.clusters is not None:
        chosen, most = _of_clusters(scores.clusters, params), int(density * len(k_blocks) + 1e-9)
        keep = scores.touched(chosen, forced, 1, max(1, most)) | forced
    else:
        by_mass = scores
        if scores.logits is not None:
            by_mass = replace(scores, value=scores.logits(), kind="logit")
        count = k_blocks.on(scores.value.device).count
        mass, weighted = by_mass.mass(k_blocks), by_mass.weighted(k_blocks)
        keep = _bought(weighted, mass, scores.value, count, forced, cap, params)
    return torch.where(keep, 0, SKIP).to(torch.int8)


def _of_clusters(clusters: ClusterScores, params: Params) -> Tensor:
    """bool [B, H, Cq, Ck]: the pairs that are chosen, by what they are worth."""
    mass, count = clusters.mass, clusters.k.count.unsqueeze(-2)
    value = mass if clusters.worth is None else clusters.worth
    none = torch.zeros_like(mass, dtype=torch.bool)
    return _bought(Scores(mass, "mass"), mass, value, count, none, inf, params)


def _bought(
    weighted: Scores,
    mass: Tensor,
    value: Tensor,
    count: Tensor,
    forced: Tensor,
    most: float,
    params: Params,
) -> Tensor:
    """bool [B, H, rows, n]: forced ones, and those that the budget of a row is spent on.

    weighted: scores that rank by mass. mass; value, what ranks; count, the tokens: of each, and
    that broadcast. most: tokens of a row.
    """
    places = torch.arange(mass.shape[-1], device=mass.device)
    count, fixed = count.expand(mass.shape), forced.expand(mass.shape)
    order = weighted.ranked(forced)
    held = mass.double().nan_to_num(0.0).gather(-1, order)
    before = held.cumsum(-1) - held
    least = max(1, int(2 * params.reserve * len(places) + 1e-9))
    counted = (before < params.p * held.sum(-1, keepdim=True) - 1e-12) | (places < least)
    budget = (count.gather(-1, order) * counted).sum(-1, keepdim=True)

    order = weighted.ranked(torch.zeros_like(forced))
    if params.reserve > 0:
        reserved = max(1, int(params.reserve * len(places) + 1e-9))
        best = (places < reserved) & fixed.gather(-1, order).logical_not()
        spent = (count.gather(-1, order) * best).cumsum(-1)
        best = best & (spent + (count * fixed).sum(-1, keepdim=True) <= most)
        fixed = fixed | torch.zeros_like(best).scatter_(-1, order, best)
    by_value = value.nan_to_num(nan=inf).gather(-1, order)
    ranked = order.gather(-1, by_value.argsort(dim=-1, descending=True, stable=True))
    behind = fixed.gather(-1, ranked).logical_not().byte()
    ranked = ranked.gather(-1, behind.argsort(dim=-1, stable=True))
    cost = count.gather(-1, ranked)
    spent = cost.cumsum(-1)
    wanted = ((spent - cost < budget) & (spent <= most)) | (places < 1)
    return torch.zeros_like(wanted).scatter_(-1, ranked, wanted) | fixed
