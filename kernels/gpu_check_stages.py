"""Correctness on a GPU of the kernels around the sparse forward, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from typing import Any

import torch
from gpu_compare import LIMITS, Act, compare, level_plan, tokens
from gpu_results import Check, Machine
from torch import Tensor

from vidsparse.kernels import reference, triton_engine
from vidsparse.kernels.triton_operands import Keys
from vidsparse.plan import BlockPlan, Blocks

BLOCK_N = 64
"""Rows of a tile of the key buffer."""

STEP_LIMIT = 0.501
"""Of int8 values, in steps: half of one, and the float32 arithmetic before it."""

SCALE_LIMIT = 1e-6
SHIFT_LIMIT = 1e-5
"""Both relative."""


def stages(machine: Machine) -> Iterator[Check]:
    """Pooling, draft scores, moments and their term, quantisation, lists, selection."""
    dtypes = list(LIMITS)[-1:] if machine.dry else list(LIMITS)
    for grid in ("text first",) if machine.dry else ("ragged", "text first", "no text"):
        plan = level_plan(machine, grid, (128, 64), "mixed", "global", batch=2)
        for dtype in dtypes:
            q, k, v = tokens(machine, plan, 128, dtype, "structured")
            limit = LIMITS[dtype]
            acts: dict[str, tuple[float, Act]] = {
                "block means": (1e-6, partial(means_error, k, plan.k_blocks)),
                "key buffer": (limit, partial(buffer_error, k, plan)),
                "block means by an order": (1e-6, partial(means_error, k, plan.k_blocks, True)),
                "draft scores": (1e-5, partial(draft_error, q, k, plan, 1)),
                "draft scores by an order": (1e-5, partial(draft_error, q, k, plan, 1, True)),
                "draft of pieces": (1e-5, partial(draft_error, q, k, plan, 4)),
                "moment": (limit, partial(moment_error, k, v, plan)),
                "first order": (limit, partial(first_order_error, q)),
                "key mean": (1e-6, partial(key_mean_error, k, plan)),
                "int8 keys": (STEP_LIMIT, partial(int8_keys_error, k, plan)),
                "int8 queries": (STEP_LIMIT, partial(int8_queries_error, q, k, plan)),
            }
            for name, (bound, act) in acts.items():
                yield compare(name, f"{grid}, B 2, D 128", dtype, "kernel", bound, act)
        exact = level_plan(machine, grid, (128, 64), "exact", "skip", batch=2)
        wide = level_plan(machine, grid, (64, 128), "mixed", "global", batch=2)
        packed = {"lists": plan, "lists of exact blocks": exact, "lists of wide blocks": wide}
        for name, given in packed.items():
            act = partial(lists_error, given)
            yield compare(name, grid, torch.int8, "kernel", 0.0, act)
    for blocks in (33,) if machine.dry else (33, 257, 1182, 1861):
        for name, select in selections().items():
            for ties in (False, True):
                label = f"select: {name}{', ties' * ties}"
                act = partial(select, machine, blocks, ties)
                yield compare(label, f"{blocks} blocks", torch.float32, "kernel", 0.0, act)


def relative(found: Tensor, want: Tensor) -> float:
    """Relative L2 error."""
    return float((found.double() - want.double()).norm() / want.double().norm())


def order_of(x: Tensor, ordered: bool) -> tuple[Tensor | None, Tensor]:
    """Any order of the tokens of x, and x in that order; or None and x."""
    order = torch.randperm(x.shape[2], device=x.device)
    return (order, x[:, :, order]) if ordered else (None, x)


def means_error(x: Tensor, blocks: Blocks, ordered: bool = False) -> float:
    from vidsparse.kernels.triton_pool import block_means

    rows = triton_engine.query_rows(blocks, x.device)
    order, moved = order_of(x, ordered)
    found, x = block_means(x, rows.start, rows.count, rows.size, order), moved
    return relative(found, reference.block_means(x, blocks.start, blocks.count))


def key_buffer(x: Tensor, plan: BlockPlan) -> tuple[triton_engine.KeyLayout, Keys]:
    """Of a plan, for tiles of BLOCK_N rows, x as keys and values."""
    layout = triton_engine.layout_for(plan, BLOCK_N, x.device)
    return layout, triton_engine.fill(x, x, layout)


def buffer_error(x: Tensor, plan: BlockPlan) -> float:
    """Of the pooled rows; infinite unless tokens are equal bit by bit and all else is zero."""
    layout, keys = key_buffer(x, plan)
    found, blocks = keys.k, plan.k_blocks
    want = reference.fill_keys(x, blocks, layout.first, layout.rows, found.shape[3])
    tokens = len(blocks) * blocks.size
    same = torch.equal(found[:, :, :tokens].double(), want[:, :, :tokens])
    clean = not bool(found[want == 0].any())
    return relative(found, want) if same and clean else inf


def draft_error(q: Tensor, k: Tensor, plan: BlockPlan, pieces: int, ordered: bool = False) -> float:
    """Of the estimator on this device."""
    from vidsparse.estimator import mean

    cuts = plan.q_blocks, plan.k_blocks
    order, _ = order_of(q, ordered)
    found = mean.estimate(q, k, *cuts, mean.Params(sub_blocks=pieces), order).value
    if order is not None:
        q, k = q[:, :, order], k[:, :, order]
    return relative(found, reference.draft_scores(q, k, *cuts, pieces))


def moment_error(k: Tensor, v: Tensor, plan: BlockPlan) -> float:
    from vidsparse.kernels.triton_taylor import taylor_state

    blocks = plan.k_blocks
    rows = triton_engine.query_rows(blocks, k.device)
    video = (~blocks.text).nonzero().flatten().to(k.device)
    found = taylor_state(k, v, rows.start, rows.count, rows.size, video)
    return relative(found, reference.taylor_state(k, v, blocks))


def first_order_error(q: Tensor) -> float:
    from vidsparse.kernels.triton_taylor import add_first_order

    depth = q.shape[3]
    moment = q.new_empty(*q.shape[:2], depth, depth).normal_()
    rest, out = torch.rand(q.shape[:3], device=q.device), torch.randn_like(q)
    want = reference.add_first_order(q, moment, rest, out)
    add_first_order(q, moment, rest, out)
    return relative(out, want)


def key_mean_error(k: Tensor, plan: BlockPlan) -> float:
    from vidsparse.kernels.triton_quant import key_mean

    _, keys = key_buffer(k, plan)
    return relative(key_mean(keys.k, keys.bias), reference.key_mean(keys.k, keys.bias))


def int8_keys_error(k: Tensor, plan: BlockPlan) -> float:
    from vidsparse.kernels.triton_quant import key_mean, quantise_keys

    _, keys = key_buffer(k, plan)
    how = BLOCK_N, keys.bias, key_mean(keys.k, keys.bias)
    want = reference.quantise_keys(keys.k, *how)
    return rounding_error(*quantise_keys(keys.k, *how), *want)


def int8_queries_error(q: Tensor, k: Tensor, plan: BlockPlan) -> float:
    """Infinite if the shift of the LSE is wrong."""
    from vidsparse.kernels.triton_quant import quantise_queries

    _, keys = key_buffer(k, plan)
    blocks, mean = plan.q_blocks, reference.key_mean(keys.k, keys.bias).float()
    rows, half = triton_engine.query_rows(blocks, q.device), blocks.size // 2
    values, scale, shift = quantise_queries(q, rows.start, rows.count, rows.size, half, mean)
    *want, want_shift = reference.quantise_queries(q, blocks, half, mean)
    right = relative(shift, want_shift) <= SHIFT_LIMIT
    return rounding_error(values, scale, *want) if right else inf


def rounding_error(values: Tensor, scale: Tensor, want: Tensor, want_scale: Tensor) -> float:
    """Of int8 values, in steps, half of one at best; infinite if a scale is wrong."""
    right = bool(((scale / want_scale - 1).abs() <= SCALE_LIMIT).all())
    return float((values - want).abs().max()) if right else inf


def lists_error(plan: BlockPlan) -> float:
    """Rows of the key buffer that the lists name, or name as `rest`, too often or too rarely.

    Infinite if a list has no spare entry or one that is no tile.
    """
    layout = triton_engine.layout_for(plan, BLOCK_N, plan.levels.device)
    lists = triton_engine.lists_for(plan, layout, BLOCK_N)
    if int(lists.count.max()) >= lists.entry.shape[1]:
        return inf
    spare = lists.entry.gather(1, lists.count[:, None].long()) & 0xFFFFFF
    if (int(spare.max()) + 1) * BLOCK_N > layout.rows:
        return inf
    packed = lists.entry, lists.bits, lists.count, lists.whole
    found = reference.named_rows(*packed, BLOCK_N, layout.rows)
    want = reference.pack_lists(plan, layout.first, layout.rows)
    return sum(float((each != rows).sum()) for each, rows in zip(found, want, strict=True))


Select = Callable[[Machine, int, bool], float]


def selections() -> dict[str, Select]:
    """Selector name -> share of the rows whose levels differ from the selector in torch."""
    from vidsparse.selector import pyramid, topk, topp

    levels: dict[str, Any] = {"levels": (0, 1, 4), "min_blocks": 2}
    methods: dict[str, tuple[Any, Any]] = {
        "topk": (topk, topk.Params()),
        "topp": (topp, topp.Params(p=0.7)),
        "quota": (pyramid, pyramid.Params(shares=(0.5, 0.3, 0.2), **levels)),
        "mass": (pyramid, pyramid.Params(mode="mass", mass=(0.3, 0.6, 0.95), **levels)),
    }

    def bind(module: Any, params: Any) -> Select:
        return lambda machine, blocks, ties: select_error(machine, module, params, blocks, ties)

    return {name: bind(*method) for name, method in methods.items()}


def select_error(machine: Machine, module: Any, params: Any, blocks: int, ties: bool) -> float:
    """The share of rows that differ. With ties, scores are multiples of 1."""
    from vidsparse.plan import Scores

    value = 2 * torch.randn(1, 2, 7, blocks)
    value = value.round() if ties else value
    forced = torch.rand(7, blocks) < 0.05
    count = torch.full((blocks,), 64)
    count[-1] = 5
    text = torch.zeros(blocks, dtype=torch.bool)
    cut = Blocks(count.cumsum(0) - count, count, text, 64)
    want = module.select(Scores(value.double(), "logit"), forced, 0.2, cut, params)
    scores = Scores(value.to(machine.device), "logit")
    found = module.select(scores, forced.to(machine.device), 0.2, cut, params).cpu()
    differs = (found.masked_fill(forced, 0) != want.masked_fill(forced, 0)).any(-1)
    return float(differs.double().mean())
