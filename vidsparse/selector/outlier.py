"""Outlier: blocks that stand out of their row are exact, as many as there are.

    score_ij > mu_i + tau sigma_i,   mu_i, sigma_i: mean and deviation of the scores of row i

over the key blocks of the video. Of scores between block means that is the rule of Sol-Attn (arXiv
2607.24027), whose budget follows the row without a sort: a row of even scores has no outlier, a
row with a few hot blocks has those. Its neighbours and sinks are `force.neighbours` and
`force.sinks`. `schedule.density` caps a row, best scores first.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.config import require
from vidsparse.plan import SKIP, Scores


@dataclass(frozen=True)
class Params:
    """tau: deviations above the mean, in [0, 100]. min_blocks: exact blocks that every row gets at
    least, >= 1."""

    name: str = "outlier"
    tau: float = 2.0
    min_blocks: int = 1
    levels: ClassVar[tuple[int, ...]] = (0,)
    spends_budget: ClassVar[bool] = False
    needs_mass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(0 <= self.tau <= 100, "selector.tau", self.tau, "a number in [0, 100]")
        require(self.min_blocks >= 1, "selector.min_blocks", self.min_blocks, "an integer >= 1")


def select(
    scores: Scores, forced: Tensor, density: float, k_blocks: Blocks, params: Params
) -> Tensor:
    """Levels 0 and SKIP, int8 [B, H, nq, nk]. Forced blocks come first."""
    nk = len(k_blocks)
    cap = max(params.min_blocks, int(density * nk + 1e-9))
    text = k_blocks.on(scores.value.device).text
    count = max(1, int((~k_blocks.text).sum()))
    value = scores.value.masked_fill(text, 0.0)
    mean = value.sum(-1, keepdim=True) / count
    around = (value - mean).masked_fill(text, 0.0)
    wanted = around > params.tau * (around.square().sum(-1, keepdim=True) / count).sqrt()
    ranked = scores.ranked(forced)
    rank = torch.arange(nk, device=ranked.device)
    wanted = ((rank < params.min_blocks) | wanted.gather(-1, ranked)) & (rank < cap)
    keep = torch.zeros_like(wanted).scatter_(-1, ranked, wanted)
    return torch.where(keep | forced, 0, SKIP).to(torch.int8)
