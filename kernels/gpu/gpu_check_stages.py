"""Correctness on a GPU of the kernels around the sparse forward, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from gpu_compare import LIMITS, Wrong, check, density_of, level_plan, tokens
from gpu_results import Machine
from gpu_units import Unit
from torch import Tensor

from vidsparse.kernels.gpu import engine, oracles
from vidsparse.kernels.gpu.operands import Keys
from vidsparse.plan import BlockPlan

BLOCK_N = 64
"""Rows of a tile of the key buffer."""

ROUNDED = 1.01
"""Of a mean, in roundings to the dtype: one, and what float32 adds to it."""

FLOAT32_SUM = 2**-22
"""Of a mean of up to 64 numbers in float32, as a share of the largest token."""

STEP_LIMIT = 0.501
"""Of int8 values, in steps: half of one, and the float32 arithmetic before it."""

SCALE_LIMIT = 1e-6
SHIFT_LIMIT = 1e-5
"""Both relative."""

PACKED: dict[str, tuple[tuple[int, int], str, str]] = {
    "lists": ((128, 64), "mixed", "global"),
    "lists of exact blocks": ((128, 64), "exact", "skip"),
    "lists of wide blocks": ((64, 128), "mixed", "global"),
}
"""Block sizes, levels, rest."""


def stages(machine: Machine) -> Iterator[Unit]:
    """Pooling, key buffer, moments and their term, quantisation, lists."""
    dtypes = list(LIMITS)[-1:] if machine.dry else list(LIMITS)
    for grid in ("text first",) if machine.dry else ("ragged", "text first", "no text"):
        for dtype, depth in product(dtypes, (64,) if machine.dry else (128, 64, 96)):
            limit = LIMITS[dtype]
            acts: dict[str, tuple[float, Callable[[Inputs], float]]] = {
                "block means": (1e-6, means_error),
                "block means by an order": (1e-6, partial(means_error, ordered=True)),
                "key buffer": (ROUNDED, buffer_error),
                "moment": (limit, moment_error),
                "first order": (limit, first_order_error),
                "key mean": (1e-6, key_mean_error),
                "int8 keys": (STEP_LIMIT, int8_keys_error),
                "int8 queries": (STEP_LIMIT, int8_queries_error),
            }
            for name, (bound, act) in acts.items():
                run = partial(on_inputs, act, machine, grid, depth, dtype)
                yield check(name, f"{grid}, B 2, D {depth}", dtype, "kernel", bound, run,
                            family=f"stage {name}")  # fmt: skip
        for name, (sizes, kind, rest) in PACKED.items():
            run = partial(lists_error, machine, grid, sizes, kind, rest)
            yield check(name, grid, torch.int8, "kernel", 0.0, run, family="stage lists")


@dataclass(frozen=True)
class Inputs:
    """Random tokens and a plan of all levels for them."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: BlockPlan


def on_inputs(
    act: Callable[[Inputs], float], machine: Machine, grid: str, depth: int, dtype: torch.dtype
) -> float:
    """An error on inputs that are made here."""
    plan = level_plan(machine, grid, (128, 64), "mixed", "global", batch=2)
    return act(Inputs(*tokens(machine, plan, depth, dtype, "structured"), plan))


def relative(found: Tensor, want: Tensor) -> float:
    """Relative L2 error."""
    return float((found.double() - want.double()).norm() / want.double().norm())


def order_of(x: Tensor, ordered: bool) -> tuple[Tensor | None, Tensor]:
    """Any order of the tokens of x, and x in that order; or None and x."""
    order = torch.randperm(x.shape[2], device=x.device)
    return (order, x[:, :, order]) if ordered else (None, x)


def means_error(given: Inputs, ordered: bool = False) -> float:
    from vidsparse.kernels.gpu.pool import block_means

    x, blocks = given.k, given.plan.k_blocks
    rows = engine.query_rows(blocks, x.device)
    order, moved = order_of(x, ordered)
    found, x = block_means(x, rows.start, rows.count, rows.size, order), moved
    return relative(found, oracles.block_means(x, blocks.start, blocks.count))


def key_buffer(x: Tensor, plan: BlockPlan) -> tuple[engine.KeyLayout, Keys]:
    """Of a plan, for tiles of BLOCK_N rows, x as keys and values."""
    layout = engine.layout_for(plan, BLOCK_N, x.device)
    return layout, engine.fill(x, x, layout)


