"""Results that stand block by block, back to the tokens they are of, from one read of them.

out[token(i, r)] = x[i * size + r],    lse likewise,    for row r of the tokens of block i
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu.operands import QueryRows
from vidsparse.kernels.gpu.operator import operator
from vidsparse.kernels.gpu.summary import load_rows, tokens_at


@triton.jit(do_not_specialize=["order_head", "heads", "tokens"])
def unblock_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_lse,
    p_start,
    p_count,
    p_order,
    p_out,
    p_out_lse,
    x_batch,
    x_head,
    x_row,
    out_batch,
    out_head,
    out_token,
    order_head,
    heads,
    tokens,
    D: tl.constexpr,
    DP: tl.constexpr,
    SIZE: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """The rows of a block. Grid (blocks, B * H)."""
    i_block = tl.program_id(0).to(tl.int64)
    i_bh = tl.program_id(1).to(tl.int64)
    x_base = p_x + i_bh // heads * x_batch + i_bh % heads * x_head
    out_base = p_out + i_bh // heads * out_batch + i_bh % heads * out_head
    o_r, o_d = tl.arange(0, SIZE), tl.arange(0, DP)
    m_r = o_r < tl.load(p_count + i_block)
    row = i_block * SIZE + o_r
    position = tl.load(p_start + i_block) + o_r
    token = tokens_at(p_order + i_bh * order_head, position, m_r, ORDERED)
    b_x = load_rows(x_base, row, m_r, x_row, D, DP)
    m_x = m_r[:, None]
    if D < DP:
        m_x = m_x & (o_d < D)[None, :]
    tl.store(out_base + token[:, None] * out_token + o_d[None, :], b_x, mask=m_x)
    p_own = p_lse + i_bh * (tl.num_programs(0) * SIZE)
    tl.store(p_out_lse + i_bh * tokens + token, tl.load(p_own + row, mask=m_r), mask=m_r)


def unblock(x: Tensor, lse: Tensor, rows: QueryRows, out: Tensor, out_lse: Tensor) -> None:
    """Write every token of out [B, H, S, D] and out_lse [B, H, S].

    x [B, H, n * size, D], lse float32 [B, H, n * size], contiguous: block i of n from row i * size
    on. rows: where its tokens stand in out, of which stride 1 is in D, as it is in x; out_lse
    float32, contiguous.
    """
    unblock_operator(x, lse, rows.start, rows.count, rows.size, rows.order, out, out_lse)


@operator("unblock", mutates=("out", "out_lse"))
def unblock_operator(
    x: Tensor,
    lse: Tensor,
    start: Tensor,
    count: Tensor,
    size: int,
    order: Tensor | None,
    out: Tensor,
    out_lse: Tensor,
) -> None:
    """`unblock` with the fields of its rows one by one."""
    batch, heads, tokens, depth = out.shape
    rows = QueryRows(start, count, size, order)
    with torch.cuda.device_of(out):
        unblock_kernel[(start.numel(), batch * heads)](
            x,
            lse,
            start,
            count,
            start if order is None else order,
            out,
            out_lse,
            *x.stride()[:3],
            *out.stride()[:3],
            rows.order_head,
            heads,
            tokens,
            D=depth,
            DP=max(16, 1 << (depth - 1).bit_length()),
            SIZE=size,
            ORDERED=order is not None,
            num_warps=8,
            enable_fp_fusion=True,
        )
