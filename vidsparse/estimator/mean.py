"""Draft attention between block means: score_ij = s qbar_i . kbar_j, s = 1/sqrt(D).

Source: DraftAttention (arXiv 2505.14708), Jenga, SVG2. With `sub_blocks` = m > 1 the block pair is
drafted at m x m sub-block means and reduced by a log-mean-exp over the pairs, which sees a hot spot
that one mean smooths away; it costs m^2 as much (m = 1: 1 / (2 block_q block_k) of dense
attention).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.config import require
from vidsparse.kernels.gpu import support
from vidsparse.plan import Scores


@dataclass(frozen=True)
class Params:
    """sub_blocks: pieces per block side, 1, 2, 4 or 8 (tokens of a block / sub_blocks >= 1)."""

    name: str = "mean"
    sub_blocks: int = 1

    def __post_init__(self) -> None:
        require(
            self.sub_blocks in (1, 2, 4, 8), "estimator.sub_blocks", self.sub_blocks, "1, 2, 4, 8"
        )


def estimate(
    q: Tensor,
    k: Tensor,
    q_blocks: Blocks,
    k_blocks: Blocks,
    params: Params,
    order: Tensor | None = None,
    key_means: Tensor | None = None,
) -> Scores:
    """Logits float32 [B, H, nq, nk]. Formula in the module docstring."""
    scale = q.shape[-1] ** -0.5
    sizes = {q_blocks.size, k_blocks.size}
    able = sizes <= set(support.BLOCK_SIZES) and q.shape[-1] <= support.MAX_HEAD_DIM
    if able and support.kernels("draft", q):
        cuts = q_blocks, k_blocks
        return Scores(
            _estimate_in_triton(q, k, *cuts, params.sub_blocks, order, key_means), "logit"
        )
    if order is not None:
        q, k = (x.index_select(2, order) for x in (q, k))
    if params.sub_blocks == 1:
        return Scores(torch.matmul(q_blocks.mean(q) * scale, k_blocks.mean(k).mT).float(), "logit")
    q_cut, k_cut = q_blocks.split(params.sub_blocks), k_blocks.split(params.sub_blocks)
    logits = torch.matmul(q_cut.mean(q) * scale, k_cut.mean(k).mT).float()
    logits = logits + k_cut.on(q.device).count.to(logits).log()
    reduced = _log_sum(logits, q_blocks.owner_of(q_cut), q_cut.count, len(q_blocks), -2)
    reduced = reduced - q_blocks.on(q.device).count.to(reduced).log()[:, None]  # mean over queries
    total = _log_sum(reduced, k_blocks.owner_of(k_cut), None, len(k_blocks), -1)
    return Scores(total - k_blocks.on(q.device).count.to(total).log(), "logit")


def _estimate_in_triton(
    q: Tensor,
    k: Tensor,
    q_blocks: Blocks,
    k_blocks: Blocks,
    sub_blocks: int,
    order: Tensor | None,
    key_means: Tensor | None,
) -> Tensor:
    """`estimate` on a GPU."""
    draft, pool = support.kernels("draft", q), support.kernels("pool", q)
    means, counts = [], []
    for x, blocks in ((q, q_blocks), (k, k_blocks)):
        start, count = _pieces(blocks, sub_blocks, q.device)
        made = key_means if x is k and sub_blocks == 1 else None
        if made is None:
            made = pool.block_means(x, start, count, blocks.size // sub_blocks, order)
        means.append(made)
        counts.append(count)
    scores: Tensor = draft.draft_scores(*means, *counts, sub_blocks, q.shape[-1] ** -0.5)
    return scores


@lru_cache(maxsize=16)
def _pieces(blocks: Blocks, pieces: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """start int64, count int32 [n * pieces]: each block in pieces, some of them without a token."""
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        size = blocks.size // pieces
        offset = torch.arange(pieces) * size
        start = (blocks.start[:, None] + offset).flatten()
        count = (blocks.count[:, None] - offset).clamp(0, size).flatten()
        return start.to(device), count.to(device, torch.int32)


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
