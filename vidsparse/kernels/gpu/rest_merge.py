"""The rest merge: what the tiles of an exact engine leave out, added to its (O, LSE) in one launch.

Short blocks that a row lists are read as they are, blocks that it does not list as their centroid,

    a_tj = s q_t . kbar_j + ln n_j + rest_bias_ij,    s = 1 / sqrt(D),

all in one softmax with what (O, LSE) stand for. The first-order term follows, with G_t the sum of
exp(a_tj) over the unlisted blocks in units of that softmax:

    O_t += s G_t q_t M,    M the moment of the head, or of the query block.

Sources: `vidsparse.compensation`; merging by LSE, flash decoding (Dao and others, 2023).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu import support
from vidsparse.kernels.gpu.operands import Means, QueryRows, ShortBlocks, Tiling, padded_width
from vidsparse.kernels.gpu.operator import operator
from vidsparse.kernels.gpu.softmax import LN_2, LOG2_E, LOWEST, finish, query_rows, take_tile

TILINGS = {
    (8, 0): Tiling(128, 32, 8, 3),
    (8, 6): Tiling(64, 32, 4, 3, registers=255),
    (8, 9): Tiling(64, 32, 4, 3, registers=255),
    (9, 0): Tiling(128, 64, 8, 3),
    (10, 0): Tiling(128, 64, 8, 2, registers=255),
    (10, 3): Tiling(128, 64, 8, 2),
    (12, 0): Tiling(128, 32, 8, 2, registers=255),
}
"""Compute capability -> for bfloat16 and float16.

