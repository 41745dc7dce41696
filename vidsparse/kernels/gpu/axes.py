"""Main axes of covariances by subspace iteration, one program per matrix: `vidsparse.bisection`.

    B <- orthonormal(C B + least B),    B [D, A],    some times

Columns are made orthonormal by Gram and Schmidt, twice, one after the other: all of it is a launch,
where linear algebra of batches takes a hundred.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu.operator import operator


@triton.jit(do_not_specialize=["axes"])
def main_axes_kernel(  # type: ignore[no-untyped-def]
    p_covariance,
    p_start,
    p_out,
    axes,
    least,
    D: tl.constexpr,
    DP: tl.constexpr,
    AP: tl.constexpr,
    SWEEPS: tl.constexpr,
):
    """B of a matrix. Grid (matrices)."""
    i_matrix = tl.program_id(0).to(tl.int64)
    o_d, o_a = tl.arange(0, DP), tl.arange(0, AP)
    o_c = o_d[:, None] * D + o_d[None, :]
    m_c = (o_d < D)[:, None] & (o_d < D)[None, :]
    b_c = tl.load(p_covariance + i_matrix * D * D + o_c, mask=m_c, other=0.0)
    largest = tl.max(tl.max(tl.where(o_d[:, None] == o_d[None, :], b_c, 0.0), 1), 0)
    b_c = b_c / tl.where(largest > 0.0, largest, 1.0)
    o_b = o_d[:, None] * axes + o_a[None, :]
    m_b = (o_d < D)[:, None] & (o_a < axes)[None, :]
    b_basis = tl.load(p_start + o_b, mask=m_b, other=0.0)
    for _sweep in tl.range(0, SWEEPS):
        b_next = tl.zeros([DP, AP], tl.float32)
        for i in tl.range(0, axes):
            b_x = tl.sum(tl.where(o_a[None, :] == i, b_basis, 0.0), 1)
            b_x = tl.sum(b_c * b_x[None, :], 1) + least * b_x
            for _again in tl.static_range(2):
                b_along = tl.sum(b_next * b_x[:, None], 0)
                b_x -= tl.sum(b_next * b_along[None, :], 1)
                b_x = b_x / tl.sqrt(tl.maximum(tl.sum(b_x * b_x, 0), 1e-30))
            b_next = tl.where(o_a[None, :] == i, b_x[:, None], b_next)
        b_basis = b_next
    tl.store(p_out + i_matrix * D * axes + o_b, b_basis, mask=m_b)


@operator("main_axes")
def main_axes(covariance: Tensor, start: Tensor, least: float, sweeps: int) -> Tensor:
    """B of each matrix, float32 [G, D, A], divided by its largest variance before all else.

    covariance: float32 [G, D, D], symmetric, D up to 128. start: float32 [D, A], contiguous: B
    before the first of the sweeps; A <= D, up to 64.
    """
    groups, depth, _ = covariance.shape
    axes = start.shape[1]
    covariance = covariance.contiguous()
    out = covariance.new_empty(groups, depth, axes)
    with torch.cuda.device_of(covariance):
        main_axes_kernel[(groups,)](
            covariance,
            start,
            out,
            axes,
            least,
            D=depth,
            DP=max(16, 1 << (depth - 1).bit_length()),
            AP=1 << (axes - 1).bit_length(),
            SWEEPS=sweeps,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return out


@main_axes.register_fake
def _(covariance: Tensor, start: Tensor, least: float, sweeps: int) -> Tensor:
    return covariance.new_empty(covariance.shape[0], *start.shape)
