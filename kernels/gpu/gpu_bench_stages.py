"""Speed of the stages around the exact tiles, each alone, as a call strings them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from gpu_bench import Bench, blank, geometry_of, plan_at, unit
from gpu_cases import SIZES, Shape, method
from gpu_results import Machine, interleaved
from gpu_rows import Result
from gpu_units import Unit
from gpu_ways import levels, nan_outputs
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.kernels.gpu import draft as triton_draft
from vidsparse.kernels.gpu import engine, exact_engine, levels_engine, quant, rest, summary
from vidsparse.kernels.gpu import select as triton_select
from vidsparse.kernels.gpu.exact_lists import pack_exact
from vidsparse.kernels.gpu.means import block_means
from vidsparse.plan import BlockPlan

TILE = 64
"""Keys of a tile of the lists that are packed."""

Act = Callable[[], Any]


def stage_unit(machine: Machine, shape: Shape, density: float, name: str, part: str) -> Unit:
    """The unit of a stage in STAGES."""

    def act(this: Bench) -> Iterator[Result]:
        stage = STAGES[name](this, density, plan_at(this, density))
        times = interleaved({name: stage}, machine, 0.3)
        yield this.row(density, "triton", name, times[name], sizes=SIZES[0])

    row = blank(shape, density, "triton", name, sizes=SIZES[0])
    return unit(machine, shape, row, act, f"stage {name}", part)


def pool(this: Bench, density: float, plan: BlockPlan) -> Act:
    return partial(pooled, this, plan)


def pooled(this: Bench, plan: BlockPlan) -> list[Tensor]:
    """Means of query and key blocks."""
    pairs = zip(this.qkv[:2], (plan.q_blocks, plan.k_blocks), strict=True)
    return [block_means(x, *place(blocks, x)) for x, blocks in pairs]


def place(blocks: Blocks, x: Tensor) -> tuple[Any, ...]:
    """start, count, size of blocks on the device of x."""
    rows = engine.query_rows(blocks, x.device)
    return rows.start, rows.count, rows.size


def draft(this: Bench, density: float, plan: BlockPlan) -> Act:
    counts = [place(cut, this.qkv[0])[1] for cut in (plan.q_blocks, plan.k_blocks)]
    scale = this.shape.head_dim**-0.5
    return partial(triton_draft.draft_scores, *pooled(this, plan), *counts, 1, scale)


def select(this: Bench, density: float, plan: BlockPlan) -> Act:
    scores = draft(this, density, plan)()
    forced = geometry_of(this, method(density)).forced
    kept = max(1, int(density * len(plan.k_blocks) + 1e-9))
    return partial(triton_select.select_topk, scores, forced, kept)


def pack(this: Bench, density: float, plan: BlockPlan) -> Act:
    where = exact_engine.key_place(plan.k_blocks, TILE, "token", False, this.machine.device)
    return partial(pack_exact, plan.levels, where.entry, where.pieces, where.step, where.width)


def summarise(this: Bench, density: float, plan: BlockPlan) -> Act:
    _, k, v = this.qkv
    blocks = plan.k_blocks
    moved, video = (~blocks.on(k.device).text).int(), int(blocks.count[~blocks.text].sum())
    return partial(summary.summarise, k, v, *place(blocks, k), moved, None, video)


def merge(this: Bench, density: float, plan: BlockPlan, first_order: Any = "global") -> Act:
    """Means, moments and the rest merge, as a call adds them to what an engine wrote."""
    q, k, v = this.qkv
    out, lse = (x.fill_(0) for x in nan_outputs(q))
    rows = engine.query_rows(plan.q_blocks, q.device)
    plan = plan.with_rest(plan.k_blocks.levels, first_order)
    return partial(rest.merge, q, k, v, plan, rows, out, lse, plan.k_blocks.on(q.device).start)


def fill(this: Bench, density: float, plan: BlockPlan) -> Act:
    q, k, v = this.qkv
    layout = levels_engine.layout_for(plan, levels_engine.tiling_for(q, plan).block_n, q.device)
    return partial(levels_engine.fill, k, v, layout)


def quantise(this: Bench, density: float, plan: BlockPlan) -> Act:
    ready = levels(*this.qkv, plan)
    return partial(quant.int8_operands, ready.q, ready.keys, ready.rows, ready.shape)


STAGES: dict[str, Callable[[Bench, float, BlockPlan], Act]] = {
    "pool": pool,
    "draft": draft,
    "select": select,
    "pack": pack,
    "summarise": summarise,
    "rest": merge,
    "rest, none": partial(merge, first_order="none"),
    "rest, row": partial(merge, first_order="row"),
    "fill": fill,
    "quantise": quantise,
}
"""rest: with the moment of a head; "none": centroids alone; "row": a moment of each query block."""