registers: where shared memory has room for one program alone; left to itself the assembler may
spill there, to make room for a second.
"""

FLOAT32 = Tiling(32, 16, 8, 1)
PORTABLE = Tiling(64, 32, 4, 2)

SHORT = 32
"""Keys of a short block that a program reads at a time."""

STEP = 32
"""Columns of q that are multiplied by the moment at a time."""


RUN_TIME = ["order_head", "heads", "tokens", "q_blocks", "k_blocks", "shorts", "i_first"]


@triton.jit(do_not_specialize=RUN_TIME)
def rest_merge_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_k,
    p_v,
    p_mean_k,
    p_mean_v,
    p_bias,
    p_levels,
    p_moment,
    p_short,
    p_short_first,
    p_short_count,
    p_start,
    p_rows,
    p_order,
    p_out,
    p_lse,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    out_batch,
    out_head,
    out_token,
    mean_batch,
    mean_head,
    bias_row,
    moment_head,
    moment_row,
    scale,
    root,
    order_head,
    heads,
    tokens,
    q_blocks,
    k_blocks,
    shorts,
    i_first,
    D: tl.constexpr,
    DP: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    REST: tl.constexpr,
    ORDER: tl.constexpr,
    ORDERED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out and lse of a query block, in place. Grid (blocks * PARTS, B * H), from block i_first on.

    BS: rows of a short block at a time; BK: columns of q at a time for the moment (ORDER).
    """
    i_part = tl.program_id(0)
    i_block = i_first + i_part // PARTS
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // heads
    i_h = i_bh % heads
    first = (i_part % PARTS) * BM
    o_m = first + tl.arange(0, BM)
    o_d = tl.arange(0, DP)
    p_own = p_order + i_bh * order_head
    o_q, m_m, m_q = query_rows(p_start, p_rows, p_own, i_block, o_m, D, DP, ORDERED, False)
    q_base = p_q + i_b * q_batch + i_h * q_head + o_q[:, None] * q_token
    b_q = tl.load(q_base + o_d[None, :], mask=m_q, other=0.0)
    p_o = p_out + i_b * out_batch + i_h * out_head + o_q[:, None] * out_token + o_d[None, :]
    p_l = p_lse + i_bh * tokens + o_q
    b_acc = tl.load(p_o, mask=m_q, other=0.0).to(tl.float32)
    b_lse = tl.load(p_l, mask=m_m, other=float("-inf"))
    none = b_lse == float("-inf")
    b_max = tl.where(none, LOWEST, b_lse / LN_2)
    b_sum = tl.where(none, 0.0, 1.0)
    b_rest = tl.zeros([BM], tl.float32)
    p_row = p_levels + (i_bh * q_blocks + i_block) * k_blocks

    o_s = tl.arange(0, BS)
    k_base = p_k + i_b * k_batch + i_h * k_head
    v_base = p_v + i_b * v_batch + i_h * v_head
    for i in tl.range(0, shorts):
        listed = tl.load(p_row + tl.load(p_short + i)) == 0
        row = tl.load(p_short_first + i).to(tl.int64)
        count = tl.where(listed, tl.load(p_short_count + i), 0)
        for at in tl.range(0, count, BS):
            m_s = at + o_s < count
            o_k = row + at + o_s
            m_k = m_s[:, None] & (o_d < D)[None, :]
            b_k = tl.load(k_base + o_k[:, None] * k_token + o_d[None, :], mask=m_k, other=0.0)
            b_v = tl.load(v_base + o_k[:, None] * v_token + o_d[None, :], mask=m_k, other=0.0)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
            b_s = tl.where(m_s[None, :], b_s, float("-inf"))
            b_max, b_sum, b_acc, _, _ = take_tile(b_s, b_v, b_max, b_sum, b_acc)

    if REST:
        o_n = tl.arange(0, BN)
        mean_base = i_b * mean_batch + i_h * mean_head
        p_kt = p_mean_k + mean_base + o_n[None, :] * DP + o_d[:, None]
        p_vn = p_mean_v + mean_base + o_n[:, None] * DP + o_d[None, :]
        p_bias += (i_bh * q_blocks + i_block) * bias_row + o_n
        for n in tl.range(0, k_blocks, BN, num_stages=STAGES):
            b_k = tl.load(p_kt + n * DP)
            b_v = tl.load(p_vn + n * DP)
            b_bias = tl.load(p_bias + n)
            b_s = tl.dot(b_q, b_k, input_precision="ieee") * scale + b_bias[None, :]
            b_max, b_sum, b_acc, alpha, part = take_tile(b_s, b_v, b_max, b_sum, b_acc)
            b_rest = b_rest * alpha + part

    o_q, m_m, m_q = query_rows(p_start, p_rows, p_own, i_block, o_m, D, DP, ORDERED, True)
    q_base = p_q + i_b * q_batch + i_h * q_head + o_q[:, None] * q_token
    p_o = p_out + i_b * out_batch + i_h * out_head + o_q[:, None] * out_token + o_d[None, :]
    p_l = p_lse + i_bh * tokens + o_q
    b_share = b_rest / tl.where(b_sum == 0.0, 1.0, b_sum) * root
    b_acc, b_lse = finish(b_max, b_sum, b_acc)
    if ORDER:
        o_k = tl.arange(0, BK)
        p_h = p_moment + i_bh * moment_head + (i_block - i_first) * moment_row + o_d[None, :]
        for i_k in tl.range(0, DP, BK):
            m_k = m_m[:, None] & (i_k + o_k < D)[None, :]
            b_x = tl.load(q_base + (i_k + o_k)[None, :], mask=m_k, other=0.0)
            b_x = (b_x.to(tl.float32) * b_share[:, None]).to(b_x.dtype)
            b_h = tl.load(p_h + (i_k + o_k)[:, None] * DP)
            b_acc = tl.dot(b_x, b_h, b_acc, input_precision="ieee")
    tl.store(p_o, b_acc.to(p_out.dtype.element_ty), mask=m_q)
    tl.store(p_l, b_lse, mask=m_m)


