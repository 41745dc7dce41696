"""Sparse attention: whether a call is sparse, its plan by the stages in order, and who executes it.

schedule -> plan (`vidsparse.planning`) -> kernel, and what the run keeps (`vidsparse.carried`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidsparse import carried, operands, registry
from vidsparse.config import SparseConfig, resolve
from vidsparse.decision import Choice, Decision, decide, requested, too_dense, tried
from vidsparse.geometry import plan_geometry
from vidsparse.grid import TokenGrid
from vidsparse.kernels import dense
from vidsparse.kernels.executor import Executor, Trial
from vidsparse.memory import Memory, Recall
from vidsparse.plan import StepContext
from vidsparse.planning import Ask, planned
from vidsparse.result import (
    AttentionResult,
    finite_numbers,
    full_density,
    head_density_of,
    timed,
)


@torch.compiler.disable
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: TokenGrid | tuple[int, int, int],
    config: SparseConfig | str | Path | Mapping[str, Any],
    context: StepContext | None = None,
    impl: str = "auto",
    return_lse: bool = False,
    return_plan: bool = False,
) -> Any:
    """Self-attention of one video sequence by the method that `config` describes.

    q, k, v: [B, S, H, D], float32, bfloat16, float16 or float64, one device; tokens in raster order
        with the text before or after as `grid` says; after norm and RoPE. Any sizes. Under
        torch.autocast they are cast as scaled_dot_product_attention casts them.
    grid: of S tokens; (frames, height, width) for a video without text.
    config: a `SparseConfig`, or what `vidsparse.accelerate_pipeline` takes as a preset.
    context: step and layer for the schedule; None: the steady state.
    impl: auto, or the name of an executor. "auto" takes `config.kernel.impl`, and if that is auto
        too, the fastest for the device, which may be dense. Anything else is executed or refused.

    Returns out [B, S, H, D], in the order of the input; with return_lse also LSE [B, H, S] (natural
    log, float32, float64 for float64 input); with return_plan also the BlockPlan, None for a dense
    call. Inference only. In code under torch.compile it is a graph break; in an accelerated
    pipeline attention is one operator of the graph.

    Raises ValueError for shapes and dtypes that do not match, for gradients, of dense calls too,
    and for settings that the requested impl cannot execute; TypeError for arguments of another
    kind; RuntimeError on a CPU if the output of finite
    q, k and v is not finite; on a GPU to look would be to wait, so ask `out.isfinite().all()`. A
    pipeline notices it on every device.
    """
    if context is not None and not isinstance(context, StepContext):
        raise TypeError(
            f"context is a {type(context).__name__}: expected a StepContext, such as "
            "StepContext(step=3, steps=20, layer=0, layers=30)"
        )
    result = attend(
        q,
        k,
        v,
        grid=TokenGrid.of(grid),
        config=resolve(config),
        context=context,
        impl=impl,
        watch=isinstance(q, Tensor) and q.device.type == "cpu",
        return_lse=return_lse,
    )
    if result.finite is not None and result.finite[:3].all():
        raise RuntimeError(
            f"sparse attention of finite q, k and v is not finite in {q.dtype}: use torch.bfloat16 "
            "or torch.float32, or scaled_dot_product_attention"
        )
    if not (return_lse or return_plan):
        return result.out
    extras = [result.lse] * return_lse + [result.plan] * return_plan
    return (result.out, *extras)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: TokenGrid,
    config: SparseConfig,
    context: StepContext | None = None,
    impl: str = "auto",
    hoisted: bool = False,
    watch: bool = False,
    dense_path: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    return_lse: bool = False,
    recall: Recall | None = None,
) -> AttentionResult:
    """As `sparse_attention`, with everything that a report needs.

    hoisted: the tokens already stand in layout order, and so will the result.
    watch: look whether a sparse call gives finite numbers; on a GPU the answer stays there.
    dense_path: (q, k, v) -> out [B, S, H, D], used for dense calls instead of
    scaled_dot_product_attention.
    recall: what earlier calls of the run have kept for this one, and later ones will find; None:
    nothing is kept.
    """
    q, k, v = operands.checked(q, k, v, grid)
    ask = Ask(grid, config, context, impl, hoisted, watch, dense_path, return_lse, recall)
    with operands.no_autocast(q.device.type):
        return _attend(q, k, v, ask)


def _decided(q: Tensor, ask: Ask, context: StepContext | None) -> Decision:
    """About a call of this form at `context`."""
    how: Any = {"grid": ask.grid, "config": ask.config, "context": context}
    return decision_for(q, **how, impl=ask.impl, hoisted=ask.hoisted)


def _attend(q: Tensor, k: Tensor, v: Tensor, ask: Ask) -> AttentionResult:
    """`attend` on checked operands of one dtype, outside autocast."""
    decision = _decided(q, ask, ask.context)
    if q.numel() == 0 or decision.reason is not None:
        reason = "empty" if q.numel() == 0 else decision.reason
        assert reason is not None
        result = _dense(q, k, v, ask, reason, {}, decision.choice)
        if ask.config.keep.residual and q.numel():
            _keep_residual(q, k, v, ask, result)
        return result
    return _sparse(q, k, v, ask, decision)


def _sparse(q: Tensor, k: Tensor, v: Tensor, ask: Ask, decision: Decision) -> AttentionResult:
    """A call that the schedule wants to be sparse."""
    config, choice, seconds = ask.config, decision.choice, dict[str, float]()
    executor: Executor = registry.executor(choice.executor)
    sizes = decision.block_q, config.kernel.block_k
    geometry = plan_geometry(ask.grid, config.layout, config.force, *sizes, q.device)
    inputs = q, k, v
    order = None if ask.hoisted else geometry.order
    permuted = order is not None and not executor.takes_order and not config.layout.per_head
    if permuted:
        with timed(seconds, "permute"):
            q, k, v = (x.index_select(1, geometry.order) for x in (q, k, v))
            order = None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    tail = carried.tail_of(ask.recall, config.keep, ask.form(q))
    if tail is None:
        how, order, ordered = planned(q, k, v, ask, decision, geometry, order, seconds)
        plan = how["plan"]
        if requested(config, ask.impl) == "auto" and too_dense(plan, config, choice.crossover):
            return _dense(*inputs, ask, "not-faster", seconds, choice)
    else:
        how, plan, ordered = {"plan": tail.plan}, tail.plan, tail.ordered
        order = None if plan.order_q is not None else order
    how |= {"kernel": config.kernel, "order": order}
    wants_tail = carried.wants_tail(ask.recall, config.keep)
    with timed(seconds, "kernel"):
        listed = {**how, "plan": plan if plan.blend is None else replace(plan, blend=None)}
        out, lse = executor.execute(q, k, v, **listed, return_lse=ask.return_lse or wants_tail)
        out, lse = plan.blended(out, lse, None if order is None else geometry.inverse)
    density = head_density_of(plan)
    if wants_tail:
        assert lse is not None and ask.recall is not None
        with timed(seconds, "tail"):
            if tail is None:
                how["plan"], density = carried.complement(plan), full_density(q.shape[1])
                rest = executor.execute(q, k, v, **how, return_lse=True)
                tail = carried.Tail(plan, ordered, *rest)
                carried.reserve(ask.recall, config.keep, "tail", ask.context, *rest)
                ask.recall.put("tail", tail, ask.form(q))
            out, lse = carried.merged(out, lse, tail)
    out = out.transpose(1, 2)
    if permuted:
        with timed(seconds, "permute"):
            out = out.index_select(1, geometry.inverse)
            lse = lse.index_select(2, geometry.inverse) if lse is not None else None
    if config.keep.residual and ask.recall is not None:
        residual = ask.recall.find("residual", ask.form(inputs[0]))
        if residual is not None:
            with timed(seconds, "residual"):
                out = out + residual
    finite = finite_numbers(*inputs, out) if ask.watch else None
    lse = lse if ask.return_lse else None
    return AttentionResult(out, lse, plan, density, None, choice, seconds, finite, ordered)


def _keep_residual(q: Tensor, k: Tensor, v: Tensor, ask: Ask, full: AttentionResult) -> None:
    """In the last dense step before a sparse one: keep what a sparse call would have lacked."""
    later = carried.next_sparse(ask.config, ask.grid, ask.context)
    if later is None or ask.recall is None or ask.context is None:
        return
    carried.reserve(ask.recall, ask.config.keep, "residual", ask.context, full.out)
    if later.step > ask.context.step + 1:
        return
    config = replace(ask.config, keep=replace(ask.config.keep, residual=False))
    ask = replace(ask, config=config, context=later, watch=False, return_lse=False)
    decision = _decided(q, ask, later)
    if decision.reason is not None:
        return
    with timed(full.seconds, "residual"):
        sparse = _sparse(q, k, v, ask, decision)
        if sparse.reason is None and ask.recall is not None:
            ask.recall.put("residual", full.out - sparse.out, ask.form(q))


def decision_for(
    q: Tensor,
    *,
    grid: TokenGrid,
    config: SparseConfig,
    context: StepContext | None = None,
    impl: str = "auto",
    hoisted: bool = False,
) -> Decision:
    """What `attend` decides about a call with this q [B, S, H, D]; only its form matters."""
    return decide(
        config,
        grid,
        context,
        device=q.device,
        impl=impl,
        dtype=q.dtype,
        head_dim=q.shape[3],
        heads=q.shape[0] * q.shape[2],
        trial=trial_of(config, hoisted),
        hoisted=hoisted,
    )


def trial_of(config: SparseConfig, hoisted: bool) -> Trial:
    """Makes whole sparse calls of a config, hoisted or not, for timing them; those that are not
    fresh take the orders of heads from the last fresh one."""
    memory = Memory()

    def trial(
        name: str, block_q: int, *qkv: Tensor, grid: TokenGrid, density: float, fresh: bool
    ) -> None:
        if fresh:
            memory.clear()
        how = tried(config, name, block_q, density)
        attend(*qkv, grid=grid, config=how, hoisted=hoisted, recall=memory.of(0))

    return trial


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ask: Ask,
    reason: str,
    seconds: dict[str, float],
    choice: Choice,
) -> AttentionResult:
    with timed(seconds, "dense"):
        if ask.dense_path is not None and not ask.return_lse:
            out, lse = ask.dense_path(q, k, v), None
        else:
            out, lse = dense.execute(q, k, v, return_lse=ask.return_lse)
    return AttentionResult(out, lse, None, full_density(q.shape[2]), reason, choice, seconds)
