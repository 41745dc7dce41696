"""Pyramid: the best blocks exact, the next ones at pooled levels, like the mip levels of a texture.

Source: PSA (arXiv 2512.04025), `multi_quota` and `multi_topp` of its cards.
mode "quota": by rank. `shares` splits the budget: level l gets the next share_l * density * 2^l of
the
    row's blocks, so that the row costs `density` whatever the levels are.
mode "mass": by cumulative mass. The sorted row is cut where the mass reaches `mass`[l] (the
crossing block
    belongs to the finer level); beyond the last boundary blocks are left to the compensation.
    `schedule.density` caps the cost of a row.
No block is read coarser than `Scores.coarsest` allows.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vidsparse.blocks import Blocks
from vidsparse.config import require
from vidsparse.kernels.gpu import support
from vidsparse.plan import SKIP, Scores

MODES = ("quota", "mass")


@dataclass(frozen=True)
class Params:
    """levels: ascending, starting with 0, each at most log2(block_k). mode: quota | mass.

    shares: part of the budget that each level spends, positive, sum 1 (mode quota).
    mass: ascending boundaries in (0, 1] (mode mass). min_blocks: exact blocks per row at least, >=
    1. min_share: in [0, 1); above 0, floor(min_share * nk) + 1 are exact at least (mode mass).
    """

    name: str = "pyramid"
    mode: str = "quota"
    levels: tuple[int, ...] = (0, 3)
    shares: tuple[float, ...] = (0.65, 0.35)
    mass: tuple[float, ...] = (0.6, 0.9)
    min_blocks: int = 1
    min_share: float = 0.0

    def __post_init__(self) -> None:
        for key in ("levels", "shares", "mass"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        levels, n = self.levels, len(self.levels)
        require(self.mode in MODES, "selector.mode", self.mode, ", ".join(MODES))
        rising = all(a < b for a, b in pairwise(levels))
        ok = n >= 1 and levels[0] == 0 and rising and levels[-1] <= 9
        require(ok, "selector.levels", levels, "ascending integers 0 .. 9 that start with 0")
        if self.mode == "quota":
            ok = len(self.shares) == n and min(self.shares) > 0 and abs(sum(self.shares) - 1) < 1e-6
            require(
                ok, "selector.shares", self.shares, f"{n} positive numbers (one per level), sum 1"
            )
        else:
            rising = all(a <= b for a, b in pairwise(self.mass))
            ok = len(self.mass) == n and self.mass[0] > 0 and self.mass[-1] <= 1 and rising
            require(
                ok, "selector.mass", self.mass, f"{n} ascending numbers in (0, 1], one per level"
            )
        require(self.min_blocks >= 1, "selector.min_blocks", self.min_blocks, "an integer >= 1")
        ok = 0 <= self.min_share < 1
        require(ok, "selector.min_share", self.min_share, "a number in [0, 1)")

    def least(self, nk: int) -> int:
        """Exact blocks of a row, at least."""
        by_share = int(self.min_share * nk + 1e-9) + 1 if self.mode == "mass" else 0
        return max(self.min_blocks, by_share if self.min_share > 0 else 0)

    @property
    def spends_budget(self) -> bool:
        """True if the density is known before planning; mode "mass" decides by content."""
        return self.mode == "quota"

    @property
    def needs_mass(self) -> bool:
        """Only boundaries of mass do."""
        return self.mode == "mass"


def select(
    scores: Scores, forced: Tensor, density: float, k_blocks: Blocks, params: Params
) -> Tensor:
    """Levels of `params.levels` or SKIP, int8 [B, H, nq, nk]."""
    top, nk = k_blocks.levels, len(k_blocks)
    require(
        params.levels[-1] <= top, "selector.levels", params.levels, f"at most {top} = log2(block_k)"
    )
    plain = scores.coarsest is None and forced.ndim == 2
    if plain and (triton := support.kernels("select", scores.value)):
        return _select_in_triton(triton, scores, forced, density, k_blocks, params)
    by_mass = params.mode == "mass"
    ranked = (scores.weighted(k_blocks) if by_mass else scores).ranked(forced)
    rank = torch.arange(nk, device=ranked.device)
    fixed = forced.expand_as(ranked).gather(-1, ranked) | (rank < params.least(nk))
    by_rank = torch.full_like(ranked, SKIP)
    if by_mass:
        mass = scores.mass(k_blocks).double().nan_to_num(0.0).gather(-1, ranked)
        before = pad(mass.cumsum(-1), (1, 0)).narrow(-1, 0, nk)
        total = mass.sum(-1, keepdim=True)
        ends = [before < bound * total - 1e-12 for bound in params.mass]
    else:
        ends = [rank < end for end in _quota_ends(density, nk, params)]
    for level, inside in reversed([*zip(params.levels, ends, strict=True)]):
        by_rank = torch.where(inside, level, by_rank)
    if scores.coarsest is not None:
        cap = _listed(scores.coarsest, params.levels).unsqueeze(-2).expand_as(ranked)
        by_rank = torch.minimum(by_rank, cap.gather(-1, ranked))
    by_rank = torch.where(fixed, 0, by_rank)
    cost = torch.where(by_rank == SKIP, 0.0, 0.5 ** by_rank.double()).cumsum(-1)
    by_rank = torch.where((cost > density * nk + 1e-9) & fixed.logical_not(), SKIP, by_rank)
    return torch.empty_like(by_rank, dtype=torch.int8).scatter_(-1, ranked, by_rank.to(torch.int8))


def _select_in_triton(
    triton: Any, scores: Scores, forced: Tensor, density: float, k_blocks: Blocks, params: Params
) -> Tensor:
    """`select` on a GPU."""
    nk, value = len(k_blocks), scores.value
    last = params.least(nk), density * nk
    if params.mode == "quota":
        ends = _quota_ends(density, nk, params)
        levels: Tensor = triton.select_quota(value, forced, params.levels, ends, *last)
        return levels
    count = k_blocks.on(value.device).count
    levels = triton.select_mass(
        value, scores.kind, forced, count, params.levels, params.mass, *last
    )
    return levels


def _quota_ends(density: float, nk: int, params: Params) -> list[int]:
    """The rank at which each level ends; a row that follows them costs the budget."""
    ends, end = [], 0.0
    for level, share in zip(params.levels, params.shares, strict=True):
        end += share * density * nk * 2**level
        ends.append(min(nk, int(end + 1e-9)))
    return ends


def _listed(coarsest: Tensor, levels: tuple[int, ...]) -> Tensor:
    """int64 like coarsest: the last of the levels that is no coarser."""
    return sum(
        ((coarsest >= level).long() * (level - last) for last, level in pairwise(levels)),
        torch.zeros_like(coarsest, dtype=torch.int64),
    )
