"""Greedy: as many tokens as the mass of a row asks for, spent on the blocks of the best scores.

How much and on what are two questions. The budget of a row is the tokens of the smallest set of
blocks, with the forced ones in it, that holds the mass p by the logits of block means, at least
floor(2 reserve nk) blocks. The max(1, floor(reserve nk)) blocks of the largest mass are exact
whatever their score; then blocks are taken by falling score while what has been taken before is
less than the budget. Source: SVG-EAR (arXiv 2603.08982), with scores of estimator `ear`; with those
of `proxy` and reserve 0, ProxyAttn. `schedule.density` caps a row.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
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
    nk, device = len(k_blocks), scores.value.device
    count = k_blocks.on(device).count
    cap = density * k_blocks.tokens + 1e-6
    by_mass = scores
    if scores.logits is not None:
        by_mass = replace(scores, value=scores.logits(), kind="logit")
    weighted, rank = by_mass.weighted(k_blocks), torch.arange(nk, device=device)
    order = weighted.ranked(forced)
    mass = by_mass.mass(k_blocks).double().nan_to_num(0.0).gather(-1, order)
    before = mass.cumsum(-1) - mass
    least = max(1, int(2 * params.reserve * nk + 1e-9))
    counted = (before < params.p * mass.sum(-1, keepdim=True) - 1e-12) | (rank < least)
    count = count.expand(order.shape)
    budget = (count.gather(-1, order) * counted).sum(-1, keepdim=True)

    fixed = forced.expand(order.shape)
    if params.reserve > 0:
        order = weighted.ranked(torch.zeros_like(forced))
        best = (rank < max(1, int(params.reserve * nk + 1e-9))) & ~fixed.gather(-1, order)
        spent = (count.gather(-1, order) * best).cumsum(-1)
        best = best & (spent + (count * fixed).sum(-1, keepdim=True) <= cap)
        fixed = fixed | torch.zeros_like(best).scatter_(-1, order, best)
    ranked = scores.ranked(fixed)
    cost = count.gather(-1, ranked)
    spent = cost.cumsum(-1)
    wanted = ((spent - cost < budget) & (spent <= cap)) | (rank < 1)
    keep = torch.zeros_like(wanted).scatter_(-1, ranked, wanted)
    return torch.where(keep | fixed, 0, SKIP).to(torch.int8)
