"""Threshold: one threshold of draft mass for a whole head, so that rows share the head's budget.

Source: DraftAttention (arXiv 2505.14708). The pairs of blocks with the largest mass of a head are
exact, floor(density * nq * nk) of them: rows whose mass is spread over many blocks leave more of
the budget to rows that put it into few. With `apart`, as published: forced pairs (text) take no
part, neither in the mass of a row nor in the count, and the mass is that of pooled tiles, softmax
over them without their sizes, as each counts as one pair; counted as tokens, large tiles would be
chosen for their size, and cost more than the density. Of the n others all are exact that are not
below the floor((1 - density) n)-th smallest, which are n - floor((1 - density) n) + 1.
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
    """min_blocks: exact blocks that every row gets at least, >= 1. apart: forced ones are no part
    of the budget."""

    name: str = "threshold"
    min_blocks: int = 1
    apart: bool = False
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
    count: int | Tensor = max(1, int(density * nq * nk + 1e-9))
    if params.apart:
        out = forced.expand_as(scores.value)
        if scores.kind == "mass":
            mass = scores.value.masked_fill(out, 0.0)
            mass = mass / mass.sum(-1, keepdim=True).clamp(min=TINY)
        else:
            mass = torch.softmax(scores.value.masked_fill(out, float("-inf")), -1)
        pairs = nq * nk - out.flatten(-2).sum(-1, keepdim=True)
        below = ((1 - density) * pairs.double() + 1e-9).long().clamp(min=1)
        count = nq * nk - below + 1
    else:
        mass = scores.mass(k_blocks)
    mass = mass.float().nan_to_num(0.0)
    rows = mass.masked_fill(forced, float("inf")) if params.apart else mass
    first = largest(rows, min(nk, params.min_blocks)) | forced
    ranked = mass.masked_fill(first, float("inf")).flatten(-2)
    keep = largest(ranked, count).view(mass.shape) | first
    return torch.where(keep, 0, SKIP).to(torch.int8)


TINY = 1e-37
"""Mass of a row in which all is forced."""


def largest(x: Tensor, k: int | Tensor) -> Tensor:
    """bool like x: the k >= 1 largest of the last axis, of equals those that come first.

    k: int64 [..., 1] where it depends on what a GPU holds.
    """
    if isinstance(k, Tensor):
        bound = x.sort(dim=-1, descending=True).values.gather(-1, k - 1)
    else:
        bound = x.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = x > bound, x == bound
    missing = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= missing))
