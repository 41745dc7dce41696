"""The sparse forward in any of its forms, as one operator of torch: `vidsparse::sparse_forward`."""

from __future__ import annotations

import torch
from torch import Tensor

from vidsparse.kernels.gpu import forward, forward_hopper
from vidsparse.kernels.gpu.operands import Keys, QueryRows, Scales, TileLists, Tiling


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
    *,
    form: str = "pointer",
) -> None:
    """Write out, lse and, if given, rest. form: "pointer", or one of the Hopper forms.

    q [B, H, S, D] with stride 1 in D; out [B, H, S, D], strides of its own; lse, rest float32
    [B, H, S], contiguous: natural-log LSE (-inf where a row has no key) and the share of the `rest`
    tiles. With scales, q and keys.k are int8.

    Raises ValueError for what the form cannot do.
    """
    sparse_forward_operator(
        q,
        *(keys.k, keys.v, keys.bias),
        *(lists.entry, lists.bits, lists.count, lists.whole),
        *(rows.start, rows.count, rows.size, rows.order),
        *(out, lse, rest),
        *((None, None, None) if scales is None else (scales.q, scales.k, scales.shift)),
        *(shape.block_m, shape.block_n, shape.warps, shape.stages, shape.registers, shape.split),
        form,
    )


@torch.library.custom_op("vidsparse::sparse_forward", mutates_args=("out", "lse", "rest"))
def sparse_forward_operator(
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
    rest: Tensor | None,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    shift: Tensor | None,
    block_m: int,
    block_n: int,
    warps: int,
    stages: int,
    registers: int | None,
    split: bool,
    form: str,
) -> None:
    """`sparse_forward` with the fields of its arguments one by one."""
    keys, lists = Keys(k, v, bias), TileLists(entry, bits, count, whole)
    rows = QueryRows(q_start, q_count, block_q, order)
    shape = Tiling(block_m, block_n, warps, stages, registers, split)
    scales = None
    if q_scale is not None and k_scale is not None and shift is not None:
        scales = Scales(q_scale, k_scale, shift)
    operands = q, keys, lists, rows, shape, out, lse, rest, scales
    if form == "pointer":
        forward.sparse_forward(*operands)
    else:
        forward_hopper.sparse_forward(*operands, form=form)
