"""Rectify: a block that is left out gives its mean value with its drafted share, or nothing.

With P_ij the drafted mass of row i (estimator `split`), and block j left out,

    compensated:  |qbar_i . kbar_j|  >  |dq_i . kbar_j| + |qbar_i . dk_j|      (gain > error)
    counted:      all others

dq_i, dk_j the mean of |q - qbar_i|, |k - kbar_j| over a block, element by element. Then

    O_t = R_i O_t(exact) + sum_{compensated j} P_ij vbar_j,   R_i = sum of P_ij over all others

so that the mass of a counted block goes to what is exact. Without the gate every block that is left
out is compensated, which is worse than nothing where attention is flat. Text is never compensated.
Source: Rectified SpaAttn (IPAR and GAPR).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse import inside
from vidsparse.draft import Draft
from vidsparse.plan import SKIP, BlockPlan, FirstOrder


@dataclass(frozen=True)
class Params:
    """gate: whether a block must gain more than it may err."""

    name: str = "rectify"
    gate: bool = True
    first_order: ClassVar[FirstOrder] = "none"
    centroids: ClassVar[bool] = False
    spread: ClassVar[bool] = False
    blend: ClassVar[bool] = True


def complete(plan: BlockPlan, draft: Draft, params: Params) -> BlockPlan:
    """`rest` = SKIP, and the blend of each row."""
    mass = torch.softmax(inside.split_logits(draft), -1)
    left = (plan.levels == SKIP) & draft.k_blocks.on(draft.q.device).text.logical_not()
    if params.gate:
        left = left & gains(draft)
    values = draft.means_of(draft.v, draft.k_blocks, draft.order_k)
    given = mass.masked_fill(left.logical_not(), 0.0)
    share = (mass - given).sum(-1)
    sane = share.isfinite()  # what is not finite stays where the executor finds it
    share = torch.where(sane & left.any(-1), share, 1.0).clamp(min=1e-37)
    given = given.masked_fill(sane.logical_not().unsqueeze(-1), 0.0)
    offset = torch.matmul(given, values.to(given))
    return plan.with_rest(SKIP).with_blend(share, offset)


def gains(draft: Draft) -> Tensor:
    """bool [B, H, nq, nk]: where a block's mean says more than what it leaves out may say."""
    around_q = _around(draft.q_means, draft, "q")
    around_k = _around(draft.k_means, draft, "k")
    gain = torch.matmul(draft.q_means, draft.k_means.mT).abs()
    errors = (
        torch.matmul(around_q, draft.k_means.mT).abs()
        + torch.matmul(draft.q_means, around_k.mT).abs()
    )
    return gain > errors


def _around(means: Tensor, draft: Draft, which: str) -> Tensor:
    """[B, H, n, D]: mean of |x - its block's mean|."""
    blocks, tokens = (
        (draft.q_blocks, inside.queries) if which == "q" else (draft.k_blocks, inside.keys)
    )
    _, real = inside.slots(blocks, draft.q.device)

    def one(b: int, h: int) -> Tensor:
        mean = means.select(0, b).select(0, h).unsqueeze(1)
        far = (tokens(draft, b, h) - mean).abs()
        far = far.masked_fill(real.logical_not().unsqueeze(-1), 0.0)
        return far.sum(1) / real.sum(1).to(far).unsqueeze(-1)

    return inside.by_head(draft, one)
