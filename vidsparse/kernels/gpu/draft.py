"""Draft scores between block means: those of `vidsparse.draft` and of `vidsparse.estimator.mean`.

With pieces, a tile of piece logits is reduced in registers; only block scores reach memory.
Products are "tf32x3": each float32 factor is split into two tf32 ones and three of the four
products are kept, which leaves an error below 2^-20 sum_d |q_d k_d| per score. AMD's matrix cores
have no such split and multiply float32 as it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu import support
from vidsparse.kernels.gpu.operands import Tiling
from vidsparse.kernels.gpu.operator import operator
from vidsparse.kernels.gpu.softmax import LN_2, LOG2_E

STEP = 32
"""Columns of the means that a program multiplies at a time."""


def tiling(sub_blocks: int) -> Tiling:
    """Pieces in one program: larger tiles where the pairs grow with sub_blocks^2."""
    return Tiling(64, 64, 4, 3) if sub_blocks == 1 else Tiling(128, 64, 8, 3)


@triton.jit
def log_shares(p_count, o_p, m_p, N: tl.constexpr, SUB: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 [N]: log2 of each piece's share of its block's tokens, -inf for a missing piece."""
    count = tl.load(p_count + o_p, mask=m_p, other=0).to(tl.float32)
    b_count = tl.reshape(count, [N // SUB, SUB])
    b_share = b_count / tl.maximum(tl.sum(b_count, 1), 1.0)[:, None]
    b_log = tl.where(b_count > 0.0, tl.math.log2(tl.maximum(b_share, 1e-30)), float("-inf"))
    return tl.reshape(b_log, [N])


@triton.jit(do_not_specialize=["q_rows", "k_rows"])
def draft_scores_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_k,
    p_q_count,
    p_k_count,
    p_out,
    scale,
    q_rows,
    k_rows,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SUB: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """s = scale q k^T; out = ln 2 log2 of the mean over the pairs of tokens of 2^(log2(e) s).

    scale: includes log2(e) if SUB > 1. SUB = 1: out = s. q_rows, k_rows: means of a head, SUB to a
    block. WHOLE: factors are not split. Grid (q tiles, k tiles, B * H).
    """
    i_q = tl.program_id(0)
    i_k = tl.program_id(1)
    i_bh = tl.program_id(2).to(tl.int64)
    o_m = i_q * BM + tl.arange(0, BM)
    o_n = i_k * BN + tl.arange(0, BN)
    m_m = o_m < q_rows
    m_n = o_n < k_rows
    if SUB > 1:
        b_wq = log_shares(p_q_count, o_m, m_m, BM, SUB)
        b_wk = log_shares(p_k_count, o_n, m_n, BN, SUB)
        m_m = b_wq > float("-inf")
        m_n = b_wk > float("-inf")
    p_qm = p_q + (i_bh * q_rows + o_m)[:, None] * D
    p_kn = p_k + (i_bh * k_rows + o_n)[None, :] * D
    b_s = tl.zeros([BM, BN], tl.float32)
    PRECISION: tl.constexpr = "ieee" if WHOLE else "tf32x3"
    for i_d in tl.range(0, D, BK, num_stages=STAGES):
        o_d = i_d + tl.arange(0, BK)
        m_d = o_d < D
        b_q = tl.load(p_qm + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
        b_k = tl.load(p_kn + o_d[:, None], mask=m_n[None, :] & m_d[:, None], other=0.0)
        b_s = tl.dot(b_q, b_k, b_s, input_precision=PRECISION)
    b_s = b_s * scale
    if SUB > 1:
        b_s = tl.reshape(b_s + b_wq[:, None] + b_wk[None, :], [BM // SUB, SUB, BN // SUB, SUB])
        b_max = tl.maximum(tl.max(tl.max(b_s, 3), 1), -1e30)  # finite past the last block
        b_p = tl.math.exp2(b_s - b_max[:, None, :, None])
        b_s = (tl.math.log2(tl.sum(tl.sum(b_p, 3), 1)) + b_max) * LN_2
    q_blocks = q_rows // SUB
    k_blocks = k_rows // SUB
    o_i = i_q * (BM // SUB) + tl.arange(0, BM // SUB)
    o_j = i_k * (BN // SUB) + tl.arange(0, BN // SUB)
    p_s = p_out + (i_bh * q_blocks + o_i)[:, None] * k_blocks + o_j[None, :]
    tl.store(p_s, b_s, mask=(o_i < q_blocks)[:, None] & (o_j < k_blocks)[None, :])


@operator("draft_scores")
def draft_scores(
    q_means: Tensor,
    k_means: Tensor,
    q_count: Tensor,
    k_count: Tensor,
    sub_blocks: int,
    scale: float,
) -> Tensor:
    """Logits of all pairs of blocks, float32 [B, H, nq, nk], contiguous.

    q_means float32 [B, H, nq * m, D], k_means float32 [B, H, nk * m, D], contiguous, m =
        sub_blocks = 1, 2, 4 or 8: the means of the m pieces of each block.
    q_count int32 [nq * m], k_count int32 [nk * m]: tokens of each piece; 0: there is no such piece
        and its mean is not read. Every block has a token.
    scale: 1 / sqrt(D). m = 1: scale qbar . kbar; else the log of the mean over the block's pairs of
        tokens of exp(scale qbar . kbar), each token standing for the mean of its piece.
    """
    batch, heads, q_rows, depth = q_means.shape
    k_rows = k_means.shape[2]
    shape = tiling(sub_blocks)
    blocks = q_rows // sub_blocks, k_rows // sub_blocks
    out = torch.empty(batch, heads, *blocks, dtype=torch.float32, device=q_means.device)
    tiles = -(-q_rows // shape.block_m), -(-k_rows // shape.block_n)
    with torch.cuda.device_of(q_means):
        draft_scores_kernel[(*tiles, batch * heads)](
            q_means,
            k_means,
            q_count,
            k_count,
            out,
            scale if sub_blocks == 1 else scale * LOG2_E,
            q_rows,
            k_rows,
            D=depth,
            BM=shape.block_m,
            BN=shape.block_n,
            BK=STEP,
            SUB=sub_blocks,
            STAGES=shape.stages,
            WHOLE=support.capability(q_means.device) == support.AMD,
            num_warps=shape.warps,
            enable_fp_fusion=True,
        )
    return out


@draft_scores.register_fake
def _(
    q_means: Tensor,
    k_means: Tensor,
    q_count: Tensor,
    k_count: Tensor,
    sub_blocks: int,
    scale: float,
) -> Tensor:
    batch, heads, q_rows, _ = q_means.shape
    blocks = q_rows // sub_blocks, k_means.shape[2] // sub_blocks
    return q_means.new_empty(batch, heads, *blocks)
