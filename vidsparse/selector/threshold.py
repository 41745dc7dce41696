"""Threshold: one threshold of draft mass for a whole head, so that rows share the head's budget.

Source: DraftAttention (arXiv 2505.14708). The floor(density * nq * nk) pairs of blocks with the
largest mass of a head are exact: rows whose mass is spread over many blocks leave more of the
budget to rows that put it into few.
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
    """min_blocks: exact blocks that every row gets at least, >= 1."""

    name: str = "threshold"
    min_blocks: int = 1
    levels: ClassVar[tuple[int, ...]] = (0,)
    spends_budget: ClassVar[bool] = True
    needs_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.min_blocks >= 1, "selector.min_blocks", self.min_blocks, "an integer >= 1")


def select(
    scores: Scores, forced: Tensor, density: float, k_blocks: Blocks, params: Params
) -> Tensor:
    """Levels 0 and SKIP, int8 [B, H, nq, nk]; forced blocks and the rows' minimum come first.

    If these alone are more than the budget, all of them are kept.
    """
    nq, nk = scores.value.shape[-2:]
    mass = scores.mass(k_blocks).float().nan_to_num(0.0)
    first = largest(mass, min(nk, params.min_blocks)) | forced
    ranked = mass.masked_fill(first, float("inf")).flatten(-2)
    keep = largest(ranked, max(1, int(density * nq * nk + 1e-9))).view(mass.shape) | first
    return torch.where(keep, 0, SKIP).to(torch.int8)


def largest(x: Tensor, k: int) -> Tensor:
    """bool like x: the k largest of the last axis, of equals those that come first."""
    bound = x.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = x > bound, x == bound
    missing = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= missing))
