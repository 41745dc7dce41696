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

from vidsparse import inside
from vidsparse.config import require
from vidsparse.draft import TINY, Draft, pieces, strips
from vidsparse.kernels.gpu import support
from vidsparse.plan import ScoreKind, Scores


@dataclass(frozen=True)
class Params:
    """gamma: scores are divided by n_j^gamma, in [0, 2]; 1: what a block loses per token of it."""

    name: str = "ear"
    gamma: float = 0.0
    kind: ClassVar[ScoreKind] = "rank"
    spread: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = True
    one_launch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 <= self.gamma <= 2, "estimator.gamma", self.gamma, "a number in [0, 2]")

    def products(self, block_q: int, block_k: int, heads: int) -> tuple[float, float]:
        """Scored pairs of all queries and keys, and numbers in each product by head dim."""
        return 1 / block_q, 1


def estimate(draft: Draft, params: Params) -> Scores:
    """Errors float32 [B, H, nq, nk], which compare inside a row alone. Formula above.

    In Triton their logarithms, without Z_i.
    """
    counts = draft.k_blocks.on(draft.q.device).count
    if draft.in_triton:
        logs = _in_triton(draft)
        value = logs - params.gamma * counts.to(logs).log() if params.gamma else logs
        return Scores(value, params.kind, logits=lambda: draft.logits)
    _, real = inside.slots(draft.k_blocks, draft.q.device)
    of_blocks = draft.q_means * draft.scale, draft.k_means

    def errors(b: int, h: int) -> Tensor:
        q_means, k_means = (x.select(0, b).select(0, h) for x in of_blocks)
        k, v = inside.keys(draft, b, h), inside.values(draft, b, h)
        return _errors(q_means, k_means, k.flatten(0, 1), v, real.logical_not())

    value = inside.by_head(draft, errors).float()
    if params.gamma:
        value = value / counts.to(value).pow(params.gamma)
    return Scores(value, params.kind, logits=lambda: draft.logits)


def _in_triton(draft: Draft) -> Tensor:
    """ln(score_ij Z_i^2), all heads in one launch."""
    kernels = support.kernels("block_errors", draft.k)
    place = *pieces(draft.k_blocks, 1, draft.k.device), draft.k_blocks.size, draft.order_k
    found: Tensor = kernels.block_errors(draft.q_means, draft.k, draft.v, *place, draft.scale, TINY)
    return found


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