@lru_cache(maxsize=64)
def tiling(dtype: torch.dtype, capability: tuple[int, int], block_q: int) -> Tiling:
    """Tiling for query blocks of block_q tokens on a device of this compute capability."""
    shape = TILINGS.get(capability, PORTABLE) if dtype != torch.float32 else FLOAT32
    return shape.within(block_q, shape.block_n)


def rest_merge(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    rows: QueryRows,
    out: Tensor,
    lse: Tensor,
    means: Means | None = None,
    bias: Tensor | None = None,
    moment: Tensor | None = None,
    short: ShortBlocks | None = None,
    first: int = 0,
    blocks: int | None = None,
) -> None:
    """Add to out and lse, in place, what the lists left out; formulas in the module docstring.

    q, out [B, H, Sq, D], k, v [B, H, Sk, D'], stride 1 in the last axis; lse float32 [B, H, Sq],
        contiguous; rows: as for the engine that wrote out and lse.
    levels: int8 [B, H, nq, nk], contiguous: 0 listed, negative not.
    means: of all key blocks, for the unlisted ones; None: they are dropped.
    bias: float32 [B, H, nq, R], contiguous, of `vidsparse.kernels.gpu.weights.rest_bias`; there if
        means are.
    moment: [B, H, DP, DP] in the dtype of q, or [B, H, `blocks`, DP, DP], one for each query block
        from `first` on; None: no first-order term.
    short: blocks of which those of level 0 are read here; None: none.
    first, blocks: the query blocks first .. first + blocks - 1 alone; None: all.
    """
    blocks = rows.start.numel() if blocks is None else blocks
    parts = () if short is None else (short.block, short.first, short.count)
    centroids = (None, None, None) if means is None else (means.k, means.v, bias)
    rest_merge_operator(
        *(q, k, v, levels, rows.start, rows.count, rows.size, rows.order, out, lse),
        *(*centroids, moment, list(parts), first, blocks),
    )


@operator("rest_merge", mutates=("out", "lse"))
def rest_merge_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    q_start: Tensor,
    q_count: Tensor,
    block_q: int,
    order: Tensor | None,
    out: Tensor,
    lse: Tensor,
    mean_k: Tensor | None,
    mean_v: Tensor | None,
    bias: Tensor | None,
    moment: Tensor | None,
    short: list[Tensor],
    first: int,
    blocks: int,
) -> None:
    """`rest_merge` with the fields of its arguments one by one."""
    batch, heads, tokens, depth = q.shape
    shape = tiling(q.dtype, support.capability(q.device), block_q)
    rows = QueryRows(q_start, q_count, block_q, order)
    parts = block_q // shape.block_m
    limit = {} if shape.registers is None else {"maxnreg": shape.registers}
    by_row = moment is not None and moment.ndim == 5
    with torch.cuda.device_of(q):
        rest_merge_kernel[(blocks * parts, batch * heads)](
            q,
            k,
            v,
            *((lse, lse, lse) if mean_k is None else (mean_k, mean_v, bias)),
            levels,
            q if moment is None else moment,
            *(short or (q_count, q_count, q_count)),
            q_start,
            q_count,
            q_start if order is None else order,
            out,
            lse,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            *((0, 0) if mean_k is None else mean_k.stride()[:2]),
            0 if bias is None else bias.shape[3],
            0 if moment is None else moment.stride(1),
            moment.stride(2) if by_row and moment is not None else 0,
            depth**-0.5 * LOG2_E,
            depth**-0.5,
            rows.order_head,
            heads,
            tokens,
            q_start.numel(),
            levels.shape[3],
            short[0].numel() if short else 0,
            first,
            D=depth,
            DP=padded_width(depth),
            PARTS=parts,
            BM=shape.block_m,
            BN=shape.block_n,
            BS=min(SHORT, shape.block_n),
            BK=STEP,
            REST=mean_k is not None,
            ORDER=moment is not None,
            ORDERED=order is not None,
            STAGES=shape.stages,
            num_warps=shape.warps,
            **limit,
            enable_fp_fusion=True,
        )
