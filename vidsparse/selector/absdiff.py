"""Absdiff: blocks whose score is at most theta below an anchor are exact.

    score_ij >= anchor_i - theta

Logits are logarithms, so that theta means the same in every row, without a sort or a sum: e^-theta
of the anchor's weight. anchor "near": the best score of the forced blocks of a row, such as its own
block, a sink, text, where AnchorAttention expects the maximum; the best of the row where nothing is
forced. "row": the best of the row. "zero": 0, for scores that stand against a reference of their
own. Scores of mass are taken by their logarithm. `schedule.density` caps a row, best scores first.
Source: AnchorAttention; SALE and BLASST have the same rule, of scores of estimator `relative`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.config import require
from vidsparse.plan import SKIP, Scores

ANCHORS = ("near", "row", "zero")


@dataclass(frozen=True)
class Params:
    """theta: natural log, any finite number. anchor: near | row | zero. min_blocks: exact blocks
    that every row gets at least, >= 1."""

    name: str = "absdiff"
    theta: float = 4.0
    anchor: str = "near"
    min_blocks: int = 1
    levels: ClassVar[tuple[int, ...]] = (0,)
    spends_budget: ClassVar[bool] = False
    needs_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(abs(self.theta) < float("inf"), "selector.theta", self.theta, "a finite number")
        require(self.anchor in ANCHORS, "selector.anchor", self.anchor, ", ".join(ANCHORS))
        require(self.min_blocks >= 1, "selector.min_blocks", self.min_blocks, "an integer >= 1")


def select(
    scores: Scores, forced: Tensor, density: float, k_blocks: Blocks, params: Params
) -> Tensor:
    """Levels 0 and SKIP, int8 [B, H, nq, nk]. Forced blocks come first."""
    nk, value = len(k_blocks), scores.value
    cap = max(params.min_blocks, int(density * nk + 1e-9))
    if scores.kind == "mass":
        value = value.log()
    ranked = scores.ranked(forced)
    rank = torch.arange(nk, device=ranked.device)
    wanted = value >= _anchor(value, forced, params) - params.theta
    wanted = ((rank < params.min_blocks) | wanted.gather(-1, ranked)) & (rank < cap)
    keep = torch.zeros_like(wanted).scatter_(-1, ranked, wanted)
    return torch.where(keep | forced, 0, SKIP).to(torch.int8)


def _anchor(value: Tensor, forced: Tensor, params: Params) -> Tensor:
    """[B, H, nq, 1]."""
    best = value.amax(-1, keepdim=True)
    if params.anchor == "zero":
        return torch.zeros_like(best)
    if params.anchor == "row":
        return best
    near = value.masked_fill(forced.logical_not(), float("-inf")).amax(-1, keepdim=True)
    return torch.where(forced.any(-1, keepdim=True), near, best)
