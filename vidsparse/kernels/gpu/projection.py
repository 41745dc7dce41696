"""Rows on a few axes: products of all rows of a head, from which axes follow, and rows on them.

    G = sum over rows of x^T x,   m = sum of x;   y_t = x_t A

Numbers that are not finite count as 0. Rows of q or k are read where they stand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu import support
from vidsparse.kernels.gpu.operands import padded_width
from vidsparse.kernels.gpu.operator import operator
from vidsparse.kernels.gpu.select import LARGEST
from vidsparse.kernels.gpu.summary import Shape, load_rows, tokens_at

SLAB = 8192
"""Rows that one program sums."""

TILE = 64
"""Rows that a program projects."""


@triton.jit
def finite(b_x):  # type: ignore[no-untyped-def]
    """b_x with 0 for what is not finite."""
    return tl.where(tl.abs(b_x.to(tl.float32)) <= LARGEST, b_x, 0.0)


@triton.jit(do_not_specialize=["heads", "first", "rows"])
def grams_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_gram,
    p_sum,
    x_batch,
    x_head,
    x_token,
    heads,
    first,
    rows,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    SLAB: tl.constexpr,
    STAGES: tl.constexpr,
):
    """G and m over a slab of rows, float32. Grid (slabs, B * H)."""
    i_slab = tl.program_id(0)
    i_bh = tl.program_id(1).to(tl.int64)
    x_base = p_x + i_bh // heads * x_batch + i_bh % heads * x_head
    o_r = tl.arange(0, ROWS)
    o_d = tl.arange(0, DP)
    b_gram = tl.zeros([DP, DP], tl.float32)
    b_sum = tl.zeros([ROWS, DP], tl.float32)  # a thread asks no other before the end
    begin = i_slab * SLAB
    end = tl.minimum(begin + SLAB, rows)
    for at in tl.range(begin, end, ROWS, num_stages=STAGES):
        token = (first + at + o_r).to(tl.int64)
        b_x = finite(load_rows(x_base, token, at + o_r < end, x_token, D, DP))
        b_gram = tl.dot(tl.trans(b_x), b_x, b_gram, input_precision="ieee")
        b_sum += b_x.to(tl.float32)
    i_out = i_slab * tl.num_programs(1) + i_bh
    o_gram = o_d[:, None] * DP + o_d[None, :]
    tl.store(p_gram + i_out * DP * DP + o_gram, b_gram)
    tl.store(p_sum + i_out * DP + o_d, tl.sum(b_sum, 0))


@triton.jit(do_not_specialize=["heads", "first", "rows", "axes"])
def project_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_order,
    p_basis,
    p_out,
    x_batch,
    x_head,
    x_token,
    heads,
    first,
    rows,
    axes,
    D: tl.constexpr,
    DP: tl.constexpr,
    AP: tl.constexpr,
    ROWS: tl.constexpr,
    ORDERED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """y, an axis after the other. Grid (tiles of ROWS, B * H)."""
    i_bh = tl.program_id(1).to(tl.int64)
    x_base = p_x + i_bh // heads * x_batch + i_bh % heads * x_head
    o_t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, DP)
    o_a = tl.arange(0, AP)
    m_t = o_t < rows
    token = tokens_at(p_order, (first + o_t).to(tl.int64), m_t, ORDERED)
    b_x = finite(load_rows(x_base, token, m_t, x_token, D, DP)).to(tl.float32)
    m_basis = (o_d < D)[:, None] & (o_a < axes)[None, :]
    p_a = p_basis + (i_bh * D + o_d)[:, None] * axes + o_a[None, :]
    b_a = tl.load(p_a, mask=m_basis, other=0.0)
    PRECISION: tl.constexpr = "ieee" if WHOLE else "tf32x3"
    b_y = tl.dot(b_x, b_a, input_precision=PRECISION)
    p_y = p_out + (i_bh * axes + o_a)[None, :] * rows + o_t[:, None]
    tl.store(p_y, b_y, mask=m_t[:, None] & (o_a < axes)[None, :])


def shape_for(dtype: torch.dtype, capability: tuple[int, int]) -> Shape:
    """Of the sums, on a device of this compute capability."""
    if dtype == torch.float32:  # exact products use no tensor cores and many registers
        return Shape(32, 8, 1)
    if capability[0] == 9:
        return Shape(64, 8, 3)
    return Shape(64, 8, 1) if capability[0] == 10 else Shape(32, 8, 3)  # 64 spill on sm_80


@operator("grams")
def grams(x: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """G float32 [B, H, D, D] and m [B, H, D] of tokens first .. first + rows - 1 of x.

    x [B, H, S, D], D up to 128, read in place if its stride in D is 1.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, _, depth = x.shape
    padded, slabs = padded_width(depth), -(-rows // SLAB)
    shape = shape_for(x.dtype, support.capability(x.device))
    gram = x.new_empty(slabs, batch, heads, padded, padded, dtype=torch.float32)
    total = x.new_empty(slabs, batch, heads, padded, dtype=torch.float32)
    with torch.cuda.device_of(x):
        grams_kernel[(slabs, batch * heads)](
            x,
            gram,
            total,
            *x.stride()[:3],
            heads,
            first,
            rows,
            D=depth,
            DP=padded,
            ROWS=shape.rows,
            SLAB=SLAB,
            STAGES=shape.stages,
            num_warps=shape.warps,
            enable_fp_fusion=True,
        )
    return gram[..., :depth, :depth].sum(0), total[..., :depth].sum(0)


@grams.register_fake
def _(x: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    batch, heads, _, depth = x.shape
    total = x.new_empty(batch, heads, depth, dtype=torch.float32)
    return x.new_empty(batch, heads, depth, depth, dtype=torch.float32), total


@operator("project")
def project(x: Tensor, basis: Tensor, order: Tensor | None, first: int, rows: int) -> Tensor:
    """y float32 [B, H, A, rows], contiguous: positions first .. first + rows - 1 of x on A axes.

    x: as for `grams`. basis: float32 [B, H, D, A], A up to 64. order: int64 [S], contiguous:
    position t is token order[t] of x; None: t.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, _, depth = x.shape
    axes = basis.shape[3]
    out = x.new_empty(batch, heads, axes, rows, dtype=torch.float32)
    with torch.cuda.device_of(x):
        project_kernel[(-(-rows // TILE), batch * heads)](
            x,
            basis if order is None else order,
            basis.contiguous(),
            out,
            *x.stride()[:3],
            heads,
            first,
            rows,
            axes,
            D=depth,
            DP=padded_width(depth),
            AP=max(16, 1 << (axes - 1).bit_length()),
            ROWS=TILE,
            ORDERED=order is not None,
            WHOLE=support.capability(x.device) == support.AMD,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


@project.register_fake
def _(x: Tensor, basis: Tensor, order: Tensor | None, first: int, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:2], basis.shape[3], rows, dtype=torch.float32)
