"""Attention over lists of key tiles of several levels, and with 8-bit products, in Triton.

One program reads BM queries of one query block and walks that block's list of tiles of the key
buffer with an online softmax in log2 units: every row has a bias, log2 of the tokens behind it, and
tiles of several blocks have bits that say which are wanted. Plans of level 0 alone take an exact
engine instead (`vidsparse.kernels.gpu.exact`), whose loop is half as long.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu.levels_lists import SHIFT_AT, TILE_MASK
from vidsparse.kernels.gpu.operands import Keys, QueryRows, Scales, TileLists, Tiling
from vidsparse.kernels.gpu.operator import operator
from vidsparse.kernels.gpu.softmax import LOG2_E, LOWEST, finish, query_rows, take_tile

TILINGS = {
    (8, 64): Tiling(128, 64, 8, 3, split=False),
    (8, 128): Tiling(128, 64, 8, 3, split=False),
    (9, 64): Tiling(128, 64, 8, 3),
    (9, 128): Tiling(128, 64, 8, 3),
    (10, 64): Tiling(128, 64, 8, 3),
    (10, 128): Tiling(128, 64, 8, 3),
    (12, 64): Tiling(128, 64, 8, 3, split=False),
    (12, 128): Tiling(128, 32, 8, 3, split=False),
}
"""Major compute capability and width of the key buffer -> for bfloat16 and float16."""

FLOAT32 = Tiling(32, 32, 8, 1)
"""For float32, whose exact products use no tensor cores and many registers."""

PORTABLE = Tiling(64, 32, 4, 3)
"""Fits a capability that `TILINGS` does not know."""


@lru_cache(maxsize=64)
def tiling(
    dtype: torch.dtype, capability: tuple[int, int], block_q: int, block_k: int, width: int = 128
) -> Tiling:
    """Tiling for blocks of block_q x block_k tokens on a device of this compute capability.

    width: of the key buffer. An unknown capability takes the portable tiling.
    """
    if dtype == torch.float32:
        return FLOAT32.within(block_q, block_k)
    return TILINGS.get((capability[0], width), PORTABLE).within(block_q, block_k)


RUN_TIME = ["order_head", "heads", "tokens", "q_blocks", "width", "shared", "key_tiles"]


@triton.jit(do_not_specialize=RUN_TIME)
def levels_forward_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_k,
    p_v,
    p_bias,
    p_entry,
    p_bits,
    p_count,
    p_whole,
    p_start,
    p_rows,
    p_order,
    p_out,
    p_lse,
    p_q_scale,
    p_k_scale,
    p_shift,
    q_batch,
    q_head,
    q_token,
    out_batch,
    out_head,
    out_token,
    key_batch,
    key_head,
    scale,
    order_head,
    heads,
    tokens,
    q_blocks,
    width,
    shared,
    key_tiles,
    D: tl.constexpr,
    DP: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    QK8: tl.constexpr,
    ORDERED: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """s = scale q k^T + bias; out = sum 2^s v / sum 2^s; lse = ln 2 log2 sum 2^s.

    scale: log2(e) / sqrt(D). With QK8, q and k are int8, their scales stand one per tile, and shift
    is added to lse.
    Grid (nq * PARTS, B * H): PARTS programs of BM queries to a query block.
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
    q_base = p_q + i_b * q_batch + i_h * q_head
    b_q = tl.load(q_base + o_q[:, None] * q_token + o_d[None, :], mask=m_q, other=0.0)
    key_base = i_b * key_batch + i_h * key_head
    p_kt = p_k + key_base + o_n[None, :] * DP + o_d[:, None]
    p_vn = p_v + key_base + o_n[:, None] * DP + o_d[None, :]
    i_row = i_bh * q_blocks + i_block
    p_next = p_entry + i_row * width
    p_scale = p_k_scale + i_bh * key_tiles
    some = first < rows
    last = tl.where(some, tl.load(p_count + i_row), 0)
    whole = tl.where(some, tl.load(p_whole + i_row), 0)
    if QK8:
        scale *= tl.load(p_q_scale + i_bh * q_blocks * PARTS + i_part)

    b_max = tl.full([BM], LOWEST, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, DP], tl.float32)
    entry = tl.load(p_next)
    if SPLIT or not MASKED:
        for i in tl.range(0, whole, num_stages=STAGES):
            tile = entry & TILE_MASK
            row = tile.to(tl.int64) * BN
            b_k = tl.load(p_kt + row * DP)
            b_v = tl.load(p_vn + row * DP)
            factor = scale
            if QK8:
                factor = scale * tl.load(p_scale + tile)
            b_s = tl.dot(b_q, b_k, input_precision="ieee").to(tl.float32) * factor
            b_s += tl.load(p_bias + row + o_n)[None, :]
            entry = tl.load(p_next + i + 1)
            b_max, b_sum, b_acc, _, _ = take_tile(b_s, b_v, b_max, b_sum, b_acc)
    if MASKED:
        begin = whole if SPLIT else 0
        p_next_bits = p_bits + i_row * shared
        bits = tl.load(p_next_bits)
        for i in tl.range(begin, last, num_stages=STAGES):
            tile = entry & TILE_MASK
            row = tile.to(tl.int64) * BN
            b_k = tl.load(p_kt + row * DP)
            b_v = tl.load(p_vn + row * DP)
            factor = scale
            if QK8:
                factor = scale * tl.load(p_scale + tile)
            if not SPLIT:
                bits = tl.where(i < whole, -1, bits)
            b_s = tl.dot(b_q, b_k, input_precision="ieee").to(tl.float32) * factor
            b_s += masked_bias(tl.load(p_bias + row + o_n), o_n, entry, bits)[None, :]
            entry = tl.load(p_next + i + 1)
            bits = tl.load(p_next_bits + tl.maximum(i + 1 - whole, 0))
            b_max, b_sum, b_acc, _, _ = take_tile(b_s, b_v, b_max, b_sum, b_acc)

    b_out, b_lse = finish(b_max, b_sum, b_acc)
    p_o = p_out + i_b * out_batch + i_h * out_head + o_q[:, None] * out_token + o_d[None, :]
    tl.store(p_o, b_out.to(p_out.dtype.element_ty), mask=m_q)
    o_t = i_bh * tokens + o_q
    if QK8:
        b_lse += tl.load(p_shift + o_t, mask=m_m, other=0.0)
    tl.store(p_lse + o_t, b_lse, mask=m_m)


