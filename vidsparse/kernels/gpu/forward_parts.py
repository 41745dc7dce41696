"""What the forms of the sparse forward share: a step of the softmax, the store, the launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidsparse.kernels.gpu.operands import (
    LN_2,
    LOG2_E,
    SHIFT_AT,
    Keys,
    QueryRows,
    Scales,
    TileLists,
    Tiling,
)


@triton.jit
def take_tile(b_s, b_v, b_max, b_sum, b_rest, b_acc, is_rest, REST: tl.constexpr):  # type: ignore[no-untyped-def]
    """One step of the online softmax: the new maximum, sums and accumulator of scores b_s."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.math.exp2(b_s - b_new[:, None])
    alpha = tl.math.exp2(b_max - b_new)
    b_part = tl.sum(b_p, 1)
    b_sum = b_sum * alpha + b_part
    if REST:
        b_rest = b_rest * alpha + b_part * is_rest
    b_acc = b_acc * alpha[:, None]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
    return b_new, b_sum, b_rest, b_acc


@triton.jit
def masked_bias(b_bias, o_n, entry, bits):  # type: ignore[no-untyped-def]
    """-inf where the block of a row is not wanted."""
    wanted = (bits >> (o_n >> ((entry >> SHIFT_AT) & 0xF))) & 1
    return tl.where(wanted != 0, b_bias, float("-inf"))


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
            lists.whole,
            rows.start,
            rows.count,
            rows.start if rows.order is None else rows.order,
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
            0 if lists.bits is None else lists.bits.shape[1],
            keys.k.shape[2] // shape.block_n,
            D=depth,
            DP=keys.k.shape[3],
            PARTS=parts,
            BM=shape.block_m,
            BN=shape.block_n,
            MASKED=lists.bits is not None,
            REST=rest is not None,
            QK8=scales is not None,
            ORDERED=rows.order is not None,
            SPLIT=shape.split,
            STAGES=shape.stages,
            num_warps=shape.warps,
            enable_fp_fusion=True,
            **limit,
            **flags,
        )
