"""The sparse forward in Triton, pointer form: sm_80 and newer, and Triton's CPU interpreter.

One program reads BM queries of one query block and walks that block's list of key tiles with an
online softmax in log2 units. `vidsparse.kernels.triton_engine` lays out the keys and the lists.

A list entry is int32, `rest << 30 | shift << 24 | tile`: rows tile * BN .. + BN of the key buffer,
2^shift rows to a key block; `rest` marks blocks that the plan does not list. A tile of several
blocks has an int64 of bits beside it, bit i set if its i-th block is wanted. The entry of the next
tile is loaded one turn ahead, so every list ends in a spare entry, which must be a valid tile.

In kernels: p_ pointer, o_ offsets, m_ mask, i_ index, b_ block in registers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

log = logging.getLogger(__name__)

HEAD_DIMS = (64, 128)
"""Widths of the key buffer; a smaller head dim is padded with zeros."""

TILE_MASK = tl.constexpr(0xFFFFFF)
SHIFT_AT = tl.constexpr(24)
REST_AT = tl.constexpr(30)
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tiling:
    """block_m queries x block_n keys per step, warps per program, stages of the K/V pipeline.

    registers: the most that a thread may use, None leaves it to the compiler.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True)
class Keys:
    """k, v [B, H, R, DP], finite; bias float32 [R], log2 of the tokens behind a row.

    Equal strides, the rows of a head contiguous; R is a multiple of block_n, DP one of `HEAD_DIMS`;
    rows without a token have bias -inf.
    """

    k: Tensor
    v: Tensor
    bias: Tensor


@dataclass(frozen=True)
class TileLists:
    """entry int32 [rows, W]; bits int64 [rows, W], or None if every tile is inside one block.

    count int32 [rows], entries in use, <= W - 1; rows = B * H * nq.
    """

    entry: Tensor
    bits: Tensor | None
    count: Tensor


@dataclass(frozen=True)
class QueryRows:
    """start int64 [nq], count int32 [nq]: tokens of each query block; size: its nominal size."""

    start: Tensor
    count: Tensor
    size: int


@dataclass(frozen=True)
class Scales:
    """Of int8 q and k, as `triton_quant` makes them; contiguous float32.

    q [B, H, nq * parts], one per block_m queries of a query block; k [B, H, R / block_n], one per
    tile; shift [B, H, S], added to the LSE: (q . vector removed from every key) / sqrt(D).
    """

    q: Tensor
    k: Tensor
    shift: Tensor


def word(height: int, is_rest: bool) -> int:
    """List entry of tile 0 of a segment with `height` rows (a power of two) to a key block.

    Or it with a tile number.
    """
    return (height.bit_length() - 1) << SHIFT_AT.value | int(is_rest) << REST_AT.value


def interpreted() -> bool:
    """Whether this process runs kernels in Triton's CPU interpreter (TRITON_INTERPRET=1)."""
    return not isinstance(sparse_forward_kernel, triton.JITFunction)


KNOWN = (8, 9, 10, 12)
"""Major compute capabilities whose machine code was looked at."""

LARGE = (8, 9, 10)
"""Those with registers and shared memory for tiles of 128 x 64."""


@lru_cache(maxsize=8)
def say_unknown(capability: tuple[int, int]) -> None:
    """Log that a device takes the portable tiling."""
    log.warning(
        "compute capability %d.%d is unknown to vidsparse: its Triton kernels run in their "
        "portable tiling, which may be slow",
        *capability,
    )


def tiling(dtype: torch.dtype, capability: tuple[int, int], block_q: int, block_k: int) -> Tiling:
    """Tiling for blocks of block_q x block_k tokens on a device of this compute capability.

    An unknown capability takes the small tiles, which fit everywhere, and is named in the log once.
    """
    if dtype == torch.float32:  # exact products use no tensor cores and many registers
        return Tiling(min(32, block_q), min(32, block_k), 8, 1)
    if capability[0] not in KNOWN:
        say_unknown(capability)
    block_m, block_n = (128, 64) if capability[0] in LARGE else (64, 32)
    block_m, block_n = min(block_m, block_q), min(block_n, block_k)
    return Tiling(block_m, block_n, 8 if block_m == 128 else 4, 3)


FIRST_ORDER_STEP = 32
"""Columns of q that `add_first_order` multiplies at a time."""


def first_order_rows(dtype: torch.dtype) -> int:
    """Queries in one program of `add_first_order`."""
    return 32 if dtype == torch.float32 else 64