@triton.jit
def masked_bias(b_bias, o_n, entry, bits):  # type: ignore[no-untyped-def]
    """-inf where the block of a row is not wanted."""
    wanted = (bits >> (o_n >> ((entry >> SHIFT_AT) & 0xF))) & 1
    return tl.where(wanted != 0, b_bias, float("-inf"))


def levels_forward(
    q: Tensor,
    keys: Keys,
    lists: TileLists,
    rows: QueryRows,
    shape: Tiling,
    out: Tensor,
    lse: Tensor,
    scales: Scales | None = None,
) -> None:
    """Write out and lse.

    q [B, H, S, D] with stride 1 in D; out [B, H, S, D], strides of its own; lse float32 [B, H, S],
    contiguous: natural log, -inf where a row has no key. With scales, q and keys.k are int8.
    """
    levels_forward_operator(
        q,
        *(keys.k, keys.v, keys.bias),
        *(lists.entry, lists.bits, lists.count, lists.whole),
        *(rows.start, rows.count, rows.size, rows.order, out, lse),
        *((None, None, None) if scales is None else (scales.q, scales.k, scales.shift)),
        *(shape.block_m, shape.block_n, shape.warps, shape.stages, shape.split),
    )


@operator("levels_forward", mutates=("out", "lse"))
def levels_forward_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    entry: Tensor,
    bits: Tensor | None,
    count: Tensor,
    whole: Tensor,
    q_start: Tensor,
    q_count: Tensor,
    block_q: int,
    order: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    shift: Tensor | None,
    block_m: int,
    block_n: int,
    warps: int,
    stages: int,
    split: bool,
) -> None:
    """`levels_forward` with the fields of its arguments one by one."""
    batch, heads, tokens, depth = q.shape
    rows = QueryRows(q_start, q_count, block_q, order)
    parts = block_q // block_m
    with torch.cuda.device_of(q):
        levels_forward_kernel[(q_start.numel() * parts, batch * heads)](
            q,
            k,
            v,
            bias,
            entry,
            entry if bits is None else bits,
            count,
            whole,
            q_start,
            q_count,
            q_start if order is None else order,
            out,
            lse,
            *(lse if x is None else x for x in (q_scale, k_scale, shift)),
            *q.stride()[:3],
            *out.stride()[:3],
            *k.stride()[:2],
            depth**-0.5 * LOG2_E,
            rows.order_head,
            heads,
            tokens,
            q_start.numel(),
            entry.shape[1],
            0 if bits is None else bits.shape[1],
            k.shape[2] // block_n,
            D=depth,
            DP=k.shape[3],
            PARTS=parts,
            BM=block_m,
            BN=block_n,
            MASKED=bits is not None,
            QK8=shift is not None,
            ORDERED=order is not None,
            SPLIT=split,
            STAGES=stages,
            num_warps=warps,
            enable_fp_fusion=True,
        )
