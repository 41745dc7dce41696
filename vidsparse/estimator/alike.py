"""SpargeAttn's scores: block means where a block is alike in itself, and all of it elsewhere.

The likeness of a block is the mean cosine of all pairs of its n tokens, |sum x / |x||^2 / n^2, of
queries as they are and of keys without their mean over all tokens, which no softmax sees. The
mean stands for a block of which it is above `least`; other key blocks take no part in the softmax
and are exact for all, other query blocks read everything. Source: SpargeAttn (arXiv 2502.18137).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from vidsparse import inside
from vidsparse.config import require
from vidsparse.draft import Draft
from vidsparse.plan import ScoreKind, Scores


@dataclass(frozen=True)
class Params:
    """least: likeness from which a mean stands for its block, in [-1, 1]; -1: always."""

    name: str = "alike"
    least: float = 0.6
    kind: ClassVar[ScoreKind] = "logit"
    spread: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(-1 <= self.least <= 1, "estimator.least", self.least, "a number in [-1, 1]")


def estimate(draft: Draft, params: Params) -> Scores:
    """Logits float32 [B, H, nq, nk], -inf where a key block's mean says nothing; what is exact."""
    device = draft.q.device
    _, real_q = inside.slots(draft.q_blocks, device)
    _, real_k = inside.slots(draft.k_blocks, device)

    def of_queries(b: int, h: int) -> Tensor:
        return likeness(inside.queries(draft, b, h), real_q)

    def of_keys(b: int, h: int) -> Tensor:
        keys = inside.keys(draft, b, h)
        mean = keys.sum((0, 1)) / draft.k_blocks.tokens
        return likeness((keys - mean).masked_fill(real_k.logical_not().unsqueeze(-1), 0.0), real_k)

    stands_q = inside.by_head(draft, of_queries) > params.least
    stands_k = (inside.by_head(draft, of_keys) > params.least).unsqueeze(-2)
    value = draft.logits.masked_fill(stands_k.logical_not(), float("-inf"))
    return Scores(value, params.kind, exact=(stands_q.unsqueeze(-1) & stands_k).logical_not())


def likeness(x: Tensor, real: Tensor) -> Tensor:
    """[n] of x [n, size, D]: tokens of zeros are alike, and like no other."""
    unit, count = normalize(x, dim=-1, eps=1e-30), real.sum(-1).to(x)
    zero = ((x == 0).all(-1) & real).sum(-1).to(x)
    return (unit.sum(1).square().sum(-1) + zero.square()) / count.square()