@triton.jit
def online_softmax(b_s, b_max, b_sum, b_rest, is_rest, REST: tl.constexpr):  # type: ignore[no-untyped-def]
    """One more tile of scores: 2^(s - max), the factor of earlier sums, the new max and sums."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.math.exp2(b_s - b_new[:, None])
    alpha = tl.math.exp2(b_max - b_new)
    b_part = tl.sum(b_p, 1)
    b_sum = b_sum * alpha + b_part
    if REST:
        b_rest = b_rest * alpha + b_part * is_rest
    return b_p, alpha, b_new, b_sum, b_rest


@triton.jit
def store_rows(  # type: ignore[no-untyped-def]
    b_acc,
    b_max,
    b_sum,
    b_rest,
    p_out,
    p_lse,
    p_rest,
    p_shift,
    m_out,
    m_row,
    REST: tl.constexpr,
    QK8: tl.constexpr,
):
    """Output, LSE and rest share of finished rows; b_sum 0 stands for a row without a key."""
    empty = b_sum == 0.0
    b_safe = tl.where(empty, 1.0, b_sum)
    b_inverse = 1.0 / b_safe
    b_out = b_acc * b_inverse[:, None]
    tl.store(p_out, b_out.to(p_out.dtype.element_ty), mask=m_out)
    b_lse = tl.where(empty, float("-inf"), (b_max + tl.math.log2(b_safe)) * LN_2)
    if QK8:
        b_lse += tl.load(p_shift, mask=m_row, other=0.0)
    tl.store(p_lse, b_lse, mask=m_row)
    if REST:
        tl.store(p_rest, b_rest * b_inverse, mask=m_row)


@triton.jit(do_not_specialize=["heads", "tokens", "q_blocks", "width", "key_tiles"])
def sparse_forward_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_k,
    p_v,
    p_bias,
    p_entry,
    p_bits,
    p_count,
    p_start,
    p_rows,
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
    key_tiles,
    D: tl.constexpr,
    DP: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    REST: tl.constexpr,
    QK8: tl.constexpr,
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
    q_base = p_q + i_b * q_batch + i_h * q_head
    b_q = tl.load(q_base + o_q[:, None] * q_token + o_d[None, :], mask=m_q, other=0.0)
    key_base = i_b * key_batch + i_h * key_head
    p_kt = p_k + key_base + o_n[None, :] * DP + o_d[:, None]
    p_vn = p_v + key_base + o_n[:, None] * DP + o_d[None, :]
    i_row = i_bh * q_blocks + i_block
    p_next = p_entry + i_row * width
    count = tl.where(first < rows, tl.load(p_count + i_row), 0)
    if QK8:
        scale *= tl.load(p_q_scale + i_bh * q_blocks * PARTS + i_part)

    b_max = tl.full([BM], -1e30, tl.float32)  # finite: a tile may be masked for every row
    b_sum = tl.zeros([BM], tl.float32)
    b_rest = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, DP], tl.float32)
    entry = tl.load(p_next)
    if MASKED:
        p_next_bits = p_bits + i_row * width
        bits = tl.load(p_next_bits)
    for i in tl.range(0, count, num_stages=STAGES):
        tile = entry & TILE_MASK
        row = tile.to(tl.int64) * BN
        shift = (entry >> SHIFT_AT) & 0xF
        is_rest = (entry >> REST_AT).to(tl.float32)
        b_k = tl.load(p_kt + row * DP)
        b_v = tl.load(p_vn + row * DP)
        b_bias = tl.load(p_bias + row + o_n)
        factor = scale
        if QK8:
            factor = scale * tl.load(p_k_scale + i_bh * key_tiles + tile)
        entry = tl.load(p_next + i + 1)
        if MASKED:
            wanted = (bits >> (o_n >> shift)) & 1
            b_bias = tl.where(wanted != 0, b_bias, float("-inf"))
            bits = tl.load(p_next_bits + i + 1)
        b_s = tl.dot(b_q, b_k, input_precision="ieee").to(tl.float32) * factor + b_bias[None, :]
        b_p, alpha, b_max, b_sum, b_rest = online_softmax(b_s, b_max, b_sum, b_rest, is_rest, REST)
        b_acc = b_acc * alpha[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")

    out_base = p_out + i_b * out_batch + i_h * out_head
    p_o = out_base + o_q[:, None] * out_token + o_d[None, :]
    o_t = i_bh * tokens + o_q
    p_l, p_r, p_s = p_lse + o_t, p_rest + o_t, p_shift + o_t
    store_rows(b_acc, b_max, b_sum, b_rest, p_o, p_l, p_r, p_s, m_q, m_m, REST, QK8)


@triton.jit(do_not_specialize=["heads", "tokens"])
def add_first_order_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_moment,
    p_rest,
    p_out,
    q_batch,
    q_head,
    q_token,
    out_batch,
    out_head,
    out_token,
    scale,
    heads,
    tokens,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """out += rest * scale * (q moment), in place. Grid (tokens / BM, B * H)."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // heads
    i_h = i_bh % heads
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, DP)
    o_k = tl.arange(0, BK)
    m_m = o_m < tokens
    q_base = p_q + i_b * q_batch + i_h * q_head + o_m[:, None] * q_token
    p_h = p_moment + i_bh * DP * DP + o_d[None, :]
    b_term = tl.zeros([BM, DP], tl.float32)
    for i_k in tl.range(0, DP, BK):
        m_k = m_m[:, None] & (i_k + o_k < D)[None, :]
        b_q = tl.load(q_base + (i_k + o_k)[None, :], mask=m_k, other=0.0)
        b_h = tl.load(p_h + (i_k + o_k)[:, None] * DP)
        b_term = tl.dot(b_q, b_h, b_term, input_precision="ieee")
    b_rest = tl.load(p_rest + i_bh * tokens + o_m, mask=m_m, other=0.0) * scale
    m_q = m_m[:, None] & (o_d < D)[None, :]
    out_base = p_out + i_b * out_batch + i_h * out_head
    p_o = out_base + o_m[:, None] * out_token + o_d[None, :]
    b_out = tl.load(p_o, mask=m_q, other=0.0).to(tl.float32) + b_term * b_rest[:, None]
    tl.store(p_o, b_out.to(p_out.dtype.element_ty), mask=m_q)


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
    """Run `sparse_forward_kernel`; writes out, lse and, if given, rest.

    q [B, H, S, D] with stride 1 in D; out [B, H, S, D], strides of its own; lse, rest float32
    [B, H, S], contiguous: natural-log LSE (-inf where a row has no key) and the share of the `rest`
    tiles. With scales, q and keys.k are int8.
    """
    operands = q, keys, lists, rows, shape, out, lse, rest, scales
    launch(sparse_forward_kernel, keys.k, keys.v, keys.k.stride()[:2], *operands)


