"""The Triton executor: from a plan to the launches of the kernels, with no wait for the device.

    plans of level 0     lists of full tiles -> an exact engine -> (O, LSE) -> rest merge
    levels, 8-bit        key buffer, lists with bits -> `levels_forward` -> (O, LSE) -> rest merge

The rest merge adds what is not in the lists: short blocks, centroids, the first-order term. It is
left out where a plan drops its rest and no block is short.

Needs a CUDA device of compute capability 8.0 or newer, AMD's gfx942, or TRITON_INTERPRET=1 set
before the import.
Scores, softmax and sums are fp32; means of keys and values are rounded to the input's dtype.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.kernels.call_check import check_call
from vidsparse.kernels.gpu import exact_engine, levels_engine, rest, support
from vidsparse.kernels.gpu.exact import ExactEngine, Question, chosen
from vidsparse.kernels.gpu.operands import QueryRows
from vidsparse.kernels.gpu.support import BLOCK_SIZES, DTYPES, MAX_HEAD_DIM
from vidsparse.plan import BlockPlan


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
    engine: str = "auto",
    summary: rest.Summary | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention by a plan; formulas in `vidsparse.kernels`. Inference only.

    q [B, H, Sq, D], k, v [B, H, Sk, D]: one device, one dtype (float32, bfloat16, float16), D up to
        128; transposed views of [B, S, H, D] tensors are read in place. Values must be finite.
    plan: any levels, blocks of 16, 32, 64 or 128 tokens, short ones anywhere; `rest` SKIP or the
        centroid, with a bias or without; `first_order` "none", "global" or "row"; orders of heads;
        its tensors on the device of q.
    order: int64 [S] on the device of q: position t of the plan's blocks is token order[t] of q, k,
        v and the results, gathered and scattered where the kernels read and write; None: token t,
        or what the plan's own orders say.
    form: of the Triton engine, "pointer" or "tma"; "auto": what `vidsparse.forms` says.
    qk: "native", or "int8" for products of 8-bit queries and keys, relative error about 1e-2.
    engine: which exact engine runs plans of level 0, or "auto".
    summary: what `rest.summary_of` gave for k, v, this cut, order and first-order term; None: it is
        made where it is needed.

    Returns out, shape, dtype and memory layout like q, and the LSE float32 [B, H, Sq] (natural log)
    or None.

    Raises ValueError for anything else, for inputs that require grad and for devices without
    support.
    """
    _check(q, k, v, plan, order)
    support.say_remark(q.device)
    sizes = plan.q_blocks.size, plan.k_blocks.size
    asked = Question(q.device, q.dtype, q.shape[3], *sizes, form)
    levels = plan.listed != (0,)
    one = choose(asked, levels, qk, engine)
    order_q, order_k = (
        order if own is None else own.contiguous() for own in (plan.order_q, plan.order_k)
    )
    if order is not None:
        order_q = order_k = order.contiguous()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = _empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse if return_lse else None
    rows = query_rows(plan.q_blocks, q.device, order_q)
    if one is None:
        levels_engine.run(q, k, v, plan, rows, order_k, out, lse, qk)
        start = plan.k_blocks.on(q.device).start
        rest.merge(q, k, v, plan, rows, out, lse, start, order_k, None, summary)
    else:
        keys = exact_engine.run(one, asked, q, k, v, plan, rows, order_k, out, lse)
        place = keys.place
        operands = q, keys.k, keys.v, plan, rows, out, lse, place.start
        rest.merge(*operands, None, place.short, summary)
    return out, lse if return_lse else None


def choose(asked: Question, levels: bool, qk: str, engine: str) -> ExactEngine | None:
    """The exact engine of a call, None for plans of several levels and for 8-bit products.

    Raises ValueError for settings that nothing executes.
    """
    if qk not in ("native", "int8"):
        raise ValueError(f"qk={qk!r}: allowed are native and int8")
    if not levels and qk == "native":
        return chosen(engine, asked)
    what = "plans of several levels" if levels else "products in 8 bits"
    if asked.form not in ("auto", "pointer"):
        raise ValueError(
            f"kernel.form={asked.form!r}: {what} are computed by pointer alone; use form 'auto'"
        )
    if engine not in ("auto", "triton"):
        raise ValueError(
            f"kernel.engine={engine!r}: {what} are of engine 'triton' alone; use 'auto'"
        )
    return None


def check_settings(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    sizes: tuple[int, int],
    levels: bool,
    qk: str,
    form: str,
    engine: str,
) -> None:
    """Raise the ValueError that a call with such queries and settings would raise.

    sizes: of query and key blocks; levels: whether plans have others than 0; the rest as for
    `execute`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"{dtype}: the Triton engine computes in float32, bfloat16 or float16")
    _check_sizes(*sizes, head_dim)
    choose(Question(device, dtype, head_dim, *sizes, form), levels, qk, engine)


def query_rows(blocks: Blocks, device: torch.device, order: Tensor | None = None) -> QueryRows:
    """The query blocks on the device."""
    return QueryRows(*_rows(blocks, device), blocks.size, order)


@lru_cache(maxsize=16)
def _rows(blocks: Blocks, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # the cached tensors must serve every grad mode
        return blocks.start.to(device), blocks.count.to(device, torch.int32)


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
        _check_order(q, k, plan, order)


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


def _check_order(q: Tensor, k: Tensor, plan: BlockPlan, order: Tensor) -> None:
    given = order.dtype, tuple(order.shape), order.device
    expected = torch.int64, (q.shape[2],), q.device
    if given != expected or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"order is {given[0]} {given[1]} on {given[2]}, for {q.shape[2]} queries and "
            f"{k.shape[2]} keys: expected {expected[0]} {expected[1]} on {expected[2]} and as many "
            "keys as queries"
        )
    if plan.order_q is not None or plan.order_k is not None:
        raise ValueError(
            "order beside plan.order_q or order_k: there can be one order; put the order of all "
            "heads into the plan's"
        )
