"""Hier: first among super-blocks, then among the pieces of the blocks of the best of them.

A super-block is `span` consecutive key blocks; the share `keep` of them with the largest logit
s qbar_i . kbar goes on. A block of these scores as in estimator `mean` with sub-blocks of keys,

    score_ij = ln sum_m n_jm exp(s qbar_i . kbar_jm) - ln n_j,   kbar_jm: means of `pieces` of j

all others -inf, so that a mass is one over the candidates alone. Source: HISA, HiP (coarse to
fine). Of the fine products it makes the share `keep`, by a gather, which is no gain where all of
them are one product of matrices.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse import inside
from vidsparse.blocks import Blocks
from vidsparse.config import require
from vidsparse.draft import Draft
from vidsparse.plan import ScoreKind, Scores


@dataclass(frozen=True)
class Params:
    """span: key blocks of a super-block, >= 1. keep: share of them that goes on, in (0, 1].
    pieces: of a key block, 1, 2, 4, 8 or 16."""

    name: str = "hier"
    span: int = 8
    keep: float = 0.5
    pieces: int = 4
    kind: ClassVar[ScoreKind] = "logit"
    spread: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.span >= 1, "estimator.span", self.span, "an integer >= 1")
        require(0 < self.keep <= 1, "estimator.keep", self.keep, "a number in (0, 1]")
        ok = self.pieces in (1, 2, 4, 8, 16)
        require(ok, "estimator.pieces", self.pieces, "1, 2, 4, 8, 16")

    def products(self, block_q: int, block_k: int, heads: int) -> tuple[float, float]:
        """Scored pairs of all queries and keys, and numbers in each product by head dim."""
        return self.keep * self.pieces / (block_q * block_k), 1


def estimate(draft: Draft, params: Params) -> Scores:
    """Logits float32 [B, H, nq, nk], -inf outside the candidates. Formula above."""
    means, _ = inside.pieces(draft, params.pieces)
    owner, share, member, inner = supers(draft.k_blocks, params.span, draft.q.device)
    coarse = torch.zeros_like(draft.k_means.narrow(2, 0, len(member)))
    coarse.index_add_(2, owner, draft.k_means * share.to(draft.k_means).unsqueeze(-1))
    scaled, nk = draft.q_means * draft.scale, len(draft.k_blocks)
    few = max(1, -int(-params.keep * len(member) // 1))
    best = torch.matmul(scaled, coarse.mT).topk(few, -1).indices.sort(-1).values
    weight = _weights(draft.k_blocks, params.pieces, draft.q.device)

    def one(b: int, h: int) -> Tensor:
        chosen = best.select(0, b).select(0, h)
        ids, there = (
            x.index_select(0, chosen.flatten()).view(len(chosen), -1) for x in (member, inner)
        )
        own, found = scaled.select(0, b).select(0, h), means.select(0, b).select(0, h)
        rows_of = []
        for some in inside.parts(own, ids.shape[1] * found.shape[1] * found.shape[2]):
            at = ids.narrow(0, *some)
            near, share = (
                x.index_select(0, at.flatten()).unflatten(0, at.shape) for x in (found, weight)
            )
            fine = (near @ own.narrow(0, *some).unsqueeze(1).unsqueeze(-1)).squeeze(-1)
            value = (fine + share.to(fine)).logsumexp(-1)
            row = value.new_full((len(value), nk + 1), float("-inf"))
            at = at.masked_fill(there.narrow(0, *some).logical_not(), nk)
            rows_of.append(row.scatter(1, at, value).narrow(1, 0, nk))
        return torch.cat(rows_of)

    return Scores(inside.by_head(draft, one).float(), params.kind)


@lru_cache(maxsize=16)
def supers(
    blocks: Blocks, span: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The super-block of each block, its share of the tokens there; the blocks of each, [m, span],
    and whether there is one."""
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        n = len(blocks)
        owner = torch.arange(n) // span
        many = int(owner[-1]) + 1
        total = torch.zeros(many).index_add_(0, owner, blocks.count.float())
        member = torch.arange(many * span).view(many, span)
        inner = member < n
        member = member.clamp(max=n - 1)
        return tuple(x.to(device) for x in (owner, blocks.count / total[owner], member, inner))  # type: ignore[return-value]


@lru_cache(maxsize=16)
def _weights(blocks: Blocks, pieces: int, device: torch.device) -> Tensor:
    """[nk, m]: ln of the share of a block's tokens that a piece has."""
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        many = min(pieces, blocks.size)
        size = blocks.size // many
        count = (blocks.count[:, None] - torch.arange(many) * size).clamp(0, size)
        return (count / blocks.count[:, None]).log().to(device)
