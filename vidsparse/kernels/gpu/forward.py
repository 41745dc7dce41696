"""The sparse forward in Triton, pointer form: sm_80 and newer, and Triton's CPU interpreter.

One program reads BM queries of one query block and walks that block's list of key tiles with an
online softmax in log2 units. `vidsparse.kernels.gpu.engine` lays out the keys and the lists.

In kernels: p_ pointer, o_ offsets, m_ mask, i_ index, b_ block in registers.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu.forward_parts import launch, masked_bias, store_rows, take_tile
from vidsparse.kernels.gpu.operands import (
    REST_AT,
    TILE_MASK,
    Keys,
    QueryRows,
    Scales,
    TileLists,
    Tiling,
)

log = logging.getLogger(__name__)


def interpreted() -> bool:
    """Whether this process runs kernels in Triton's CPU interpreter (TRITON_INTERPRET=1)."""
    return not isinstance(sparse_forward_kernel, triton.JITFunction)


TILINGS = {
    (8, 64): Tiling(128, 64, 8, 3, split=False),
    (8, 128): Tiling(128, 64, 8, 3, split=False),
    (9, 64): Tiling(128, 64, 8, 3),
    (9, 128): Tiling(128, 64, 8, 3),
    (10, 64): Tiling(128, 64, 8, 3),
    (10, 128): Tiling(128, 64, 8, 3),
    (12, 64): Tiling(64, 32, 4, 3),
    (12, 128): Tiling(64, 32, 4, 3),
}
"""Major compute capability and width of the key buffer -> for bfloat16 and float16."""

FLOAT32 = Tiling(32, 32, 8, 1)
"""For float32, whose exact products use no tensor cores and many registers."""

PORTABLE = Tiling(64, 32, 4, 3)
"""Fits a capability that `TILINGS` does not know."""


@lru_cache(maxsize=8)
def say_unknown(capability: tuple[int, int]) -> None:
    """Log that a device takes the portable tiling."""
    log.warning(
        "compute capability %d.%d is unknown to vidsparse: its Triton kernels run in their "
        "portable tiling, which may be slow",
        *capability,
    )


def tiling(
    dtype: torch.dtype, capability: tuple[int, int], block_q: int, block_k: int, width: int = 128
) -> Tiling:
    """Tiling for blocks of block_q x block_k tokens on a device of this compute capability.

    width: of the key buffer. An unknown capability takes the portable tiling and is named in the
    log once.
    """
    if dtype == torch.float32:
        return FLOAT32.within(block_q, block_k)
    known = TILINGS.get((capability[0], width))
    if known is None:
        say_unknown(capability)
    shape = (known or PORTABLE).within(block_q, block_k)
    return replace(shape, warps=min(shape.warps, max(4, shape.block_m // 16)))


@triton.jit(do_not_specialize=["heads", "tokens", "q_blocks", "width", "shared", "key_tiles"])
def sparse_forward_kernel(  # type: ignore[no-untyped-def]
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
    p_rest,
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
    REST: tl.constexpr,
    QK8: tl.constexpr,
    ORDERED: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """s = scale q k^T + bias; out = sum 2^s v / sum 2^s; lse = ln 2 log2 sum 2^s.

    scale: log2(e) / sqrt(D). With REST, rest is the share of sum 2^s in the tiles so marked. With
    QK8, q and k are int8, their scales stand one per tile, and shift is added to lse.
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
    m_m = o_m < rows
    m_q = m_m[:, None]
    if D < DP:
        m_q = m_q & (o_d < D)[None, :]
    o_q = tl.load(p_start + i_block) + o_m
    if ORDERED:
        o_q = tl.load(p_order + o_q, mask=m_m, other=0)
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

    b_max = tl.full([BM], -1e30, tl.float32)  # finite: a tile may be masked for every row
    b_sum = tl.zeros([BM], tl.float32)
    b_rest = tl.zeros([BM], tl.float32)
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
            b_max, b_sum, _, b_acc = take_tile(b_s, b_v, b_max, b_sum, b_rest, b_acc, 0.0, False)
    if MASKED:
        begin = whole if SPLIT else 0
        p_next_bits = p_bits + i_row * shared
        bits = tl.load(p_next_bits)
        for i in tl.range(begin, last, num_stages=STAGES):
            tile = entry & TILE_MASK
            row = tile.to(tl.int64) * BN
            is_rest = (entry >> REST_AT).to(tl.float32)
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
            b_max, b_sum, b_rest, b_acc = take_tile(
                b_s, b_v, b_max, b_sum, b_rest, b_acc, is_rest, REST
            )

    out_base = p_out + i_b * out_batch + i_h * out_head
    p_o = out_base + o_q[:, None] * out_token + o_d[None, :]
    o_t = i_bh * tokens + o_q
    p_l, p_r, p_s = p_lse + o_t, p_rest + o_t, p_shift + o_t
    store_rows(b_acc, b_max, b_sum, b_rest, p_o, p_l, p_r, p_s, m_q, m_m, REST, QK8)


def sparse_forward(
    q: Tensor,
    keys: Keys,
    lists: TileLists,
    rows: QueryRows,
    shape: Tiling,
    out: Tensor,
    lse: Tensor,
    rest: Tensor | None = None,
    scales: Scales | None = None,
) -> None:
    """`operator.sparse_forward` in the pointer form."""
    operands = q, keys, lists, rows, shape, out, lse, rest, scales
    launch(sparse_forward_kernel, keys.k, keys.v, keys.k.stride()[:2], *operands)
