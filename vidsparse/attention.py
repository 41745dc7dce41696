"""Sparse attention: the one place that names the stages in order.

schedule -> layout -> forced blocks, pattern -> estimator -> selector -> compensation -> kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidsparse import budgets, operands, registry
from vidsparse.config import SparseConfig, resolve
from vidsparse.decision import Choice, Decision, decide, requested, too_dense, tried
from vidsparse.draft import Draft
from vidsparse.geometry import Geometry, patterned, plan_geometry
from vidsparse.grid import TokenGrid
from vidsparse.kernels import dense
from vidsparse.kernels.executor import Executor, Trial
from vidsparse.memory import Memory, Recall
from vidsparse.plan import BlockPlan, StepContext
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
    with operands.no_autocast(q.device.type):
        return _attend(
            q, k, v, grid, config, context, impl, hoisted, watch, dense_path, return_lse, recall
        )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: TokenGrid,
    config: SparseConfig,
    context: StepContext | None,
    impl: str,
    hoisted: bool,
    watch: bool,
    dense_path: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
    return_lse: bool,
    recall: Recall | None,
) -> AttentionResult:
    """`attend` on checked operands of one dtype, outside autocast."""
    decision = decision_for(
        q, grid=grid, config=config, context=context, impl=impl, hoisted=hoisted
    )
    reason, choice = "empty" if q.numel() == 0 else decision.reason, decision.choice
    seconds: dict[str, float] = {}
    if reason is not None:
        return _dense(q, k, v, reason, dense_path, return_lse, seconds, choice)
    executor: Executor = registry.executor(choice.executor)
    sizes = decision.block_q, config.kernel.block_k
    geometry = plan_geometry(grid, config.layout, config.force, *sizes, q.device)
    q_in, k_in, v_in = q, k, v
    order = None if hoisted else geometry.order
    per_head = config.layout.per_head
    permuted = order is not None and not executor.takes_order and not per_head
    if permuted:
        with timed(seconds, "permute"):
            q, k, v = (x.index_select(1, geometry.order) for x in (q, k, v))
            order = None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    second = config.estimator.spread or config.compensation.spread
    blocks = geometry.q_blocks, geometry.k_blocks
    forced = _forced(geometry, grid, config, context, decision, q.shape[1])
    draft = Draft(q, k, v, *blocks, order, order, second=second, forced=forced, context=context)
    ordered = None
    if per_head:
        with timed(seconds, "order"):
            *orders, ordered = _head_orders(draft, grid, config, recall)
            draft, order = draft.ordered(*orders), None
    with timed(seconds, "estimate"):
        summary = executor.summarise(k, v, geometry.k_blocks, config, draft.order_k)
        draft = draft if summary is None else replace(draft, key_means=summary.means)
    plan = _plan(draft, config, decision, seconds)
    if per_head:
        plan = plan.with_orders(draft.order_q, draft.order_k)
    if requested(config, impl) == "auto" and too_dense(plan, config, choice.crossover):
        return _dense(q_in, k_in, v_in, "not-faster", dense_path, return_lse, seconds, choice)
    with timed(seconds, "kernel"):
        how: Any = {"kernel": config.kernel, "order": order, "return_lse": return_lse}
        if summary is not None:
            how["summary"] = summary
        listed = plan if plan.blend is None else replace(plan, blend=None)
        out, lse = executor.execute(q, k, v, listed, **how)
        inverse = None if order is None else geometry.inverse
        out, lse = plan.blended(out, lse, inverse)
    out = out.transpose(1, 2)
    if permuted:
        with timed(seconds, "permute"):
            out = out.index_select(1, geometry.inverse)
            lse = lse.index_select(2, geometry.inverse) if lse is not None else None
    finite = finite_numbers(q_in, k_in, v_in, out) if watch else None
    return AttentionResult(
        out, lse, plan, head_density_of(plan), None, choice, seconds, finite, ordered
    )


def _forced(
    geometry: Geometry,
    grid: TokenGrid,
    config: SparseConfig,
    context: StepContext | None,
    decision: Decision,
    heads: int,
) -> Tensor:
    """bool [nq, nk] or [H, nq, nk]: blocks that are exact for every q and k."""
    pattern = config.pattern
    if pattern.name == "none":
        return geometry.forced
    return patterned(
        grid,
        config.layout,
        config.force,
        decision.block_q,
        config.kernel.block_k,
        pattern,
        density=decision.density,
        phase=registry.method("pattern", pattern.name).phase(context, pattern),
        static=config.selector.name == "static",
        heads=heads,
        device=geometry.forced.device,
    )


def _head_orders(
    draft: Draft, grid: TokenGrid, config: SparseConfig, recall: Recall | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the layout's `head_orders` gives, perhaps some steps ago. Kept in 32 bits: 8 bytes a
    token and head."""
    layout = registry.method("layout", config.layout.name)

    def make() -> tuple[Tensor, Tensor, Tensor]:
        order_q, order_k, who = layout.head_orders(draft, grid, config.layout)
        return order_q.int(), order_k.int(), who

    form = draft.q.shape, draft.q.device, grid
    kept = make() if recall is None else recall.get("orders", config.layout.refresh, make, form)
    return kept[0].long(), kept[1].long(), kept[2]


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
    """Makes whole sparse calls of a config, hoisted or not, for timing them; each is the next step
    of a run, whose orders of heads are made anew as seldom as there."""
    memory, steps = Memory(), count()

    def trial(name: str, block_q: int, *qkv: Tensor, grid: TokenGrid, density: float) -> None:
        how = tried(config, name, block_q, density)
        attend(*qkv, grid=grid, config=how, hoisted=hoisted, recall=memory.of(next(steps)))

    return trial


def _plan(
    draft: Draft, config: SparseConfig, decision: Decision, seconds: dict[str, float]
) -> BlockPlan:
    """Estimate, select, complete."""
    q_blocks, k_blocks = draft.q_blocks, draft.k_blocks
    estimator = registry.method("estimator", config.estimator.name)
    selector = registry.method("selector", config.selector.name)
    compensation = registry.method("compensation", config.compensation.name)
    with timed(seconds, "estimate"):
        scores = estimator.estimate(draft, config.estimator)
    with timed(seconds, "select"):
        forced = draft.forced
        assert forced is not None, "of every call"
        if scores.exact is not None:
            forced = forced | scores.exact
        budgeted = forced if config.force.in_budget else torch.zeros_like(forced)
        budget = decision.density, decision.by_head
        levels = budgets.select(selector, scores, budgeted, *budget, k_blocks, config.selector)
        if not config.force.in_budget:
            levels = levels.masked_fill(forced, 0)
        listed = tuple(sorted({0, *config.selector.levels}))
        plan = BlockPlan.from_levels(levels, q_blocks, k_blocks, listed)
        complete: BlockPlan = compensation.complete(plan, draft, config.compensation)
        return complete


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reason: str,
    path: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
    return_lse: bool,
    seconds: dict[str, float],
    choice: Choice,
) -> AttentionResult:
    with timed(seconds, "dense"):
        if path is not None and not return_lse:
            out, lse = path(q, k, v), None
        else:
            out, lse = dense.execute(q, k, v, return_lse=return_lse)
    return AttentionResult(out, lse, None, full_density(q.shape[2]), reason, choice, seconds)
