"""int8 queries and keys for `levels_forward`: half the bytes of K, twice the product rate of QK.

A tile of rows shares one scale, x = scale * int8, scale = max |x| / 127. Before that a vector
common to all keys, their mean, is removed (SageAttention, arXiv 2410.02367): it adds the same
s q . mean to every logit of a query, which no softmax sees; the LSE gets it back. Pooled rows and
centroids are rows of the same buffer and lose the same vector. Values must be finite.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu.operands import (
    Keys,
    QueryRows,
    Scales,
    Tiling,
    order_head,
    padded_width,
)
from vidsparse.kernels.gpu.operator import operator

SLAB = 1024
"""Rows that one program of `weighted_sum_kernel` adds up."""

STEP = 64
"""Rows that it adds at a time."""


@triton.jit(do_not_specialize=["heads", "rows"])
def weighted_sum_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_bias,
    p_sum,
    x_batch,
    x_head,
    heads,
    rows,
    DP: tl.constexpr,
    SLAB: tl.constexpr,
    STEP: tl.constexpr,
):
    """sum = sum of 2^bias x over the rows of a slab. Grid (rows / SLAB, B * H)."""
    i_bh = tl.program_id(1).to(tl.int64)
    p_rows = p_x + (i_bh // heads) * x_batch + (i_bh % heads) * x_head
    o_d = tl.arange(0, DP)
    b_sum = tl.zeros([DP], tl.float32)
    first = tl.program_id(0) * SLAB
    for i in tl.range(0, SLAB, STEP):
        o_n = first + i + tl.arange(0, STEP)
        b_bias = tl.load(p_bias + o_n, mask=o_n < rows, other=float("-inf"))
        p_row = p_rows + o_n[:, None] * DP + o_d[None, :]
        b_x = tl.load(p_row, mask=(o_n < rows)[:, None], other=0.0).to(tl.float32)
        b_sum += tl.sum(b_x * tl.math.exp2(b_bias)[:, None], 0)
    i_slab = i_bh * tl.num_programs(0) + tl.program_id(0)
    tl.store(p_sum + i_slab * DP + o_d, b_sum)


@triton.jit(do_not_specialize=["order_head", "heads", "tokens"])
def quantise_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_start,
    p_rows,
    p_order,
    p_bias,
    p_mean,
    p_values,
    p_scale,
    p_shift,
    x_batch,
    x_head,
    x_row,
    root,
    order_head,
    heads,
    tokens,
    D: tl.constexpr,
    DP: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    KEYS: tl.constexpr,
    MEAN: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """values = round(x / scale), scale = max |x| / 127 over BM rows. Grid (groups, B * H).

    KEYS: groups of BM rows from 0 on; rows of bias -inf become zero; MEAN: x - mean instead of x.
    Otherwise PARTS groups to a block of start and rows, and shift = root x . mean, 0 without MEAN.
    """
    i_part = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, DP)
    o_m = (i_part % PARTS) * BM + tl.arange(0, BM)
    if KEYS:
        o_x = i_part.to(tl.int64) * BM + tl.arange(0, BM)
        m_m = tl.load(p_bias + o_x) > float("-inf")
        m_store = o_x < tokens
    else:
        o_x = tl.load(p_start + i_part // PARTS) + o_m
        m_m = o_m < tl.load(p_rows + i_part // PARTS)
        m_store = m_m
        if ORDERED:
            o_x = tl.load(p_order + i_bh * order_head + o_x, mask=m_m, other=0)
    m_d = (o_d < D)[None, :]
    p_row = p_x + (i_bh // heads) * x_batch + (i_bh % heads) * x_head + o_x[:, None] * x_row
    m_x = m_m[:, None] & m_d
    b_x = tl.load(p_row + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_shift = tl.zeros([BM], tl.float32)
    if MEAN:
        b_mean = tl.load(p_mean + i_bh * DP + o_d)[None, :]
        if KEYS:
            b_x = tl.where(m_x, b_x - b_mean, 0.0)
        else:
            b_shift = tl.sum(b_x * b_mean, 1) * root
    peak = tl.max(tl.max(tl.abs(b_x), 1), 0)
    scale = tl.where(peak > 1e-30, peak / 127.0, 1.0)
    b_values = tl.floor(b_x * (1.0 / scale) + 0.5).to(tl.int8)
    o_row = i_bh * tokens + o_x
    tl.store(p_values + o_row[:, None] * D + o_d[None, :], b_values, mask=m_store[:, None] & m_d)
    tl.store(p_scale + i_bh * tl.num_programs(0) + i_part, scale)
    if not KEYS:
        tl.store(p_shift + o_row, b_shift, mask=m_m)


@operator("key_mean")
def key_mean(x: Tensor, bias: Tensor) -> Tensor:
    """Mean over the tokens of rows that stand for 2^bias tokens each: float32 [B, H, DP].

    x [B, H, R, DP], heads of contiguous rows; bias float32 [R], -inf where a row has no token.
    """
    batch, heads, rows, width = x.shape
    slabs = -(-rows // SLAB)
    sums = torch.empty(batch, heads, slabs, width, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        weighted_sum_kernel[(slabs, batch * heads)](
            x,
            bias,
            sums,
            *x.stride()[:2],
            heads,
            rows,
            DP=width,
            SLAB=SLAB,
            STEP=STEP,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return sums.sum(2) / bias.exp2().sum()


@key_mean.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], x.shape[3], dtype=torch.float32)


@operator("quantise_keys")
def quantise_keys(
    x: Tensor, group: int, bias: Tensor, mean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Keys in int8, values [B, H, R, DP], and a scale for every `group` rows, [B, H, R / group].

    x [B, H, R, DP], R a multiple of group (a power of two); bias float32 [R], log2 of the tokens
    behind a row: rows of -inf become zero and have no part in a scale. mean float32 [B, H, DP]: is
    subtracted from every row.
    """
    batch, heads, rows, _ = x.shape
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(batch, heads, rows // group, dtype=torch.float32, device=x.device)
    operands = bias, scale if mean is None else mean, values, scale, scale
    _launch(x, scale, scale, scale, *operands, BM=group, PARTS=1, KEYS=True, MEAN=mean is not None)
    return values, scale


@quantise_keys.register_fake
def _(x: Tensor, group: int, bias: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = x.shape
    values = x.new_empty(x.shape, dtype=torch.int8)
    return values, x.new_empty(batch, heads, rows // group, dtype=torch.float32)


@operator("quantise_queries")
def quantise_queries(
    q: Tensor,
    start: Tensor,
    count: Tensor,
    size: int,
    group: int,
    mean: Tensor | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries in int8, values [B, H, S, D], a scale per `group` rows of a block, the LSE's shift.

    q [B, H, S, D] with stride 1 in D; start, count, size, order: as `QueryRows`; mean float32
    [B, H, DP]: what was subtracted from the keys. scale float32 [B, H, n * size / group]; shift
    float32 [B, H, S]: q . mean / sqrt(D), zero without a mean.
    """
    batch, heads, tokens, _ = q.shape
    parts = size // group
    values = torch.empty(q.shape, dtype=torch.int8, device=q.device)
    scale = torch.empty(batch, heads, len(start) * parts, dtype=torch.float32, device=q.device)
    shift = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    operands = scale, scale if mean is None else mean, values, scale, shift
    place = start, count, start if order is None else order
    flags = {"KEYS": False, "MEAN": mean is not None}
    _launch(q, *place, *operands, order=order, BM=group, PARTS=parts, **flags)
    return values, scale, shift


@quantise_queries.register_fake
def _(
    q: Tensor,
    start: Tensor,
    count: Tensor,
    size: int,
    group: int,
    mean: Tensor | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = start.shape[0] * (size // group)
    values = torch.empty(q.shape, dtype=torch.int8, device=q.device)
    scale = q.new_empty(*q.shape[:2], groups, dtype=torch.float32)
    return values, scale, q.new_empty(q.shape[:3], dtype=torch.float32)


def int8_operands(
    q: Tensor, keys: Keys, rows: QueryRows, shape: Tiling, subtract_mean: bool = True
) -> tuple[Tensor, Keys, Scales]:
    """q, keys and scales for `levels_forward` with int8 QK and the values as they are."""
    mean = key_mean(keys.k, keys.bias) if subtract_mean else None
    k, k_scale = quantise_keys(keys.k, shape.block_n, keys.bias, mean)
    place = rows.start, rows.count, rows.size, shape.block_m
    queries, q_scale, shift = quantise_queries(q, *place, mean, rows.order)
    return queries, replace(keys, k=k), Scales(q_scale, k_scale, shift)


def _launch(x: Tensor, *operands: Tensor, order: Tensor | None = None, **constants: int) -> None:
    """Run `quantise_kernel`; operands: its pointers from p_start on."""
    _, heads, tokens, depth = x.shape
    padded = padded_width(depth)
    *_, scale, _ = operands
    with torch.cuda.device_of(x):
        quantise_kernel[(scale.shape[2], x.shape[0] * heads)](
            x,
            *operands,
            *x.stride()[:3],
            depth**-0.5,
            order_head(order),
            heads,
            tokens,
            D=depth,
            DP=padded,
            ORDERED=order is not None,
            num_warps=8 if constants["BM"] * padded > 8192 else 4,
            enable_fp_fusion=True,
            **constants,
        )
