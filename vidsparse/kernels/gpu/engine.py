"""The Triton executor: from a plan to the launches of the kernels, with no wait for the device.

Needs a CUDA device of compute capability 8.0 or newer, or TRITON_INTERPRET=1 set before the import.
Scores, softmax and sums are fp32; means of keys and values are rounded to the input's dtype.

The key buffer holds, for every level in use, block_k >> level rows per key block whatever its true
length, so a block may be short anywhere; rows without a token are zero and have bias -inf.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.kernels.call_check import check_call
from vidsparse.kernels.gpu import forward, forward_hopper, quant, support
from vidsparse.kernels.gpu.lists import Segment, pack_lists
from vidsparse.kernels.gpu.operands import (
    Keys,
    QueryRows,
    TileLists,
    Tiling,
    padded_width,
)
from vidsparse.kernels.gpu.operator import sparse_forward
from vidsparse.kernels.gpu.pool import ABSENT, fill_keys
from vidsparse.kernels.gpu.support import BLOCK_SIZES, DTYPES, MAX_HEAD_DIM
from vidsparse.kernels.gpu.taylor import add_first_order, taylor_state
from vidsparse.plan import SKIP, BlockPlan


@dataclass(frozen=True)
class KeyLayout:
    """Where the tokens of a cut stand in the key buffer; levels in use only, 0 always.

    first: first row of each level; rows: length of the buffer; start int64 [nk], count int32 [nk]:
    tokens of the blocks; bias: float32 [rows], log2 of the tokens behind a row.
    """

    blocks: Blocks
    first: dict[int, int]
    rows: int
    start: Tensor
    count: Tensor
    bias: Tensor


def execute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    order: Tensor | None = None,
    return_lse: bool = False,
    form: str = "auto",
    qk: str = "native",
) -> tuple[Tensor, Tensor | None]:
    """Attention by a plan; formulas in `vidsparse.kernels`. Inference only.

    q [B, H, Sq, D], k, v [B, H, Sk, D]: one device, one dtype (float32, bfloat16, float16), D up to
        128; transposed views of [B, S, H, D] tensors are read in place. Values must be finite.
    plan: any levels, blocks of 16, 32, 64 or 128 tokens, short ones anywhere; `rest` SKIP or the
        centroid; `first_order` "none" or "global"; its level map on the device of q.
    order: int64 [S] on the device of q: position t of the plan's blocks is token order[t] of q, k,
        v and the results, gathered and scattered where the kernels read and write; None: token t.
    form: "pointer", "tma" or "ws" of the forward kernel; "auto": "pointer".
    qk: "native", or "int8" for products of 8-bit queries and keys, relative error about 1e-2.

    Returns out, shape, dtype and memory layout like q, and the LSE float32 [B, H, Sq] (natural log)
    or None.

    Raises ValueError for anything else, for inputs that require grad and for devices without
    support.
    """
    _check(q, k, v, plan, order)
    if qk not in ("native", "int8"):
        raise ValueError(f"qk={qk!r}: allowed are native and int8")
    form = "pointer" if form == "auto" else form
    order = None if order is None else order.contiguous()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = _empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse if return_lse else None
    shape = tiling_for(q, plan, form)
    layout = layout_for(plan, shape.block_n, q.device)
    keys = fill(k, v, layout, order)
    lists = lists_for(plan, layout, shape.block_n)
    rows = replace(query_rows(plan.q_blocks, q.device), order=order)
    rest = torch.empty_like(lse) if plan.first_order == "global" else None
    scales, queries = None, q
    if qk == "int8":
        queries, keys, scales = quant.int8_operands(q, keys, rows, shape)
    sparse_forward(queries, keys, lists, rows, shape, out, lse, rest, scales, form=form)
    if rest is not None:
        first_order(q, k, v, plan, rest, out, order)
    return out, lse if return_lse else None


def check_settings(
    device: torch.device, dtype: torch.dtype, head_dim: int, sizes: tuple[int, int], form: str
) -> None:
    """Raise the ValueError that a call with such queries and settings would raise.

    sizes: of query and key blocks. form: as for `execute`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"{dtype}: the Triton engine computes in float32, bfloat16 or float16")
    _check_sizes(*sizes, head_dim)
    if form in ("auto", "pointer"):
        return
    forward_hopper.tiling(
        form, dtype, support.capability(device), *sizes, padded_width(head_dim), masked=False
    )


def tiling_for(q: Tensor, plan: BlockPlan, form: str = "pointer") -> Tiling:
    """Tiling of a form of the forward for these queries and blocks."""
    capability = support.capability(q.device)
    sizes = plan.q_blocks.size, plan.k_blocks.size
    padded = padded_width(q.shape[3])
    if form == "pointer":
        return forward.tiling(q.dtype, capability, *sizes, padded)
    heights = [plan.k_blocks.size >> level for level in _stored(plan)]
    masked = min(heights) < min(64, sizes[1])
    return forward_hopper.tiling(form, q.dtype, capability, *sizes, padded, masked)


