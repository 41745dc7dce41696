"""Planning: from q, k and v of a call to its plan, by the stages in order.

layout -> forced blocks, pattern -> estimator -> selector -> compensation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vidsparse import budgets, registry
from vidsparse.config import SparseConfig
from vidsparse.decision import Decision
from vidsparse.draft import Draft, Orders
from vidsparse.geometry import Geometry, patterned
from vidsparse.grid import TokenGrid
from vidsparse.kernels.executor import Executor
from vidsparse.memory import Recall
from vidsparse.plan import BlockPlan, StepContext
from vidsparse.result import timed


@dataclass(frozen=True)
class Ask:
    """What `attend` is asked, beside q, k and v."""

    grid: TokenGrid
    config: SparseConfig
    context: StepContext | None
    impl: str
    hoisted: bool
    watch: bool
    dense_path: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    return_lse: bool
    recall: Recall | None

    def form(self, q: Tensor) -> tuple[object, ...]:
        """What must be alike for something that was kept to be of use."""
        return tuple(q.shape), q.dtype, q.device, self.grid


def planned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ask: Ask,
    decision: Decision,
    geometry: Geometry,
    order: Tensor | None,
    seconds: dict[str, float],
) -> tuple[dict[str, Any], Tensor | None, Tensor | None]:
    """The plan of a call, and the summary of its executor if there is one; the order of all heads,
    and who has one of its own. q, k, v: [B, H, S, D]."""
    config = ask.config
    executor: Executor = registry.executor(decision.choice.executor)
    second = config.estimator.spread or config.compensation.spread
    blocks = geometry.q_blocks, geometry.k_blocks
    forced = _forced(geometry, ask, decision, q.shape[1])
    extras: Any = {"second": second, "forced": forced, "context": ask.context}
    draft = Draft(q, k, v, *blocks, order, order, **extras)
    ordered = None
    if config.layout.per_head:
        with timed(seconds, "order"):
            draft, ordered = _in_head_orders(draft, ask.grid, config, ask.recall)
            order = None
    with timed(seconds, "estimate"):
        summary = executor.summarise(k, v, geometry.k_blocks, config, draft.order_k)
        draft = draft if summary is None else replace(draft, key_means=summary.means)
    plan = _plan(draft, ask, decision, seconds)
    if config.layout.per_head:
        plan = plan.with_orders(draft.order_q, draft.order_k)
    how: dict[str, Any] = {"plan": plan} if summary is None else {"plan": plan, "summary": summary}
    return how, order, ordered


def _forced(geometry: Geometry, ask: Ask, decision: Decision, heads: int) -> Tensor:
    """bool [nq, nk] or [H, nq, nk]: blocks that are exact for every q and k."""
    config, pattern = ask.config, ask.config.pattern
    if pattern.name == "none":
        return geometry.forced
    sizes = decision.block_q, config.kernel.block_k
    return patterned(
        ask.grid,
        config.layout,
        config.force,
        *sizes,
        pattern,
        density=decision.density,
        phase=registry.method("pattern", pattern.name).phase(ask.context, pattern),
        static=config.selector.name == "static",
        heads=heads,
        device=geometry.forced.device,
    )


def _in_head_orders(
    draft: Draft, grid: TokenGrid, config: SparseConfig, recall: Recall | None
) -> tuple[Draft, Tensor]:
    """The draft in what the layout's `head_orders` gives, perhaps some steps ago, and the heads
    that have an order. Kept in 32 bits: 8 bytes a token and head."""
    layout = registry.method("layout", config.layout.name)
    form = draft.q.shape, draft.q.device, grid

    def make() -> Orders:
        known: Orders | None = None if recall is None else recall.find("orders", form)
        before = draft if known is None else replace(draft, clusters=known.clusters)
        found = Orders(*layout.head_orders(before, grid, config.layout))
        return found._replace(order_q=found.order_q.int(), order_k=found.order_k.int())

    kept = make() if recall is None else recall.get("orders", config.layout.refresh, make, form)
    ordered = draft.ordered(kept.order_q.long(), kept.order_k.long())
    return replace(ordered, clusters=kept.clusters), kept.who


def _plan(draft: Draft, ask: Ask, decision: Decision, seconds: dict[str, float]) -> BlockPlan:
    """Estimate and select, or take the blocks of some steps ago; complete."""
    config, recall = ask.config, ask.recall
    compensation = registry.method("compensation", config.compensation.name)
    if recall is None or config.keep.plans == 1:
        levels = _levels(draft, config, decision, seconds)
    else:
        form = *ask.form(draft.q), draft.q_blocks.size, recall.made("orders")
        levels = recall.get(
            "plan", config.keep.plans, lambda: _levels(draft, config, decision, seconds), form
        )
    with timed(seconds, "select"):
        listed = tuple(sorted({0, *config.selector.levels}))
        plan = BlockPlan.from_levels(levels, draft.q_blocks, draft.k_blocks, listed)
        complete: BlockPlan = compensation.complete(plan, draft, config.compensation)
        return complete


def _levels(
    draft: Draft, config: SparseConfig, decision: Decision, seconds: dict[str, float]
) -> Tensor:
    """int8 [B, H, nq, nk]."""
    estimator = registry.method("estimator", config.estimator.name)
    selector = registry.method("selector", config.selector.name)
    with timed(seconds, "estimate"):
        scores = estimator.estimate(draft, config.estimator)
    with timed(seconds, "select"):
        forced = draft.forced
        assert forced is not None, "of every call"
        if scores.exact is not None:
            forced = forced | scores.exact
        budgeted = forced if config.force.in_budget else torch.zeros_like(forced)
        budget = decision.density, decision.by_head
        levels: Tensor = budgets.select(
            selector, scores, budgeted, *budget, draft.k_blocks, config.selector
        )
        return levels if config.force.in_budget else levels.masked_fill(forced, 0)
