"""What each row gives the blocks that it does not list, one program per row.

w_ij = softmax_j(logits_ij + ln n_j + tilt_ij)     for their moments, 0 for all other blocks
b_ij = log2 n_j + tilt_ij / ln 2                   for their centroids, -inf for all others
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu.operator import operator
from vidsparse.kernels.gpu.select import warps, width
from vidsparse.kernels.gpu.softmax import LN_2


@triton.jit(do_not_specialize=["k_blocks", "columns"])
def rest_weights_kernel(  # type: ignore[no-untyped-def]
    p_logit,
    p_levels,
    p_tilt,
    p_count,
    p_out,
    k_blocks,
    columns,
    NK: tl.constexpr,
    TILT: tl.constexpr,
):
    """w_ij of a row, `columns` of them. Grid (B * H * nq)."""
    i_row = tl.program_id(0).to(tl.int64) * k_blocks
    o_k = tl.arange(0, NK)
    m_k = o_k < k_blocks
    m_k = m_k & (tl.load(p_levels + i_row + o_k, mask=m_k, other=0) < 0)
    b_count = tl.load(p_count + o_k, mask=m_k, other=1).to(tl.float32)
    b_s = tl.load(p_logit + i_row + o_k, mask=m_k, other=float("-inf")) + tl.log(b_count)
    if TILT:
        b_s += tl.load(p_tilt + i_row + o_k, mask=m_k, other=0.0)
    top = tl.maximum(tl.max(b_s, 0), -1e30)  # of a row that lists every block
    b_mass = tl.where(m_k, tl.exp(b_s - top), 0.0)
    total = tl.sum(b_mass, 0)
    b_weight = b_mass / tl.where(total == 0.0, 1.0, total)
    p_w = p_out + tl.program_id(0).to(tl.int64) * columns + o_k
    tl.store(p_w, b_weight.to(p_out.dtype.element_ty), mask=o_k < columns)


@operator("rest_weights")
def rest_weights(
    logits: Tensor,
    levels: Tensor,
    tilt: Tensor | None,
    count: Tensor,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """w_ij for all rows, [B, H, nq, columns] in a dtype, 0 past the last block; columns >= nk.

    logits: float32 [B, H, nq, nk]; levels: int8, negative for a block that is not listed; tilt:
    float32 or None, zero; all as large as logits and contiguous. count: integers [nk], tokens of
    the key blocks.
    """
    blocks = logits.shape[3]
    out = logits.new_empty(*logits.shape[:3], columns, dtype=dtype)
    with torch.cuda.device_of(logits):
        rest_weights_kernel[(logits.numel() // blocks,)](
            logits,
            levels,
            logits if tilt is None else tilt,
            count,
            out,
            blocks,
            columns,
            NK=width(columns),
            TILT=tilt is not None,
            num_warps=warps(width(columns)),
            enable_fp_fusion=True,
        )
    return out


@rest_weights.register_fake
def _(
    logits: Tensor,
    levels: Tensor,
    tilt: Tensor | None,
    count: Tensor,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return logits.new_empty(*logits.shape[:3], columns, dtype=dtype)


@triton.jit(do_not_specialize=["k_blocks"])
def rest_bias_kernel(  # type: ignore[no-untyped-def]
    p_levels, p_tilt, p_bias, p_out, k_blocks, rows, NK: tl.constexpr, TILT: tl.constexpr
):
    """b_ij of a row, `rows` of them. Grid (B * H * nq)."""
    i_row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, NK)
    m_k = o_k < k_blocks
    unlisted = tl.load(p_levels + i_row * k_blocks + o_k, mask=m_k, other=0) < 0
    b_bias = tl.load(p_bias + o_k, mask=m_k, other=0.0)
    if TILT:
        b_bias += tl.load(p_tilt + i_row * k_blocks + o_k, mask=m_k, other=0.0) / LN_2
    b_bias = tl.where(unlisted, b_bias, float("-inf"))
    tl.store(p_out + i_row * rows + o_k, b_bias, mask=o_k < rows)


@operator("rest_bias")
def rest_bias(levels: Tensor, tilt: Tensor | None, bias: Tensor) -> Tensor:
    """b_ij for all rows, float32 [B, H, nq, R], -inf past the last block.

    levels: int8 [B, H, nq, nk], negative for a block that is not listed; tilt: float32, as large,
    or None, zero; both contiguous. bias: float32 [R], R >= nk, log2 n_j.
    """
    blocks, rows = levels.shape[3], bias.numel()
    out = _empty_bias(levels, bias)
    with torch.cuda.device_of(levels):
        rest_bias_kernel[(levels.numel() // blocks,)](
            levels,
            bias if tilt is None else tilt,
            bias,
            out,
            blocks,
            rows,
            NK=width(rows),
            TILT=tilt is not None,
            num_warps=warps(width(rows)),
            enable_fp_fusion=True,
        )
    return out


@rest_bias.register_fake
def _(levels: Tensor, tilt: Tensor | None, bias: Tensor) -> Tensor:
    return _empty_bias(levels, bias)


def _empty_bias(levels: Tensor, bias: Tensor) -> Tensor:
    return bias.new_empty(*levels.shape[:3], bias.shape[0])
