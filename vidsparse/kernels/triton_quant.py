"""int8 queries and keys for the sparse forward: half the bytes of K, twice the product rate of QK.

A tile of rows shares one scale, x = scale * int8, scale = max |x| / 127. Before that a vector
common to all keys, their mean, is removed (SageAttention, arXiv 2410.02367): it adds the same
s q . mean to every logit of a query, which no softmax sees; the LSE gets it back. Pooled rows and
centroids are rows of the same buffer and lose the same vector. Values must be finite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.triton_forward import HEAD_DIMS, Keys, QueryRows, Scales, Tiling

SLAB = 1024
"""Rows that one program of `weighted_sum_kernel` adds up."""

STEP = 64
"""Rows that it adds at a time."""


@dataclass(frozen=True)
class Quantised:
    """x ~ scale * values + mean. values int8 [B, H, R, D], contiguous.

    scale: float32 [B, H, groups]; mean: float32 [B, H, D], what was subtracted, or None.
    """

    values: Tensor
    scale: Tensor
    mean: Tensor | None


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


@triton.jit(do_not_specialize=["heads", "tokens"])
def quantise_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_start,
    p_rows,
    p_bias,
    p_mean,
    p_values,
    p_scale,
    p_shift,
    x_batch,
    x_head,
    x_row,
    root,
    heads,
    tokens,
    D: tl.constexpr,
    DP: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    KEYS: tl.constexpr,
    MEAN: tl.constexpr,
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


def key_mean(x: Tensor, bias: Tensor) -> Tensor:
    """Mean over the tokens of rows that stand for 2^bias tokens each: float32 [B, H, DP].

    x [B, H, R, DP], heads of contiguous rows; bias float32 [R], -inf where a row has no token.
    """
    batch, heads, rows, width = x.shape
    slabs = triton.cdiv(rows, SLAB)
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


def quantise(x: Tensor, group: int, subtract_mean: bool, bias: Tensor) -> Quantised:
    """Keys in int8, one scale for every `group` rows.

    x [B, H, R, DP], R a multiple of group (a power of two); bias float32 [R], log2 of the tokens
    behind a row: rows of -inf become zero and have no part in a scale.
    """
    batch, heads, rows, _ = x.shape
    mean = key_mean(x, bias) if subtract_mean else None
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(batch, heads, rows // group, dtype=torch.float32, device=x.device)
    _launch(x, None, bias, mean, values, scale, None, group)
    return Quantised(values, scale, mean)


def quantise_queries(
    q: Tensor, rows: QueryRows, group: int, key_mean: Tensor | None = None
) -> tuple[Quantised, Tensor]:
    """Queries in int8, one scale for every `group` rows of a query block, and the LSE's shift.

    q [B, H, S, D] with stride 1 in D; key_mean float32 [B, H, DP], as `quantise` returns it.
    shift float32 [B, H, S]: q . key_mean / sqrt(D), zero without a mean.
    """
    batch, heads, tokens, _ = q.shape
    groups = rows.start.numel() * (rows.size // group)
    values = torch.empty(q.shape, dtype=torch.int8, device=q.device)
    scale = torch.empty(batch, heads, groups, dtype=torch.float32, device=q.device)
    shift = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    _launch(q, rows, None, key_mean, values, scale, shift, group)
    return Quantised(values, scale, None), shift


def int8_operands(
    q: Tensor, keys: Keys, rows: QueryRows, shape: Tiling, subtract_mean: bool = True
) -> tuple[Tensor, Keys, Scales]:
    """q, keys and scales for `sparse_forward` with int8 QK and the values as they are."""
    k = quantise(keys.k, shape.block_n, subtract_mean, keys.bias)
    queries, shift = quantise_queries(q, rows, shape.block_m, k.mean)
    return queries.values, replace(keys, k=k.values), Scales(queries.scale, k.scale, shift)


def _launch(
    x: Tensor,
    rows: QueryRows | None,
    bias: Tensor | None,
    mean: Tensor | None,
    values: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    group: int,
) -> None:
    """rows: of queries, with their shift; bias: of keys."""
    batch, heads, tokens, depth = x.shape
    padded = next(width for width in HEAD_DIMS if width >= depth)
    with torch.cuda.device_of(x):
        quantise_kernel[(scale.shape[2], batch * heads)](
            x,
            scale if rows is None else rows.start,
            scale if rows is None else rows.count,
            scale if bias is None else bias,
            scale if mean is None else mean,
            values,
            scale,
            scale if shift is None else shift,
            *x.stride()[:3],
            depth**-0.5,
            heads,
            tokens,
            D=depth,
            DP=padded,
            PARTS=1 if rows is None else rows.size // group,
            BM=group,
            KEYS=rows is None,
            MEAN=mean is not None,
            num_warps=8 if group * padded > 8192 else 4,
            enable_fp_fusion=True,
        )
