"""What the mean query of a row would lose of a key block if the block gave only its centroid.

With a_n = s mean_i . k_n and f = s mean_i . kbar_j, the mean of the a_n, for the n_j tokens of j:

    e_ij = sum_n | e^(a_n) v_n - e^f vbar_j |^2
         = sum_n e^(2 a_n) |v_n|^2 - 2 e^f sum_n e^(a_n) v_n . vbar_j + n_j e^(2 f) |vbar_j|^2

and its logarithm is written, so that no row needs a common scale. A program holds the logits of a
tile of query blocks and one key block; keys and values are read where they stand, in any order, and
no number of a token reaches memory. Source: SVG-EAR (arXiv 2603.08982), `vidsparse.estimator.ear`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu import support
from vidsparse.kernels.gpu.operands import order_head
from vidsparse.kernels.gpu.operator import operator

ROWS = 64
"""Query blocks of a program."""

STEP = 32
"""Channels that a program multiplies at a time."""

WARPS, STAGES = 8, 2


@triton.jit(do_not_specialize=["order_head", "heads", "q_blocks", "k_blocks"])
def block_errors_kernel(  # type: ignore[no-untyped-def]
    p_mean,
    p_k,
    p_v,
    p_start,
    p_count,
    p_order,
    p_out,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    order_head,
    scale,
    tiny,
    heads,
    q_blocks,
    k_blocks,
    D: tl.constexpr,
    DP: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    ORDERED: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """out = ln max(tiny, e). Formula in the module docstring. Grid (q tiles, nk, B * H)."""
    i_k = tl.program_id(1)
    i_bh = tl.program_id(2).to(tl.int64)
    p_k += i_bh // heads * k_batch + i_bh % heads * k_head
    p_v += i_bh // heads * v_batch + i_bh % heads * v_head
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_t = tl.arange(0, SIZE)
    m_m = o_m < q_blocks
    count = tl.load(p_count + i_k)
    m_t = o_t < count
    b_token = (tl.load(p_start + i_k) + o_t).to(tl.int64)
    if ORDERED:
        b_token = tl.load(p_order + i_bh * order_head + b_token, mask=m_t, other=0).to(tl.int64)
    o_q = (i_bh * q_blocks + o_m)[:, None] * D
    b_a = tl.zeros([BM, SIZE], tl.float32)
    PRECISION: tl.constexpr = "ieee" if WHOLE else "tf32x3"
    for i_d in tl.range(0, D, BK, num_stages=STAGES):
        o_d = i_d + tl.arange(0, BK)
        m_d = o_d < D
        b_q = tl.load(p_mean + o_q + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
        p_x = p_k + b_token[None, :] * k_token + o_d[:, None]
        b_k = tl.load(p_x, mask=m_t[None, :] & m_d[:, None], other=0.0).to(tl.float32)
        b_a = tl.dot(b_q, b_k, b_a, input_precision=PRECISION)
    o_d = tl.arange(0, DP)
    m_v = m_t[:, None] & (o_d < D)[None, :]
    p_y = p_v + b_token[:, None] * v_token + o_d[None, :]
    b_v = tl.load(p_y, mask=m_v, other=0.0).to(tl.float32)
    n = count.to(tl.float32)
    b_mean = tl.sum(b_v, 0) / n
    b_cross = tl.sum(b_v * b_mean[None, :], 1)
    b_square = tl.sum(b_v * b_v, 1)
    whole = n * tl.sum(b_mean * b_mean, 0)
    b_a = b_a * scale
    b_far = tl.sum(tl.where(m_t[None, :], b_a, 0.0), 1) / n
    b_a = tl.where(m_t[None, :], b_a, float("-inf"))
    b_max = tl.max(b_a, 1)
    b_w = tl.exp(b_a - b_max[:, None])
    b_f = tl.exp(b_far - b_max)
    b_e = tl.sum(b_w * b_w * b_square[None, :], 1)
    b_e = b_e - 2.0 * b_f * tl.sum(b_w * b_cross[None, :], 1) + b_f * b_f * whole
    b_e = tl.where(b_e < tiny, tiny, b_e)  # NaN stays
    p_e = p_out + (i_bh * q_blocks + o_m) * k_blocks + i_k
    tl.store(p_e, 2.0 * b_max + tl.log(b_e), mask=m_m)


@operator("block_errors")
def block_errors(
    q_means: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    count: Tensor,
    size: int,
    order: Tensor | None,
    scale: float,
    tiny: float,
) -> Tensor:
    """Logarithms of the errors of all pairs of blocks, float32 [B, H, nq, nk].

    q_means float32 [B, H, nq, D], contiguous. k, v [B, H, S, D], up to 128 wide, start int64 and
    count int32 [nk], size 16 .. 128, order: as for `vidsparse.kernels.gpu.moments.second_moments`.
    Every block has a token. scale: s = 1 / sqrt(D). tiny: stands for an error of nothing, > 0.
    """
    batch, heads, q_blocks, depth = q_means.shape
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    out = _empty(q_means, start.numel())
    with torch.cuda.device_of(k):
        block_errors_kernel[(-(-q_blocks // ROWS), start.numel(), batch * heads)](
            q_means,
            k,
            v,
            start,
            count,
            start if order is None else order,
            out,
            *k.stride()[:3],
            *v.stride()[:3],
            order_head(order),
            scale,
            tiny,
            heads,
            q_blocks,
            start.numel(),
            D=depth,
            DP=max(16, 1 << (depth - 1).bit_length()),
            SIZE=size,
            BM=ROWS,
            BK=STEP,
            ORDERED=order is not None,
            STAGES=STAGES,
            WHOLE=support.capability(k.device) == support.AMD,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return out


@block_errors.register_fake
def _(
    q_means: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    count: Tensor,
    size: int,
    order: Tensor | None,
    scale: float,
    tiny: float,
) -> Tensor:
    return _empty(q_means, start.shape[0])


def _empty(q_means: Tensor, blocks: int) -> Tensor:
    return q_means.new_empty(*q_means.shape[:3], blocks)
