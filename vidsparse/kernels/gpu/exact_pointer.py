"""Exact attention over listed key tiles in Triton, by pointer: sm_80 and newer, the interpreter.

One program reads BM queries of one query block and walks that block's list of full tiles with an
online softmax. Every row of a tile is a token, so the loop holds two products and the exponential.

The entry of the next tile is loaded one turn ahead and is an address, nothing else: loads of K and
V are then pipelined to the depth that the tiling asks for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu.exact import ExactLists
from vidsparse.kernels.gpu.operands import QueryRows, Tiling, padded_width
from vidsparse.kernels.gpu.softmax import LOG2_E, LOWEST, finish, query_rows, take_products


def interpreted() -> bool:
    """Whether this process runs kernels in Triton's CPU interpreter (TRITON_INTERPRET=1)."""
    return not isinstance(exact_tiles_kernel, triton.JITFunction)


@triton.jit(do_not_specialize=["order_head", "heads", "tokens", "q_blocks", "width"])
def exact_tiles_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_k,
    p_v,
    p_entry,
    p_count,
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
    scale,
    order_head,
    heads,
    tokens,
    q_blocks,
    width,
    D: tl.constexpr,
    DP: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ORDERED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """s = scale q k^T; out = sum 2^s v / sum 2^s; lse = ln 2 log2 sum 2^s; scale = log2(e)/sqrt(D).

    order_head: from the order of one head to the next, 0 for one of all. Grid (nq * PARTS, B * H).
    """
    i_part = tl.program_id(0)
    i_block = i_part // PARTS
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // heads
    i_h = i_bh % heads
    first = (i_part % PARTS) * BM
    o_m = first + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, DP)
    rows = tl.load(p_rows + i_block)
    p_own = p_order + i_bh * order_head
    o_q, m_m, m_q = query_rows(p_start, p_rows, p_own, i_block, o_m, D, DP, ORDERED, False)
    p_query = p_q + i_b * q_batch + i_h * q_head + o_q[:, None] * q_token + o_d[None, :]
    b_q = tl.load(p_query, mask=m_q, other=0.0)
    p_kt = p_k + i_b * k_batch + i_h * k_head + o_n[None, :] * k_token + o_d[:, None]
    p_vn = p_v + i_b * v_batch + i_h * v_head + o_n[:, None] * v_token + o_d[None, :]
    i_row = i_bh * q_blocks + i_block
    p_next = p_entry + i_row * width
    last = tl.where(first < rows, tl.load(p_count + i_row), 0)

    b_max = tl.full([BM], LOWEST, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, DP], tl.float32)
    entry = tl.load(p_next)
    for i in tl.range(0, last, num_stages=STAGES):
        row = entry.to(tl.int64)
        if D < DP:
            b_k = tl.load(p_kt + row * k_token, mask=(o_d < D)[:, None], other=0.0)
            b_v = tl.load(p_vn + row * v_token, mask=(o_d < D)[None, :], other=0.0)
        else:
            b_k = tl.load(p_kt + row * k_token)
            b_v = tl.load(p_vn + row * v_token)
        entry = tl.load(p_next + i + 1)
        b_s = tl.dot(b_q, b_k, input_precision="ieee")
        b_max, b_sum, b_acc = take_products(b_s, scale, b_v, b_max, b_sum, b_acc)

    b_out, b_lse = finish(b_max, b_sum, b_acc)
    o_q, m_m, m_q = query_rows(p_start, p_rows, p_own, i_block, o_m, D, DP, ORDERED, True)
    p_o = p_out + i_b * out_batch + i_h * out_head + o_q[:, None] * out_token + o_d[None, :]
    tl.store(p_o, b_out.to(p_out.dtype.element_ty), mask=m_q)
    tl.store(p_lse + i_bh * tokens + o_q, b_lse, mask=m_m)


def exact_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: ExactLists,
    rows: QueryRows,
    out: Tensor,
    lse: Tensor,
    shape: Tiling,
) -> None:
    """`ExactEngine.run` for tiles of shape.block_n keys."""
    strides = *k.stride()[:3], *v.stride()[:3]
    launch(exact_tiles_kernel, (k, v), strides, q, lists, rows, out, lse, shape)


def launch(
    kernel: object,
    keys: tuple[object, object],
    strides: tuple[int, ...],
    q: Tensor,
    lists: ExactLists,
    rows: QueryRows,
    out: Tensor,
    lse: Tensor,
    shape: Tiling,
) -> None:
    """Run a kernel with the parameters of `exact_tiles_kernel`.

    keys, strides: as it takes keys and values.
    """
    batch, heads, tokens, depth = q.shape
    parts = rows.size // shape.block_m
    limit = {} if shape.registers is None else {"maxnreg": shape.registers}
    with torch.cuda.device_of(q):
        kernel[(rows.start.numel() * parts, batch * heads)](  # type: ignore[index]
            q,
            *keys,
            lists.entry,
            lists.count,
            rows.start,
            rows.count,
            rows.start if rows.order is None else rows.order,
            out,
            lse,
            *q.stride()[:3],
            *strides,
            *out.stride()[:3],
            depth**-0.5 * LOG2_E,
            rows.order_head,
            heads,
            tokens,
            rows.start.numel(),
            lists.entry.shape[3],
            D=depth,
            DP=padded_width(depth),
            PARTS=parts,
            BM=shape.block_m,
            BN=shape.block_n,
            ORDERED=rows.order is not None,
            STAGES=shape.stages,
            num_warps=shape.warps,
            enable_fp_fusion=True,
            **limit,
        )