def layout_for(plan: BlockPlan, block_n: int, device: torch.device) -> KeyLayout:
    """Layout of the key buffer for tiles of block_n rows."""
    return key_layout(plan.k_blocks, _stored(plan), block_n, device)


def fill(k: Tensor, v: Tensor, layout: KeyLayout, order: Tensor | None = None) -> Keys:
    """Keys and values [B, H, Sk, D] with their means in the layout of the buffer."""
    firsts = [layout.first.get(level, ABSENT) for level in range(max(layout.first) + 1)]
    place = layout.start, layout.count, layout.blocks.size, firsts, layout.rows
    padded = padded_width(k.shape[3])
    keys, values = (fill_keys(x, *place, padded, order) for x in (k, v))
    return Keys(keys, values, layout.bias)


def lists_for(plan: BlockPlan, layout: KeyLayout, block_n: int) -> TileLists:
    """The lists of a plan, finest level first."""
    levels = [(level, level) for level in plan.listed]
    if plan.rest != SKIP:
        levels.append((SKIP, plan.rest))
    size = plan.k_blocks.size
    parts = [Segment(code, layout.first[level] // block_n, size >> level) for code, level in levels]
    return pack_lists(plan.levels.flatten(0, 2).contiguous(), parts, block_n)


def first_order(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    rest: Tensor,
    out: Tensor,
    order: Tensor | None = None,
) -> None:
    """Add the global first-order term of the `rest` blocks, of share rest [B, H, Sq], to out."""
    blocks = plan.k_blocks
    cut = blocks.on(q.device)
    place = cut.start, cut.count.int(), blocks.size, _video(blocks, q.device)
    add_first_order(q, taylor_state(k, v, *place, order).to(q.dtype), rest, out)


@lru_cache(maxsize=16)
def query_rows(blocks: Blocks, device: torch.device) -> QueryRows:
    """The query blocks on the device; the last few results are kept."""
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        return QueryRows(blocks.start.to(device), blocks.count.to(device, torch.int32), blocks.size)


@lru_cache(maxsize=16)
def key_layout(
    blocks: Blocks, levels: tuple[int, ...], block_n: int, device: torch.device
) -> KeyLayout:
    """Layout of the key buffer, each level from a multiple of block_n on; a pure function, kept."""
    with torch.inference_mode(False):
        first: dict[int, int] = {}
        parts: list[Tensor] = []
        rows = 0
        for level in levels:
            starts = torch.arange(blocks.size >> level) << level
            count = (blocks.count[:, None] - starts).clamp(0, 1 << level).flatten()
            first[level] = rows
            rows += -(-len(count) // block_n) * block_n
            parts.append(torch.nn.functional.pad(count, (0, rows - first[level] - len(count))))
        bias = torch.cat(parts).double().log2().float().to(device)
        count = blocks.count.to(device, torch.int32)
        return KeyLayout(blocks, first, rows, blocks.start.to(device), count, bias)


@lru_cache(maxsize=16)
def _video(blocks: Blocks, device: torch.device) -> Tensor:
    """int64, ids of the blocks without text."""
    with torch.inference_mode(False):
        return (~blocks.text).nonzero().flatten().to(device)


def _stored(plan: BlockPlan) -> tuple[int, ...]:
    """Levels that the key buffer of a plan holds."""
    return tuple(sorted({0, *plan.listed, plan.rest} - {SKIP}))


def _empty_like(q: Tensor) -> Tensor:
    """Uninitialised, in the memory layout of q: [B, H, S, D] or a view of [B, S, H, D]."""
    if not q.transpose(1, 2).is_contiguous():
        return q.new_empty(q.shape)
    batch, heads, tokens, depth = q.shape
    return q.new_empty(batch, tokens, heads, depth).transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, order: Tensor | None) -> None:
    if refusal := support.refusal(q.device):
        raise ValueError(
            f"tensors on {q.device}: the Triton engine does not run there: {refusal}; "
            "on a CPU use impl='cpu', else dense attention"
        )
    check_call(q, k, v, plan, "Triton", DTYPES, support.EXECUTES)
    _check_sizes(plan.q_blocks.size, plan.k_blocks.size, q.shape[3])
    if order is not None:
        _check_order(q, k, order)


def _check_sizes(block_q: int, block_k: int, head_dim: int) -> None:
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size not in BLOCK_SIZES:
            raise ValueError(
                f"kernel.{name}={size}: the Triton engine executes blocks of "
                f"{', '.join(map(str, BLOCK_SIZES))} tokens; use impl='reference'"
            )
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"head dim {head_dim}: the Triton engine executes 1 .. {MAX_HEAD_DIM}; "
            "use impl='reference'"
        )


def _check_order(q: Tensor, k: Tensor, order: Tensor) -> None:
    given = order.dtype, tuple(order.shape), order.device
    expected = torch.int64, (q.shape[2],), q.device
    if given != expected or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"order is {given[0]} {given[1]} on {given[2]}, for {q.shape[2]} queries and "
            f"{k.shape[2]} keys: expected {expected[0]} {expected[1]} on {expected[2]} and as many "
            "keys as queries"
        )
