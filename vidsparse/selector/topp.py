"""Top-p: the smallest set of key blocks that reaches the mass p of a row is exact.

Source: SVG2 (arXiv 2505.18875), XAttention (arXiv 2503.16428). Peaky rows take few blocks, flat
rows many; `schedule.density` caps a row, so that the cost is bounded. Blocks come in the order of
their mass, n_j exp(score_ij): a short one comes after a full one of the same score.

Of scores that know clusters, the smallest set of key clusters that reaches the mass p of a query
cluster is chosen, and a row reads the blocks that they touch, those of most mass if they are more
than the cap.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vidsparse.blocks import Blocks
from vidsparse.clusters import ClusterScores
from vidsparse.config import require
from vidsparse.kernels.gpu import support
from vidsparse.plan import SKIP, Scores


@dataclass(frozen=True)
class Params:
    """p: mass to reach, in (0, 1]. min_blocks: exact blocks that every row gets at least, >= 1;
    min_share: and at least that share of the blocks (or clusters), rounded down, in [0, 1).
    inclusive: whether the block (cluster) with which the mass is reached belongs to the set; if it
    does not, the set is that of the whole row, beside what is forced."""

    name: str = "topp"
    p: float = 0.9
    min_blocks: int = 1
    min_share: float = 0.0
    inclusive: bool = True
    levels: ClassVar[tuple[int, ...]] = (0,)
    spends_budget: ClassVar[bool] = False
    needs_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 < self.p <= 1, "selector.p", self.p, "a number in (0, 1]")
        require(self.min_blocks >= 1, "selector.min_blocks", self.min_blocks, "an integer >= 1")
        ok = 0 <= self.min_share < 1
        require(ok, "selector.min_share", self.min_share, "a number in [0, 1)")


def select(
    scores: Scores, forced: Tensor, density: float, k_blocks: Blocks, params: Params
) -> Tensor:
    """Levels 0 and SKIP, int8 [B, H, nq, nk]. Forced blocks come first and their mass counts.

    Of a set that stops before the mass is reached that would lose the block which has most of it:
    there forced blocks are among all others, and the best `min_blocks` of all are exact.
    """
    nk = len(k_blocks)
    cap = max(params.min_blocks, int(density * nk + 1e-9))
    if scores.clusters is not None:
        return _of_clusters(scores, scores.clusters, forced, cap, params)
    least = min(cap, max(params.min_blocks, int(params.min_share * nk + 1e-9)))
    plain = params.inclusive and forced.ndim == 2
    if plain and (triton := support.kernels("select", scores.value)):
        count = k_blocks.on(scores.value.device).count
        levels: Tensor = triton.select_topp(
            scores.value, scores.kind, forced, count, params.p, least, cap
        )
        return levels
    mass, weighted = scores.mass(k_blocks), scores.weighted(k_blocks)
    ranked = weighted.ranked(forced)
    rank = torch.arange(nk, device=mass.device)
    if params.inclusive:
        wanted = ((rank < least) | _prefix(mass, ranked, params)) & (rank < cap)
    else:
        capped = torch.zeros_like(ranked).scatter_(-1, ranked, rank.expand_as(ranked)) < cap
        ranked = weighted.ranked(torch.zeros_like(forced))
        wanted = (rank < least) | _prefix(mass, ranked, params)
        wanted = wanted & (capped.gather(-1, ranked) | (rank < params.min_blocks))
    keep = torch.zeros_like(wanted).scatter_(-1, ranked, wanted)
    return torch.where(keep | forced, 0, SKIP).to(torch.int8)


def _prefix(mass: Tensor, ranked: Tensor, params: Params) -> Tensor:
    """bool [..., n], by rank: those that it takes to reach the mass p. ranked: int64, their ids."""
    mass = mass.double().nan_to_num(0.0)
    wanted_mass = params.p * mass.sum(-1, keepdim=True)
    reached = mass.gather(-1, ranked).cumsum(-1)
    if not params.inclusive:
        return reached <= wanted_mass + 1e-12
    before = pad(reached, (1, 0)).narrow(-1, 0, mass.shape[-1])
    return before < wanted_mass - 1e-12


def _of_clusters(
    scores: Scores, clusters: ClusterScores, forced: Tensor, cap: int, params: Params
) -> Tensor:
    """int8 [B, H, nq, nk]. Text is in no cluster: what is not forced of it is not read."""
    mass, device = clusters.mass, scores.value.device
    ranked = Scores(mass, "mass").ranked(torch.zeros_like(mass, dtype=torch.bool))
    least = max(1, int(params.min_share * mass.shape[-1] + 1e-9))
    wanted = torch.arange(mass.shape[-1], device=device) < least
    wanted = wanted | _prefix(mass, ranked, params)
    chosen = torch.zeros_like(wanted).scatter_(-1, ranked, wanted)
    keep = scores.touched(chosen, forced, params.min_blocks, cap)
    return torch.where(keep | forced, 0, SKIP).to(torch.int8)
