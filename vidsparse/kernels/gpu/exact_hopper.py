"""Exact attention over listed key tiles with keys and values through TMA: sm_90 and sm_100.

Same lists, results and launcher as `exact_pointer`; K and V come through host descriptors over the
tensors as they stand, q by pointer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vidsparse.kernels.gpu.exact import ExactLists
from vidsparse.kernels.gpu.exact_pointer import launch
from vidsparse.kernels.gpu.operands import QueryRows, Tiling, padded_width
from vidsparse.kernels.gpu.softmax import LOWEST, finish, query_rows, take_products

GRID_BYTES = 16
"""TMA's alignment of bases and strides."""


@triton.jit(do_not_specialize=["order_head", "heads", "tokens", "q_blocks", "width"])
def exact_tiles_hopper_kernel(  # type: ignore[no-untyped-def]
    p_q,
    d_k,
    d_v,
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
    """`exact_tiles_kernel` with descriptors d_k, d_v of [B, H, S, D] in tiles of [1, 1, BN, DP].

    Columns past D are filled with zeros.
    """
    i_part = tl.program_id(0)
    i_block = i_part // PARTS
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // heads
    i_h = i_bh % heads
    first = (i_part % PARTS) * BM
    o_m = first + tl.arange(0, BM)
    o_d = tl.arange(0, DP)
    rows = tl.load(p_rows + i_block)
    p_own = p_order + i_bh * order_head
    q_base = p_q + i_b * q_batch + i_h * q_head
    o_q, m_m, m_q = query_rows(p_start, p_rows, p_own, i_block, o_m, D, DP, ORDERED, False)
    b_q = tl.load(q_base + o_q[:, None] * q_token + o_d[None, :], mask=m_q, other=0.0)
    i_row = i_bh * q_blocks + i_block
    p_next = p_entry + i_row * width
    last = tl.where(first < rows, tl.load(p_count + i_row), 0)
    batch, head = i_b.to(tl.int32), i_h.to(tl.int32)

    b_max = tl.full([BM], LOWEST, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, DP], tl.float32)
    entry = tl.load(p_next)
    for i in tl.range(0, last, num_stages=STAGES):
        b_k = d_k.load([batch, head, entry, 0]).reshape([BN, DP])
        b_v = d_v.load([batch, head, entry, 0]).reshape([BN, DP])
        entry = tl.load(p_next + i + 1)
        b_s = tl.dot(b_q, b_k.T)
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
    """`ExactEngine.run`. Keys and values that stand off TMA's grid of 16 bytes are copied."""
    k, v = (_on_grid(x) for x in (k, v))
    tile = [1, 1, shape.block_n, padded_width(q.shape[3])]
    keys = tuple(TensorDescriptor(x, list(x.shape), list(x.stride()), tile) for x in (k, v))
    launch(exact_tiles_hopper_kernel, keys, (), q, lists, rows, out, lse, shape)


def _on_grid(x: Tensor) -> Tensor:
    """x, or a copy of it whose rows are on TMA's grid."""
    size = x.element_size()
    off = x.data_ptr() % GRID_BYTES or any(n * size % GRID_BYTES for n in x.stride()[:3])
    return x.clone(memory_format=torch.contiguous_format) if off else x