def launch(
    kernel: Any,
    k: Any,
    v: Any,
    key_strides: tuple[int, ...],
    q: Tensor,
    keys: Keys,
    lists: TileLists,
    rows: QueryRows,
    shape: Tiling,
    out: Tensor,
    lse: Tensor,
    rest: Tensor | None,
    scales: Scales | None,
    **flags: bool,
) -> None:
    """Run one form of the forward: a kernel with the parameters of `sparse_forward_kernel`.

    k, v, key_strides: the keys as the kernel takes them; flags: its further constants.
    """
    batch, heads, tokens, depth = q.shape
    parts = rows.size // shape.block_m
    limit = {} if shape.registers is None else {"maxnreg": shape.registers}
    with torch.cuda.device_of(q):
        kernel[(rows.start.numel() * parts, batch * heads)](
            q,
            k,
            v,
            keys.bias,
            lists.entry,
            lists.entry if lists.bits is None else lists.bits,
            lists.count,
            rows.start,
            rows.count,
            out,
            lse,
            lse if rest is None else rest,
            *((lse, lse, lse) if scales is None else (scales.q, scales.k, scales.shift)),
            *q.stride()[:3],
            *out.stride()[:3],
            *key_strides,
            depth**-0.5 * LOG2_E,
            heads,
            tokens,
            rows.start.numel(),
            lists.entry.shape[1],
            keys.k.shape[2] // shape.block_n,
            D=depth,
            DP=keys.k.shape[3],
            PARTS=parts,
            BM=shape.block_m,
            BN=shape.block_n,
            MASKED=lists.bits is not None,
            REST=rest is not None,
            QK8=scales is not None,
            STAGES=shape.stages,
            num_warps=shape.warps,
            enable_fp_fusion=True,
            **limit,
            **flags,
        )


def add_first_order(q: Tensor, moment: Tensor, rest: Tensor, out: Tensor) -> None:
    """out += rest * (q moment) / sqrt(D), in place.

    q, out [B, H, S, D] with stride 1 in D; moment [B, H, DP, DP] contiguous, dtype of q; rest
    float32 [B, H, S] contiguous.
    """
    batch, heads, tokens, depth = q.shape
    block_m = first_order_rows(q.dtype)
    with torch.cuda.device_of(q):
        add_first_order_kernel[(triton.cdiv(tokens, block_m), batch * heads)](
            q,
            moment,
            rest,
            out,
            *q.stride()[:3],
            *out.stride()[:3],
            depth**-0.5,
            heads,
            tokens,
            D=depth,
            DP=moment.shape[-1],
            BM=block_m,
            BK=FIRST_ORDER_STEP,
            num_warps=4,
            enable_fp_fusion=True,
        )
