"""Error-aware scores: what the mean query of a row would lose if a block gave only its centroid.

    score_ij = sum_{n in j} | exp(s qbar_i . k_n) v_n - exp(s qbar_i . kbar_j) vbar_j |^2 / Z_i^2

with a Z_i of the row, which does not change what is compared. A block is worth reading where its
mass is large and keys and values differ inside it: one that its centroid describes is not, however
large its mass. Source: SVG-EAR (arXiv 2603.08982). Costs 1 / block_q of a dense call's first
product and exponentials, and reads the values.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.draft import Draft, strips
from vidsparse.plan import ScoreKind, Scores


@dataclass(frozen=True)
class Params:
    """No settings."""

    name: str = "ear"
    kind: ClassVar[ScoreKind] = "rank"
    spread: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = True


def estimate(draft: Draft, params: Params) -> Scores:
    """Errors float32 [B, H, nq, nk], which compare inside a row alone. Formula above."""
    batch, heads = draft.q.shape[:2]
    cut, size = draft.k_blocks.on(draft.q.device), draft.k_blocks.size
    inside = torch.arange(size, device=draft.q.device)
    padding = inside >= cut.count.unsqueeze(1)
    slots = cut.start.unsqueeze(1) + inside.masked_fill(padding, 0)
    scaled = draft.q_means * draft.scale
    order = None if draft.order_k is None else draft.order_k.expand(batch, heads, -1)
    found = []
    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        at = slots.flatten()
        if order is not None:
            at = _head(order, b, h).index_select(0, at)
        k, v = (_head(x, b, h).index_select(0, at).to(scaled.dtype) for x in (draft.k, draft.v))
        v = v.view(*slots.shape, -1).masked_fill(padding.unsqueeze(-1), 0.0)
        found.append(_errors(_head(scaled, b, h), _head(draft.k_means, b, h), k, v, padding))
    return Scores(torch.stack(found).unflatten(0, (batch, heads)).float(), params.kind)


def _head(x: Tensor, batch: int, head: int) -> Tensor:
    return x.select(0, batch).select(0, head)


def _errors(q_means: Tensor, k_means: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    """Of one head, [nq, nk]. q_means [nq, D], scaled; k [nk * size, D], v [nk, size, D],
    zero where a slot is `padding` [nk, size].

    Z_i is the sum over all tokens and all centroids, so that one softmax over both gives both.
    """
    count, slots = padding.logical_not().sum(1).to(v), len(k)
    v_means = v.sum(1) / count.unsqueeze(1)
    squares, crosses = v.square().sum(-1, keepdim=True), v @ v_means.unsqueeze(-1)
    whole, columns = count * v_means.square().sum(-1), torch.cat([k, k_means]).mT
    padded, found = padding.flatten(), []
    for rows in strips(len(q_means), columns.shape[1]):
        some = rows.start, rows.stop - rows.start
        weight = q_means.narrow(0, *some) @ columns
        weight.narrow(1, 0, slots).masked_fill_(padded, float("-inf"))
        weight = torch.softmax(weight, -1)
        exact = weight.narrow(1, 0, slots).unflatten(1, padding.shape).transpose(0, 1)
        far = weight.narrow(1, slots, len(padding))
        crossed, squared = (exact @ crosses).squeeze(-1).T, (exact.square() @ squares).squeeze(-1).T
        errors = squared - 2 * far * crossed + far.square() * whole
        found.append(errors.clamp_(min=0))
    return torch.cat(found)
