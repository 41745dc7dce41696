"""What a sparse call should have read and what it did: true block mass, draft, recall, error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vidsparse import registry
from vidsparse.blocks import Blocks
from vidsparse.config import SparseConfig
from vidsparse.draft import Draft
from vidsparse.pipelines.observation import ObservedCall
from vidsparse.plan import SKIP, BlockPlan

STRIP = 2**24
"""Numbers of a strip of the attention matrix that is held at once."""


@dataclass(frozen=True)
class Truth:
    """Of full attention of one head. mass: [nq, nk], mean over the queries of a query block of the
    softmax weight on a key block; rows sum to 1. error: ||out - full|| / ||full||, relative L2.
    """

    mass: Tensor
    error: float


@dataclass(frozen=True)
class HeadFigures:
    """Of one head of a call, all shares of 1.

    recall: true mass of the key blocks that the plan lists, mean over queries. best: the most that
    as many blocks per row could have. error: of the output, relative L2. density: kept work.
    """

    recall: float
    best: float
    error: float
    density: float


def truth(q: Tensor, k: Tensor, v: Tensor, out: Tensor, cuts: tuple[Blocks, Blocks]) -> Truth:
    """Full attention of one head in strips of query blocks, in float32; float64 stays float64.

    q, k, v, out: [tokens, D], in the order that the blocks (of queries, of keys) cut.
    """
    q_blocks, k_blocks = cuts
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v, out = (x.to(dtype) for x in (q, k, v, out))
    q = q * q.shape[-1] ** -0.5
    count = k_blocks.on(q.device).count.to(dtype)
    mass = q.new_empty(len(q_blocks), len(k_blocks))
    missed = total = 0.0
    ends = (q_blocks.start + q_blocks.count).tolist()
    together = max(1, STRIP // (k.shape[0] * q_blocks.size))
    for first in range(0, len(q_blocks), together):
        last = min(first + together, len(q_blocks))
        begin = int(q_blocks.start[first])
        weight = torch.softmax(q[begin : ends[last - 1]] @ k.mT, -1)
        rows = k_blocks.mean(weight.mT).mT * count
        for block in range(first, last):
            own = slice(int(q_blocks.start[block]) - begin, ends[block] - begin)
            mass[block] = rows[own].mean(0)
        full = weight @ v
        missed += float((out[begin : ends[last - 1]] - full).double().square().sum())
        total += float(full.double().square().sum())
    return Truth(mass, (missed / total) ** 0.5 if total else 0.0)


def draft(call: ObservedCall, plan: BlockPlan, config: SparseConfig, heads: list[int]) -> Tensor:
    """float32 [heads, nq, nk]: what the estimator has told the selector, as shares of each row.

    Mass, or the scores themselves of an estimator that only ranks. All heads are asked: one may
    know of the others. A row in which no mean says anything is 0.
    """
    q, k, v = (x[:1].transpose(1, 2) for x in (call.q, call.k, call.v))
    order_q, order_k = (
        None if order is None else order[:1] for order in (plan.order_q, plan.order_k)
    )
    given = Draft(q, k, v, plan.q_blocks, plan.k_blocks, order_q, order_k)
    scores = registry.method("estimator", config.estimator.name).estimate(given, config.estimator)
    if scores.kind == "rank":
        value = scores.value
        value = value if bool((value >= 0).all()) else (value - value.amax(-1, keepdim=True)).exp()
        shares: Tensor = value / value.sum(-1, keepdim=True).clamp(min=1e-30)
        return shares[0, heads]
    mass: Tensor = scores.mass(plan.k_blocks)
    return mass[0, heads].float().nan_to_num(0.0)


def figures(found: Truth, plan: BlockPlan, head: int) -> HeadFigures:
    """Of one head; batch item 0."""
    listed = plan.levels[0, head] != SKIP
    weight = plan.q_blocks.on(listed.device).count.double()
    mass = found.mass.double()
    read = (mass * listed).sum(-1)
    places = torch.arange(listed.shape[1], device=listed.device)
    most = mass.sort(-1, descending=True).values
    best = (most * (places < listed.sum(-1, keepdim=True))).sum(-1)
    recall, best = ((x @ weight / weight.sum()) for x in (read, best))
    return HeadFigures(float(recall), float(best), found.error, float(plan.density[0, head]))
