"""The fast CPU executor, in plain torch: gather what a plan lists, then two matrix products.

Scores and softmax are fp32 (fp64 for fp64); for bf16 input the weights are rounded to bf16 for the
second product if the CPU is faster at that. fp16 is computed in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidsparse.kernels.call_check import check_call
from vidsparse.kernels.cpu import fused, routes
from vidsparse.kernels.cpu.call import Call
from vidsparse.kernels.cpu.routes import Route
from vidsparse.kernels.cpu.rows import Worker
from vidsparse.kernels.cpu.threads import for_each
from vidsparse.kernels.executor import Executes
from vidsparse.plan import BlockPlan

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EXECUTES = Executes(("none", "global", "row"), rest_bias=True, head_orders=True)


def execute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    return_lse: bool = False,
    workers: int | None = None,
    route: Route | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention by a plan; formulas in `vidsparse.kernels`. Inference only.

    q [B, H, Sq, D], k, v [B, H, Sk, D]: CPU tensors of one dtype (float32, bfloat16, float16,
        float64), in the order that the plan's blocks refer to; transposed views of [B, S, H, D]
        tensors are the usual case.
    plan: any levels; `rest` SKIP or the centroid, with any bias; `first_order` "none", "global" or
        "row"; any orders.
    workers: threads, >= 1; None: torch.get_num_threads().
    route: how rows are computed, as `routes` says; None: the fastest products of this machine.

    Returns out, shape, dtype and memory layout like q, and the LSE float32 [B, H, Sq] (float64 for
    float64, natural log) or None. The result does not depend on the number of workers, and a NaN
    in one query stays in that query's result.

    Raises ValueError for shapes that do not match, first_order "block", inputs that require grad.
    """
    _check(q, k, v, plan, workers)
    batch, heads, tokens, depth = q.shape
    transposed = q.transpose(1, 2).is_contiguous()
    shape = (batch, tokens, heads, depth) if transposed else tuple(q.shape)
    out = torch.empty(shape, dtype=q.dtype, device="cpu")
    out = out.transpose(1, 2) if transposed else out
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty(batch, heads, tokens, dtype=wide, device="cpu") if return_lse else None
    if out.numel() == 0:
        return out, lse
    workers = min(workers or torch.get_num_threads(), batch * heads * len(plan.q_blocks))
    route = route or routes.products(q.dtype, workers)
    if route.fused and q.dtype in fused.DTYPES:
        q = q if q.stride(3) == 1 else q.contiguous()  # else the kernel reads other numbers
        call = Call(q, out, lse, plan, q.dtype, q.dtype, whole=True)
        for_each(call.jobs(k, v, workers), lambda: fused.FusedWorker(call).run, workers)
        return out, lse
    call = Call(q, out, lse, plan, wide, torch.bfloat16 if route.low else wide)
    with routes.onednn(route.onednn and call.product >= routes.MIN_PRODUCT):
        for_each(call.jobs(k, v, workers), lambda: Worker(call).run, workers)
    return out, lse


def engine_info() -> dict[str, Any]:
    """For reports: how matrices are multiplied on this machine, and the figures of the probe.

    fp32: "onednn" | "native"; refusal: why not onednn, or None; bf16_values: dtype of weights times
    values for bf16 input; threads; figures of `routes.Probe`, those that it has.
    """
    threads = torch.get_num_threads()
    probe = routes.probe(threads)
    tried = probe.onednn_gain > 0
    return {
        "fp32": "onednn" if probe.onednn else "native",
        "refusal": probe.refusal,
        "bf16_values": "bfloat16" if probe.bf16 else "float32",
        "threads": threads,
        "onednn_gain": round(probe.onednn_gain, 2) if tried else None,
        "onednn_error": probe.onednn_error if tried else None,
        "bf16_gain": round(probe.bf16_gain, 2),
        "measured": probe.measured,
        "problem": probe.problem,
    }


def _check(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, workers: int | None) -> None:
    if q.device.type != "cpu":
        raise ValueError(f"q is on {q.device}: the CPU engine expects CPU tensors; use impl auto")
    check_call(q, k, v, plan, "CPU", DTYPES, EXECUTES)
    size = plan.k_blocks.size
    if size != 2**plan.k_blocks.levels:
        raise ValueError(f"plan.k_blocks.size={size}: the CPU engine needs a power of two")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers!r}: expected an integer >= 1")
