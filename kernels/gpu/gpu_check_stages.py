"""Correctness on a GPU of the kernels around the exact tiles, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from gpu_compare import LIMITS, Wrong, check, density_of, level_plan, rested, tokens
from gpu_results import Machine
from gpu_units import Unit
from torch import Tensor

from vidsparse.kernels import reference
from vidsparse.kernels.gpu import engine, exact_engine, levels_engine, oracles, rest
from vidsparse.kernels.gpu.exact_lists import pack_exact
from vidsparse.kernels.gpu.operands import Keys, ShortBlocks
from vidsparse.plan import SKIP, BlockPlan

BLOCK_N = 64
"""Rows of a tile of the key buffer."""

ROUNDED = 1.01
"""Of a mean, in roundings to the dtype: one, and what float32 adds to it."""

FLOAT32_SUM = 2**-22
"""Of a mean of up to 64 numbers in float32, as a share of the largest token."""

MEAN_LIMIT = 1e-6
"""Relative L2 of means in float32."""

LSE_SHARE = 2.0
"""Absolute error of an LSE that rests on means rounded to the dtype, per error of an output."""

STEP_LIMIT = 0.501
"""Of int8 values, in steps: half of one, and the float32 arithmetic before it."""

SCALE_LIMIT = 1e-6
SHIFT_LIMIT = 1e-5
"""Both relative."""

PACKED: dict[str, tuple[tuple[int, int], str]] = {
    "lists": ((128, 64), "mixed"),
    "lists of exact blocks": ((128, 64), "exact"),
    "lists of wide blocks": ((64, 128), "mixed"),
}
"""Block sizes, levels."""

MERGES = {"short blocks": "skip", "centroids": "centroid", "bias": "tilt", "moment": "global",
          "moment of query blocks": "row"}  # fmt: skip
"""What the rest merge adds -> rest of a plan."""

PLACES = (
    ("text first", torch.bfloat16, 128),
    ("ragged", torch.bfloat16, 64),
    ("no text", torch.float16, 96),
    ("text first", torch.float32, 128),
)
"""Grid, dtype and head dim of the inputs: every value of each of them once."""


def stages(machine: Machine) -> Iterator[Unit]:
    """Pooling, summary, rest merge, key buffer, quantisation, lists."""
    for grid, dtype, depth in PLACES[1:2] if machine.dry else PLACES:
        limit = LIMITS[dtype]
        acts: dict[str, tuple[float, Callable[[Inputs], float]]] = {
            "block means": (MEAN_LIMIT, means_error),
            "block means by an order": (MEAN_LIMIT, partial(means_error, ordered=True)),
            "summary": (limit, summary_error),
            "moments of blocks": (limit, moments_error),
            **{f"rest merge: {name}": (limit, partial(merge_error, what=what))
               for name, what in MERGES.items()},
            "key buffer": (ROUNDED, buffer_error),
            "key mean": (MEAN_LIMIT, key_mean_error),
            "int8 keys": (STEP_LIMIT, int8_keys_error),
            "int8 queries": (STEP_LIMIT, int8_queries_error),
        }  # fmt: skip
        for name, (bound, act) in acts.items():
            data = "random" if name.startswith("rest merge") else "structured"
            run = partial(on_inputs, act, machine, grid, depth, dtype, data)
            yield check(name, f"{grid}, B 2, D {depth}", dtype, "kernel", bound, run,
                        family=f"stage {name}", seconds=0.8)  # fmt: skip
    for grid in ("text first",) if machine.dry else ("ragged", "no text"):
        for name, (sizes, kind) in PACKED.items():
            run = partial(lists_error, machine, grid, sizes, kind)
            yield check(name, grid, torch.int8, "kernel", 0.0, run, family="stage lists")
        for tile in (64, 32):
            run = partial(plain_error, machine, grid, tile)
            yield check(f"plain lists, tiles of {tile}", grid, torch.int8, "kernel", 0.0, run,
                        family="stage plain lists")  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Random tokens and a plan of all levels for them."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: BlockPlan


def on_inputs(
    act: Callable[[Inputs], float],
    machine: Machine,
    grid: str,
    depth: int,
    dtype: torch.dtype,
    data: str,
) -> float:
    """An error on inputs that are made here."""
    plan = level_plan(machine, grid, (128, 64), "mixed", "global", batch=2)
    return act(Inputs(*tokens(machine, plan, depth, dtype, data), plan))


def relative(found: Tensor, want: Tensor) -> float:
    """Relative L2 error."""
    return float((found.double() - want.double()).norm() / want.double().norm())


def order_of(x: Tensor, ordered: bool) -> tuple[Tensor | None, Tensor]:
    """Any order of the tokens of x, and x in that order; or None and x."""
    order = torch.randperm(x.shape[2], device=x.device)
    return (order, x[:, :, order]) if ordered else (None, x)


def means_error(given: Inputs, ordered: bool = False) -> float:
    from vidsparse.kernels.gpu.means import block_means

    x, blocks = given.k, given.plan.k_blocks
    rows = engine.query_rows(blocks, x.device)
    order, moved = order_of(x, ordered)
    found, x = block_means(x, rows.start, rows.count, rows.size, order), moved
    return relative(found, oracles.block_means(x, blocks.start, blocks.count))


def key_buffer(x: Tensor, plan: BlockPlan) -> tuple[levels_engine.KeyLayout, Keys]:
    """Of a plan, for tiles of BLOCK_N rows, x as keys and values."""
    layout = levels_engine.layout_for(plan, BLOCK_N, x.device)
    return layout, levels_engine.fill(x, x, layout)


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


def summary_error(given: Inputs) -> float:
    """The largest, of means and of the moment, of tokens in any order."""
    from vidsparse.kernels.gpu.summary import summarise

    k, v, blocks = given.k, given.v, given.plan.k_blocks
    order = torch.randperm(k.shape[2], device=k.device)
    cut = blocks.on(k.device)
    place = cut.start, cut.count.int(), blocks.size, (~cut.text).int(), order
    draft, *found = summarise(k, v, *place, int(blocks.count[~blocks.text].sum()))
    mean_k, mean_v, moment = oracles.summarise(k[:, :, order], v[:, :, order], blocks)
    if not (off := relative(draft, mean_k)) <= MEAN_LIMIT:
        raise Wrong(f"means in float32 are off by {off:.1e}, allowed is {MEAN_LIMIT:g}")
    return max(unpadded(x, y) for x, y in zip(found, (mean_k, mean_v, moment), strict=True))


def unpadded(found: Tensor, want: Tensor) -> float:
    """Relative L2 where want [B, H, m, n] is; raises `Wrong` unless found is zero past that."""
    rows, columns = want.shape[2:]
    if bool(found[:, :, rows:].any()) or bool(found[..., columns:].any()):
        raise Wrong("padding is not zero")
    return relative(found[:, :, :rows, :columns], want)


def moments_error(given: Inputs) -> float:
    """Of all blocks together."""
    from vidsparse.kernels.gpu.block_moments import block_moments

    k, v, blocks = given.k, given.v, given.plan.k_blocks
    cut = blocks.on(k.device)
    found = block_moments(k, v, cut.start, cut.count.int(), blocks.size, None)
    depth = k.shape[3]
    past = found[..., depth:, :], found[..., depth:], found[len(blocks) :]
    if any(bool(x.any()) for x in past):
        raise Wrong("padding is not zero")
    return relative(found[: len(blocks), ..., :depth, :depth], oracles.block_moments(k, v, blocks))


def merge_error(given: Inputs, what: str) -> float:
    """Of output and LSE, on top of exact (O, LSE) of the listed full blocks."""
    q, k, v, blocks = given.q, given.k, given.v, given.plan.k_blocks
    plan = exact_like(given.plan, what)
    full = plan.with_rest(SKIP)
    short = (blocks.count < blocks.size).to(q.device)
    full = replace(full, levels=plan.levels.masked_fill(short, SKIP))
    out, lse = reference.execute(q.double(), k.double(), v.double(), full)
    assert lse is not None
    rows, cut = engine.query_rows(plan.q_blocks, q.device), blocks.on(q.device)
    left = short.nonzero().flatten().int()
    parts = left, cut.start[short].int(), cut.count[short].int()
    out, lse = out.to(q.dtype), lse.float().contiguous()
    rest.merge(q, k, v, plan, rows, out, lse, cut.start, short=ShortBlocks(*parts))
    want, want_lse = reference.execute(q.double(), k.double(), v.double(), plan)
    assert want_lse is not None
    empty = want_lse.isinf()
    if not torch.equal(lse.isinf(), empty):
        raise Wrong("a row that reads nothing has an LSE, or another has none")
    return max(relative(out, want), float((lse - want_lse)[~empty].abs().max()) / LSE_SHARE)


def exact_like(plan: BlockPlan, what: str) -> BlockPlan:
    """A random plan of level 0 for the same blocks; what: rest of `level_plan`."""
    levels = torch.where(torch.rand(plan.levels.shape) < 0.3, 0, SKIP).to(torch.int8)
    levels[0, 0, 0] = SKIP
    exact = BlockPlan.from_levels(levels.to(plan.levels.device), plan.q_blocks, plan.k_blocks, (0,))
    return rested(exact, what)


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
    machine: Machine, grid: str, sizes: tuple[int, int], kind: str
) -> tuple[float, float]:
    """Rows of the key buffer that the lists name too often or too rarely."""
    plan = level_plan(machine, grid, sizes, kind, "skip", batch=2)
    layout = levels_engine.layout_for(plan, BLOCK_N, plan.levels.device)
    lists = levels_engine.lists_for(plan, layout, BLOCK_N)
    if int(lists.count.max()) >= lists.entry.shape[1]:
        raise Wrong("a list has no spare entry")
    spare = lists.entry.gather(1, lists.count[:, None].long()) & 0xFFFFFF
    if (int(spare.max()) + 1) * BLOCK_N > layout.rows:
        raise Wrong("the spare entry of a list is no tile")
    packed = lists.entry, lists.bits, lists.count, lists.whole
    found = oracles.named_rows(*packed, BLOCK_N, layout.rows)
    want = oracles.pack_lists(plan, layout.first, layout.rows)
    return float((found != want).sum()), density_of(plan)


def plain_error(machine: Machine, grid: str, tile: int) -> tuple[float, float]:
    """Lists of full blocks that differ, of engines that address tokens and tiles."""
    plan = level_plan(machine, grid, (128, 64), "exact", "skip", batch=2)
    wrong = 0
    for addresses in ("token", "tile"):
        place = exact_engine.key_place(plan.k_blocks, tile, addresses, True, machine.device)
        how = place.entry, place.pieces, place.step
        entry, count = pack_exact(plan.levels, *how, place.width)
        rows = zip(entry.flatten(0, 2).tolist(), count.flatten().tolist(), strict=True)
        want = oracles.pack_exact(plan.levels, *how)
        wrong += sum(row[:n] != one for (row, n), one in zip(rows, want, strict=True))
    return float(wrong), density_of(plan)
