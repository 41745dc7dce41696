"""Draft attention between block means: score_ij = s qbar_i . kbar_j, s = 1/sqrt(D).

Source: DraftAttention (arXiv 2505.14708), Jenga, SVG2. With `sub_blocks` = m > 1 the block pair is
drafted at m x m sub-block means and reduced by a log-mean-exp over the pairs, which sees a hot spot
that one mean smooths away; it costs m^2 as much (m = 1: 1 / (2 block_q block_k) of dense
attention).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidsparse.config import require
from vidsparse.draft import Draft, pieces, taken
from vidsparse.kernels.gpu import support
from vidsparse.plan import ScoreKind, Scores


@dataclass(frozen=True)
class Params:
    """sub_blocks: pieces per block side, 1, 2, 4 or 8 (tokens of a block / sub_blocks >= 1)."""

    name: str = "mean"
    sub_blocks: int = 1
    kind: ClassVar[ScoreKind] = "logit"
    spread: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(
            self.sub_blocks in (1, 2, 4, 8), "estimator.sub_blocks", self.sub_blocks, "1, 2, 4, 8"
        )


def estimate(draft: Draft, params: Params) -> Scores:
    """Logits float32 [B, H, nq, nk]. Formula in the module docstring."""
    if params.sub_blocks == 1:
        return Scores(draft.logits, params.kind)
    parts = _in_triton if draft.in_triton else _in_torch
    return Scores(parts(draft, params.sub_blocks), params.kind)


def _in_torch(draft: Draft, sub_blocks: int) -> Tensor:
    q_blocks, k_blocks, device = draft.q_blocks, draft.k_blocks, draft.q.device
    q_cut, k_cut = q_blocks.split(sub_blocks), k_blocks.split(sub_blocks)
    q_means = q_cut.mean(taken(draft.q, draft.order_q)) * draft.scale
    logits = torch.matmul(q_means, k_cut.mean(taken(draft.k, draft.order_k)).mT).float()
    logits = logits + k_cut.on(device).count.to(logits).log()
    reduced = _log_sum(logits, q_blocks.owner_of(q_cut), q_cut.count, len(q_blocks), -2)
    reduced = reduced - q_blocks.on(device).count.to(reduced).log()[:, None]  # mean over queries
    total = _log_sum(reduced, k_blocks.owner_of(k_cut), None, len(k_blocks), -1)
    return total - k_blocks.on(device).count.to(total).log()


def _in_triton(draft: Draft, sub_blocks: int) -> Tensor:
    kernels, sums = support.kernels("draft", draft.q), support.kernels("means", draft.q)
    means, counts = [], []
    for x, blocks, order in (
        (draft.q, draft.q_blocks, draft.order_q),
        (draft.k, draft.k_blocks, draft.order_k),
    ):
        start, count = pieces(blocks, sub_blocks, x.device)
        means.append(sums.block_means(x, start, count, blocks.size // sub_blocks, order))
        counts.append(count)
    scores: Tensor = kernels.draft_scores(*means, *counts, sub_blocks, draft.scale)
    return scores


def _log_sum(x: Tensor, owner: Tensor, weight: Tensor | None, groups: int, dim: int) -> Tensor:
    """log sum exp over runs of `dim` that have the same owner, with optional weights."""
    if weight is not None:
        x = x + (weight.to(x).log()[:, None] if dim == -2 else weight.to(x).log())
    shape = list(x.shape)
    shape[dim] = groups
    owner = owner.to(x.device)
    at = (owner[:, None] if dim == -2 else owner).expand_as(x)
    top = x.new_full(shape, float("-inf")).scatter_reduce(dim, at, x, "amax")
    total = x.new_zeros(shape).scatter_add(dim, at, (x - top.gather(dim, at)).exp())
    return total.log() + top