def buffer_error(given: Inputs) -> float:
    """Of every pooled value, in roundings to the dtype; tokens are bit for bit, padding is zero."""
    x, plan = given.k, given.plan
    layout, keys = key_buffer(x, plan)
    found, blocks = keys.k, plan.k_blocks
    want = oracles.fill_keys(x, blocks, layout.first, layout.rows, found.shape[3])
    tokens = len(blocks) * blocks.size
    if not torch.equal(found[:, :, :tokens].double(), want[:, :, :tokens]):
        raise Wrong("rows of tokens differ")
    if bool(found[want == 0].any()):
        raise Wrong("padding is not zero")
    unit = torch.finfo(x.dtype).eps / 2 * want.abs() + FLOAT32_SUM * float(x.abs().max())
    return float(((found.double() - want).abs() / unit).max())


def moment_error(given: Inputs) -> float:
    from vidsparse.kernels.gpu.taylor import taylor_state

    k, v, blocks = given.k, given.v, given.plan.k_blocks
    rows = engine.query_rows(blocks, k.device)
    video = (~blocks.text).nonzero().flatten().to(k.device)
    found = taylor_state(k, v, rows.start, rows.count, rows.size, video)
    return relative(found, oracles.taylor_state(k, v, blocks))


def first_order_error(given: Inputs) -> float:
    from vidsparse.kernels.gpu.taylor import add_first_order

    q = given.q
    depth = q.shape[3]
    moment = q.new_empty(*q.shape[:2], depth, depth).normal_()
    rest, out = torch.rand(q.shape[:3], device=q.device), torch.randn_like(q)
    want = oracles.add_first_order(q, moment, rest, out)
    add_first_order(q, moment, rest, out)
    return relative(out, want)


def key_mean_error(given: Inputs) -> float:
    from vidsparse.kernels.gpu.quant import key_mean

    _, keys = key_buffer(given.k, given.plan)
    return relative(key_mean(keys.k, keys.bias), oracles.key_mean(keys.k, keys.bias))


def int8_keys_error(given: Inputs) -> float:
    from vidsparse.kernels.gpu.quant import key_mean, quantise_keys

    _, keys = key_buffer(given.k, given.plan)
    how = BLOCK_N, keys.bias, key_mean(keys.k, keys.bias)
    want = oracles.quantise_keys(keys.k, *how)
    return rounding_error(*quantise_keys(keys.k, *how), *want)


def int8_queries_error(given: Inputs) -> float:
    """Raises `Wrong` if the shift of the LSE is."""
    from vidsparse.kernels.gpu.quant import quantise_queries

    q, plan = given.q, given.plan
    _, keys = key_buffer(given.k, plan)
    blocks, mean = plan.q_blocks, oracles.key_mean(keys.k, keys.bias).float()
    rows, half = engine.query_rows(blocks, q.device), blocks.size // 2
    values, scale, shift = quantise_queries(q, rows.start, rows.count, rows.size, half, mean)
    *want, want_shift = oracles.quantise_queries(q, blocks, half, mean)
    if not (off := relative(shift, want_shift)) <= SHIFT_LIMIT:
        raise Wrong(f"the shift of the LSE is off by {off:.1e}, allowed is {SHIFT_LIMIT:g}")
    return rounding_error(values, scale, *want)


def rounding_error(values: Tensor, scale: Tensor, want: Tensor, want_scale: Tensor) -> float:
    """Of int8 values, in steps, half of one at best; raises `Wrong` if a scale is."""
    off = (scale / want_scale - 1).abs()
    if not bool((off <= SCALE_LIMIT).all()):
        raise Wrong(f"a scale is off by {float(off.max()):.1e}, allowed is {SCALE_LIMIT:g}")
    return float((values - want).abs().max())


def lists_error(
    machine: Machine, grid: str, sizes: tuple[int, int], kind: str, rest: str
) -> tuple[float, float]:
    """Rows of the key buffer that the lists name, or name as `rest`, too often or too rarely."""
    plan = level_plan(machine, grid, sizes, kind, rest, batch=2)
    layout = engine.layout_for(plan, BLOCK_N, plan.levels.device)
    lists = engine.lists_for(plan, layout, BLOCK_N)
    if int(lists.count.max()) >= lists.entry.shape[1]:
        raise Wrong("a list has no spare entry")
    spare = lists.entry.gather(1, lists.count[:, None].long()) & 0xFFFFFF
    if (int(spare.max()) + 1) * BLOCK_N > layout.rows:
        raise Wrong("the spare entry of a list is no tile")
    packed = lists.entry, lists.bits, lists.count, lists.whole
    found = oracles.named_rows(*packed, BLOCK_N, layout.rows)
    want = oracles.pack_lists(plan, layout.first, layout.rows)
    off = sum(float((each != rows).sum()) for each, rows in zip(found, want, strict=True))
    return off, density_of(plan)
