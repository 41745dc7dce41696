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


def estimate(draft: Draft, params: Params) -> Scores:
    """Errors float32 [B, H, nq, nk], which compare inside a row alone. Formula above."""
    batch, heads = draft.q.shape[:2]
    out = draft.q.new_empty(batch, heads, *map(len, (draft.q_blocks, draft.k_blocks))).float()
    cut, size = draft.k_blocks.on(draft.q.device), draft.k_blocks.size
    inside = torch.arange(size, device=draft.q.device)
    real = inside < cut.count[:, None]
    slots = cut.start[:, None] + torch.where(real, inside, 0)
    scaled = draft.q_means * draft.scale
    for place in ((b, h) for b in range(batch) for h in range(heads)):
        order = draft.order_k
        if order is not None:
            order = order[place] if order.ndim == 3 else order
        at = (slots if order is None else order[slots]).flatten()
        k, v = (x[place].index_select(0, at).to(scaled) for x in (draft.k, draft.v))
        v = v.view(*slots.shape, -1).masked_fill(~real[..., None], 0.0)
        _errors(scaled[place], draft.k_means[place], k, v, real, out[place])
    return Scores(out, params.kind)


def _errors(
    q_means: Tensor, k_means: Tensor, k: Tensor, v: Tensor, real: Tensor, out: Tensor
) -> None:
    """Of one head into out [nq, nk]. q_means [nq, D], scaled; k [nk * size, D], v [nk, size, D],
    zero where a slot is not `real` [nk, size].

    Z_i is the sum over all tokens and all centroids, so that one softmax over both gives both.
    """
    count, slots = real.sum(1).to(v), len(k)
    v_means = v.sum(1) / count[:, None]
    squares, crosses = v.square().sum(-1, keepdim=True), v @ v_means[..., None]
    whole, columns = count * v_means.square().sum(-1), torch.cat([k, k_means]).mT
    padded = ~real.flatten()
    for rows in strips(len(q_means), columns.shape[1]):
        weight = q_means[rows] @ columns
        weight[:, :slots].masked_fill_(padded, float("-inf"))
        weight = torch.softmax(weight, -1)
        exact, far = weight[:, :slots].unflatten(1, real.shape).transpose(0, 1), weight[:, slots:]
        crossed = (exact @ crosses)[..., 0].T
        errors = (exact.square() @ squares)[..., 0].T - 2 * far * crossed + far.square() * whole
        out[rows] = errors.clamp_(min=0)
