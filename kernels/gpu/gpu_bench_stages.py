"""Speed of the stages around the sparse forward, each alone, as a call strings them together.

"compensate" is what the centroids in the same forward and the first-order term add to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_bench import Bench, blank, geometry_of, plan_at, unit
from gpu_cases import Shape, method, prepare
from gpu_results import Machine, interleaved
from gpu_rows import Result, load
from gpu_units import Unit
from torch import Tensor

from vidsparse.kernels.gpu import engine
from vidsparse.plan import SKIP, BlockPlan

Acts = dict[str, Callable[[], Any]]


def stage_unit(machine: Machine, shape: Shape, density: float, name: str, rank: int) -> Unit:
    """The unit of a stage in STAGES."""

    def act(this: Bench) -> Iterator[Result]:
        acts = STAGES[name](this, density, plan_at(this, density))
        times = interleaved(acts, machine, 0.4)
        taken = times[name] if name in times else added(times)
        yield this.row(density, "triton", name, taken)

    row = blank(shape, density, "triton", name)
    return unit(machine, shape, row, act, f"stage {name}", rank)


def added(times: dict[str, list[float]]) -> list[float]:
    """What the rest of the keys costs, round by round."""
    rounds = zip(times["with rest"], times["without rest"], times["first order"], strict=True)
    return [more - less + after for more, less, after in rounds]


def form_of(this: Bench, density: float) -> str:
    """The form that was fastest at this density, as far as it was measured."""
    rows = load(this.machine.folder / "gpu_bench.csv", Result)
    impls = {f"triton-{form}": form for form in this.machine.forms}
    found = {impls[r.impl]: r.ms_p50 for r in rows
             if (r.shape, r.density, r.stage) == (this.shape.name, density, "sparse")
             and r.impl in impls and r.ms_p50 is not None}  # fmt: skip
    sound = [form for form in this.machine.forms if form not in this.machine.broken]
    return min(found, key=lambda form: found[form]) if found else (sound or ["pointer"])[0]


def lists(this: Bench, density: float, plan: BlockPlan) -> Acts:
    block_n = engine.tiling_for(this.qkv[0], plan, form_of(this, density)).block_n
    layout = engine.layout_for(plan, block_n, this.machine.device)
    return {"lists": partial(engine.lists_for, plan, layout, block_n)}


def fill(this: Bench, density: float, plan: BlockPlan) -> Acts:
    q, k, v = this.qkv
    block_n = engine.tiling_for(q, plan, form_of(this, density)).block_n
    layout = engine.layout_for(plan, block_n, this.machine.device)
    return {"fill": partial(engine.fill, k, v, layout)}


def quantise(this: Bench, density: float, plan: BlockPlan) -> Acts:
    from vidsparse.kernels.gpu import quant

    full = prepare(*this.qkv, plan, form_of(this, density))
    operands = this.qkv[0], full.keys, full.rows, full.shape
    return {"quantise": partial(quant.int8_operands, *operands)}


def pool(this: Bench, density: float, plan: BlockPlan) -> Acts:
    return {"pool": partial(pooled, this, plan)}


def pooled(this: Bench, plan: BlockPlan) -> list[Tensor]:
    """Means of query and key blocks."""
    from vidsparse.kernels.gpu import pool as triton_pool

    cuts = cuts_of(this, plan)
    means = triton_pool.block_means
    return [means(x, c.start, c.count, c.size) for x, c in zip(this.qkv[:2], cuts, strict=True)]


def cuts_of(this: Bench, plan: BlockPlan) -> list[Any]:
    device = this.machine.device
    return [engine.query_rows(blocks, device) for blocks in (plan.q_blocks, plan.k_blocks)]


def draft(this: Bench, density: float, plan: BlockPlan) -> Acts:
    from vidsparse.kernels.gpu import draft as triton_draft

    counts = [cut.count for cut in cuts_of(this, plan)]
    scale = this.shape.head_dim**-0.5
    scores = triton_draft.draft_scores
    return {"draft": partial(scores, *pooled(this, plan), *counts, 1, scale)}


def select(this: Bench, density: float, plan: BlockPlan) -> Acts:
    from vidsparse.kernels.gpu import select as triton_select

    scores = draft(this, density, plan)["draft"]()
    forced = geometry_of(this, method(density)).forced
    kept = max(1, int(density * len(plan.k_blocks) + 1e-9))
    return {"select": partial(triton_select.select_topk, scores, forced, kept)}


def compensate(this: Bench, density: float, plan: BlockPlan) -> Acts:
    q, k, v = this.qkv
    form = form_of(this, density)
    full, bare = prepare(q, k, v, plan, form), prepare(q, k, v, plan.with_rest(SKIP), form)
    if full.rest is None:
        raise ValueError("the default method has no first-order term any more")
    full.forward()
    scratch = full.out.clone(memory_format=torch.preserve_format)
    after = partial(engine.first_order, q, k, v, plan, full.rest, scratch)
    return {"with rest": full.forward, "without rest": bare.forward, "first order": after}


STAGES: dict[str, Callable[[Bench, float, BlockPlan], Acts]] = {
    "pool": pool,
    "draft": draft,
    "select": select,
    "lists": lists,
    "fill": fill,
    "compensate": compensate,
    "quantise": quantise,
}
