"""Tilt: the centroid with the mass that its block's variance adds, and first order by drafted mass.

    log weight of block j for row i: s q_t . kbar_j + ln n_j + min(bound, spread_ij)
    F_t = s G_t (q_t H_i),  H_i = sum_j w_ij H_j / n_j

The centroid alone understates the mass of a block (Jensen); half of the drafted variance of its
logits is what second order adds (`vidsparse.draft`). The first-order moment of a row weighs every
block by its drafted mass w_ij, where Taylor's "global" takes all blocks alike (formulas in
`vidsparse.kernels`).
"""

from dataclasses import dataclass
from typing import ClassVar

from vidsparse.config import require
from vidsparse.draft import Draft
from vidsparse.plan import BlockPlan, FirstOrder


@dataclass(frozen=True)
class Params:
    """bound: largest spread that is added, > 0 (natural log)."""

    name: str = "tilt"
    bound: float = 2.0
    first_order: ClassVar[FirstOrder] = "row"
    centroids: ClassVar[bool] = True
    spread: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.bound > 0, "compensation.bound", self.bound, "a number > 0")


def complete(plan: BlockPlan, draft: Draft, params: Params) -> BlockPlan:
    """`rest` = the centroid level, with bias and first-order term of each row."""
    # what is not finite in a query or a key stays where the executor finds it
    if draft.in_triton:
        bias = draft.in_one_pass("spread", params.bound)
    else:
        bias = draft.spread.nan_to_num(0.0).clamp(max=params.bound)
    return plan.with_rest(plan.k_blocks.levels, "row", bias)
