"""The calls whose kernels the gate compiles: shipped methods, dtypes, head dims, forms, lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import product

import torch
from aot_launches import Launch, recording
from aot_targets import Architecture

from vidsparse.attention import attend
from vidsparse.blocks import Blocks
from vidsparse.config import SparseConfig, presets
from vidsparse.draft import Draft
from vidsparse.estimator import mean
from vidsparse.grid import TokenGrid
from vidsparse.kernels.gpu import bisect, engine, select, unblock
from vidsparse.plan import BlockPlan

GRIDS = (
    TokenGrid(3, 9, 11, 21),
    TokenGrid(4, 8, 16, 48),
    TokenGrid(16, 8, 16),
    TokenGrid(1, 5, 7),
)
"""Every call is made at all lengths; the others must find the kernels of the first.

Triton has kernels of their own for integers that are 1 or multiples of 16, so some counts are.
"""

DENSITIES = 0.3, 0.45, 0.5, 1.0
WIDTHS = (100, 1000, 2000, 4000, 8000)
"""Key blocks of a row in the selection, one for every width that it is compiled for."""

MIXED = (
    *("selector.name=pyramid", "selector.levels=[0,1,2,3,4,5,6]", "selector.mode=quota"),
    "selector.shares=[0.4,0.1,0.1,0.1,0.1,0.1,0.1]",
)
"""Every level in one plan."""

HOPPER = ("tma",)

Call = Callable[[int], object]
"""A call at one of the lengths and densities."""


def launches(arch: Architecture, full: bool) -> tuple[list[Launch], list[Launch]]:
    """All kernels for one architecture, and those that other lengths and densities made anew.

    full: also of the rarer combinations.
    """
    with recording(arch) as found, torch.no_grad():
        for call in calls(arch, full):
            call(0)
        first = len(found)
        for call, which in product(calls(arch, full), range(1, len(GRIDS))):
            call(which)
    return found, found[first:]


def calls(arch: Architecture, full: bool) -> Iterator[Call]:
    half = torch.bfloat16
    for name in presets():
        yield attention(name, half, 128)
        yield attention(name, half, 128, "kernel.block_q=128")
    high = "kernel.block_q=128"
    for form in ("pointer", *HOPPER * arch.asynchronous):
        changes = high, f"kernel.form={form}"
        yield attention("tiles", half, 64, *changes)
        yield attention("tiles", half, 128, *changes)
        yield attention("tiles", half, 128, *changes, "kernel.block_k=128")
        yield attention("tiles", half, 128, *changes, hoisted=False)
        yield attention("tiles", half, 128, *changes, "compensation.name=none")
    for depth in (64, 128):
        yield attention("pisa", half, depth, high)
        yield attention("tiles", half, depth, high, *MIXED)
        yield attention("tiles", half, depth, high, "kernel.qk=int8")
    yield by_rows(half, 128)
    yield attention("balanced", half, 128, "estimator.name=variance")
    yield attention("tiles", torch.float32, 128)
    for sub_blocks in (1, 4):
        yield draft(128, sub_blocks)
    for nk in WIDTHS[: 5 if full else 4]:
        yield selection(nk, "logit")
    yield cuts
    yield unblocked
    if full:
        yield from rare_calls(arch)


def rare_calls(arch: Architecture) -> Iterator[Call]:
    dtypes = torch.bfloat16, torch.float16, torch.float32
    contents = (), MIXED, ("compensation.name=none",)
    blocks = (128, 128), (128, 64), (64, 32), (16, 16)
    for dtype, depth, content, (block_q, block_k) in product(
        dtypes, (64, 80, 128), contents, blocks
    ):
        if content == MIXED and block_k < 64:
            continue  # these levels need blocks of 64 keys
        forms = HOPPER * (arch.asynchronous and dtype != torch.float32 and content != MIXED)
        for form in ("pointer", *forms):
            if block_q < {"pointer": 16, "tma": 64}[form]:
                continue
            sizes = f"kernel.block_q={block_q}", f"kernel.block_k={block_k}"
            changes = *sizes, *content, f"kernel.form={form}"
            yield attention("tiles", dtype, depth, *changes)
            if dtype == torch.bfloat16 and block_k == 64:
                yield attention("tiles", dtype, depth, *changes, hoisted=False)
                if form == "pointer":
                    yield attention("tiles", dtype, depth, *changes, "kernel.qk=int8")
    for dtype, depth in product(dtypes, (64, 80, 128)):
        yield by_rows(dtype, depth)
    for depth, sub_blocks in product((64, 80, 128), (1, 2, 4, 8)):
        yield draft(depth, sub_blocks)
    for nk, rule in product(WIDTHS, ("rank", "mass", "logit")):
        yield selection(nk, rule)


def attention(
    preset: str, dtype: torch.dtype, depth: int, *changes: str, hoisted: bool = True
) -> Call:
    """A whole call of a method."""

    def call(which: int) -> object:
        config = method(preset, DENSITIES[which], changes)
        q, k, v = (torch.zeros(1, GRIDS[which].tokens, 2, depth, dtype=dtype) for _ in range(3))
        return attend(q, k, v, grid=GRIDS[which], config=config, hoisted=hoisted)

    return call


def by_rows(dtype: torch.dtype, depth: int) -> Call:
    """A plan with a bias, orders of heads and a moment of each query block, all heads at once."""

    def call(which: int) -> object:
        grid = GRIDS[which]
        cuts = Blocks.cut(grid, 128), Blocks.cut(grid, 64)
        levels = torch.zeros(1, 2, *map(len, cuts), dtype=torch.int8)
        order = torch.arange(grid.tokens).repeat(1, 2, 1)
        plan = BlockPlan.from_levels(levels, *cuts, (0,))
        plan = plan.with_rest(6, "row", torch.zeros(levels.shape)).with_orders(order, order)
        q, k, v = (torch.zeros(1, 2, grid.tokens, depth, dtype=dtype) for _ in range(3))
        return engine.execute(q, k, v, plan)

    return call


@lru_cache(maxsize=1024)
def method(preset: str, density: float, changes: tuple[str, ...]) -> SparseConfig:
    """A shipped method at one density in every call."""
    fixed = ["schedule.name=constant", f"schedule.density={density}", "schedule.min_tokens=0"]
    return SparseConfig.load(preset, [*fixed, "kernel.impl=triton", *changes])


def draft(depth: int, sub_blocks: int) -> Call:
    """Pooling and draft scores of blocks in pieces."""

    def call(which: int) -> object:
        x = torch.zeros(1, 2, GRIDS[which].tokens, depth, dtype=torch.bfloat16)
        cuts = Blocks.cut(GRIDS[which], 128), Blocks.cut(GRIDS[which], 64)
        return mean.estimate(Draft(x, x, x, *cuts), mean.Params(sub_blocks=sub_blocks))

    return call


def cuts(which: int) -> object:
    """Bisection, by programs of every width."""
    rows = 40 * max(bisect.CHUNKS) + 8 * which
    names = torch.arange(rows, dtype=torch.int32)
    return [bisect.bisect(torch.zeros(1, 1, 3 + which, rows), names, [size]) for size in (64, 128)]


def unblocked(which: int) -> object:
    """What an engine that addresses tiles gave, back in an order of heads."""
    blocks = Blocks.cut(GRIDS[which], 128)
    x = torch.zeros(1, 2, len(blocks) * 128, 128, dtype=torch.bfloat16)
    out = x.new_empty(1, GRIDS[which].tokens, 2, 128).transpose(1, 2)
    order = torch.arange(GRIDS[which].tokens).repeat(1, 2, 1)
    rows = engine.query_rows(blocks, x.device, order)
    lses = (torch.zeros(y.shape[:3]) for y in (x, out))
    return unblock.unblock(x, next(lses), rows, out, next(lses))


def selection(nk: int, rule: str) -> Call:
    """Selection of two levels, of one by rank, in rows of nk blocks or a few more."""

    def call(which: int) -> object:
        blocks = nk + 8 * which
        value = torch.zeros(1, 2, 3, blocks)
        forced, counts = torch.zeros(3, blocks, dtype=torch.bool), torch.full((blocks,), 64)
        if rule == "rank":
            return select.select_topk(value, forced, 15 + which)
        bounds = [0.4 + 0.1 * which, 1.0 if which else 0.8]
        return select.select_mass(value, rule, forced, counts, [0, 3], bounds, which, 31 + which)

    return call
