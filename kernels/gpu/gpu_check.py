"""Correctness on a GPU, against float64: every exact engine, plans through the whole executor.

Every output buffer starts as NaN: what a kernel does not write is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any

import torch
from gpu_cases import QKV, Shape, exact_plan, random_qkv
from gpu_check_content import content
from gpu_check_stages import stages
from gpu_compare import (
    GRIDS,
    LIMITS,
    Absent,
    Wrong,
    check,
    density_of,
    level_plan,
    tokens,
)
from gpu_graphs import graphs
from gpu_results import Machine
from gpu_units import Unit
from gpu_ways import Way, exact, here, levels, way
from sampled import sampled_error
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.kernels import reference
from vidsparse.kernels.gpu import engine as triton_engine
from vidsparse.kernels.gpu import oracles
from vidsparse.plan import SKIP, BlockPlan

Found = tuple[float, float]
"""Error and density."""

HALF = torch.bfloat16
LSE_LIMIT = 1e-4
"""Absolute; of `reference.execute` for plans of exact blocks alone, as means are rounded to the
dtype of the input."""

INT8_LIMIT = 2e-2
FUSED = Shape("wan2.1-14b-720p x 2, fused QKV", TokenGrid(21, 45, 80), 40, 128)
"""Two of them in one tensor of queries, keys and values hold more than 2^31 elements."""

WIDE = Shape("wan2.1-14b-720p x 6 heads", TokenGrid(21, 45, 80), 240, 128)
"""Queries alone hold more than 2^31 elements, and so does the output."""


@dataclass(frozen=True)
class Case:
    """Random tokens and a random plan for them; made where they are compared."""

    machine: Machine
    dtype: torch.dtype
    depth: int
    grid: str = "ragged"
    sizes: tuple[int, int] = (128, 64)
    kind: str = "exact"
    rest: str = "skip"
    batch: int = 2
    data: str = "random"

    @property
    def shape(self) -> str:
        return f"{self.grid}, B {self.batch}, D {self.depth}"

    def make(self) -> tuple[QKV, BlockPlan]:
        plan = level_plan(self.machine, self.grid, self.sizes, self.kind, self.rest, self.batch)
        return tokens(self.machine, plan, self.depth, self.dtype, self.data), plan

    def fit(self, one: Way) -> Case | None:
        """With blocks that an engine takes; None if there are none."""
        for sizes in (self.sizes, (128, 128), (64, 64)):
            if one.refusal(self.machine, self.dtype, self.depth, sizes) is None:
                return replace(self, sizes=sizes)
        return None


def first(machine: Machine) -> Iterator[Unit]:
    """Of every engine in a process of its own: does it run here, its tiles, a plan with centroids.

    What does not run here is a row with the reason.
    """
    for one in map(way, machine.ways):
        how: dict[str, Any] = {"process": one.name, "seconds": 4.0}
        yield check("engine runs here", "", HALF, one.name, 0.0, partial(presence, one, machine),
                    process=one.name)  # fmt: skip
        if not one.runs(machine):
            continue
        case = Case(machine, HALF, 64 if machine.dry else 128).fit(one)
        if case is not None:
            yield exact_unit(case, one, **how)
            yield engine_unit(replace(case, rest="global"), one, **how)


def presence(one: Way, machine: Machine) -> float:
    if reason := one.absence(machine):
        raise Absent(reason)
    return 0.0


def units(machine: Machine) -> list[Unit]:
    """The checks, the ones that everything else rests on first."""
    return [*exacts(machine), *plans(machine), *graphs(machine), *int8(machine),
            *far_offsets(machine), *stages(machine), *content(machine)]  # fmt: skip


def exact_unit(case: Case, one: Way, **how: Any) -> Unit:
    """Of an engine alone."""
    name = f"exact tiles: blocks {case.sizes[0]}x{case.sizes[1]}, {case.data}"
    act = partial(exact_error, case, one)
    return check(name, case.shape, case.dtype, one.name, LIMITS[case.dtype], act, **how)


def engine_unit(case: Case, one: Way, ordered: bool = False, **how: Any) -> Unit:
    """Of an engine and the rest merge behind it."""
    blocks = f"blocks {case.sizes[0]}x{case.sizes[1]}"
    name = f"plan: {case.kind}, rest {case.rest}, {blocks}, {case.data}{', by an order' * ordered}"
    act = partial(engine_error, case, ordered, **one.settings)
    return check(name, case.shape, case.dtype, one.name, LIMITS[case.dtype], act, **how)


def exacts(machine: Machine) -> Iterator[Unit]:
    """Each engine over head dims, dtypes, block sizes, orders, tokens whose scores rise."""
    cases = [
        Case(machine, HALF, 64, data="structured"),
        Case(machine, HALF, 128, "text first", sizes=(128, 128)),
        Case(machine, torch.float16, 96, data="structured"),
        Case(machine, HALF, 128, "no text", (64, 64), batch=1),
        Case(machine, torch.float32, 128),
    ]
    for one in here(machine):
        fitting = [fit for fit in (case.fit(one) for case in cases) if fit is not None]
        for case in dict.fromkeys(fitting[: 1 if machine.dry else None]):
            yield exact_unit(case, one)
        case = Case(machine, HALF, 64 if machine.dry else 128, rest="centroid").fit(one)
        if case is not None:
            yield engine_unit(case, one, ordered=True)


def exact_error(case: Case, one: Way) -> Found:
    """Of the output over the listed full blocks; raises `Wrong`."""
    (q, k, v), plan = case.make()
    ready = exact(one, q, k, v, plan)
    return compared(ready.run(), ready.lse, (q, k, v), ready.plan)


def compared(out: Tensor, lse: Tensor, qkv: QKV, plan: BlockPlan, lse_too: bool = True) -> Found:
    """Relative L2 of out against the reference, and density; raises `Wrong`."""
    want, want_lse = reference.execute(*(x.double() for x in qkv), plan)
    assert want_lse is not None
    return judged(out, lse, want, want_lse, lse_too), density_of(plan)


def judged(out: Tensor, lse: Tensor, want: Tensor, want_lse: Tensor, lse_too: bool = True) -> float:
    """Relative L2 of out; raises `Wrong` for rows that read nothing, and for the LSE if asked."""
    empty = want_lse == -inf
    if not torch.equal(lse == -inf, empty) or bool(out[empty].any()):
        raise Wrong("a row that lists nothing is not zero with LSE -inf, or another is")
    off = (lse[~empty] - want_lse[~empty]).abs()
    if lse_too and not bool((off <= LSE_LIMIT).all()):
        raise Wrong(f"LSE off by {float(off.max()):.2e}, allowed is {LSE_LIMIT:g}")
    return float((out.double() - want).norm() / want.norm())


def engine_error(case: Case, ordered: bool = False, shift: float = 0, **how: Any) -> Found:
    """Of the executor, of tokens in random order if asked, keys shifted by a constant."""
    (q, k, v), plan = case.make()
    k = k + shift
    order = None
    if ordered:
        order = torch.randperm(plan.q_blocks.tokens, device=q.device)
    out, lse = triton_engine.execute(q, k, v, plan, order=order, return_lse=True, **how)
    assert lse is not None
    if order is not None:
        q, k, v, out, lse = (x[:, :, order] for x in (q, k, v, out, lse))
    sharp = plan.listed == (0,) and plan.rest == SKIP and how.get("qk") != "int8"
    return compared(out, lse, (q, k, v), plan, sharp)


def plans(machine: Machine) -> Iterator[Unit]:
    """The executor over rests, grids, levels, dtypes and head dims, the engine left to it."""
    mixed: dict[str, Any] = {"kind": "mixed", "rest": "global"}
    one: dict[str, Any] = {"batch": 1}
    cases = [
        *(Case(machine, HALF, 128, "text first", rest=r) for r in ("row", "tilt", "skip")),
        Case(machine, HALF, 64, rest="row", **one),
        Case(machine, torch.float32, 128, rest="global"),
        Case(machine, torch.float16, 96, rest="tilt"),
        *(Case(machine, HALF, 128, grid, rest="centroid", **one) for grid in GRIDS),
        *(Case(machine, HALF, 128, sizes=(n, n), rest="global", **one) for n in (16, 64, 128)),
        *(Case(machine, HALF, depth, **mixed) for depth in (128, 64)),
        Case(machine, torch.float32, 96, **mixed),
        Case(machine, torch.float16, 128, "text first", kind="mixed", rest="row", **one),
        *(Case(machine, HALF, 128, sizes=(n, n), **mixed, **one) for n in (16, 128)),
    ]
    cases = cases[1::6] if machine.dry else cases
    for case in cases:
        name = "triton-levels" if case.kind == "mixed" else "auto"
        yield engine_unit(case, Way(name, "auto", "auto"))
    if not machine.dry:
        sharp = Case(machine, torch.float32, 128, data="structured", **mixed)
        yield engine_unit(sharp, Way("triton-levels", "auto", "auto"))
    for case in (Case(machine, HALF, 64), Case(machine, torch.float16, 128))[: 2 - machine.dry]:
        act = partial(levels_error, replace(case, kind="mixed"))
        yield check("levels forward", case.shape, case.dtype, "triton-levels", LIMITS[case.dtype],
                    act)  # fmt: skip


def levels_error(case: Case) -> Found:
    """Of the forward of plans with levels on the rows of its key buffer; raises `Wrong`."""
    qkv, plan = case.make()
    given = levels(*qkv, plan)
    out, lse, keys, lists = given.run(), given.lse, given.keys, given.lists
    packed = lists.entry, lists.bits, lists.count, lists.whole
    rows = oracles.named_rows(*packed, given.shape.block_n, keys.k.shape[2])
    want, want_lse = oracles.levels_forward(given.q, keys.k, keys.v, keys.bias, rows, plan.q_blocks)
    return judged(out, lse, want, want_lse), density_of(plan)


def int8(machine: Machine) -> Iterator[Unit]:
    """Of tokens in random order, keys with a common part."""
    cases = [Case(machine, HALF, 64), Case(machine, HALF, 128, kind="mixed", rest="global")]
    for case in cases[: 1 if machine.dry else None]:
        act = partial(engine_error, case, ordered=True, shift=2.0, qk="int8")
        yield check(f"int8: {case.kind}, rest {case.rest}", case.shape, case.dtype, "triton-int8",
                    INT8_LIMIT, act)  # fmt: skip


def far_offsets(machine: Machine) -> Iterator[Unit]:
    """Tensors past 2^31 elements: two videos in one tensor [B, S, 3, H, D], and many heads."""
    for one in here(machine):
        for name, shape, act in (("fused", FUSED, fused_error), ("heads", WIDE, wide_error)):
            sizes = Case(machine, HALF, shape.head_dim).fit(one)
            if sizes is not None and (
                one == here(machine)[0] or (shape, machine.dry) == (FUSED, False)
            ):
                shown = "tiny" if machine.dry else shape.name
                run = partial(act, machine, one, sizes.sizes)
                yield check(f"offsets past 2^31: {name}", shown, HALF, one.name, LIMITS[HALF], run,
                            seconds=4.0)  # fmt: skip


def fused_error(machine: Machine, one: Way, sizes: tuple[int, int]) -> Found:
    shape = Shape("tiny", TokenGrid(1, 5, 31), 2, 128) if machine.dry else FUSED
    stored = torch.empty(2, shape.grid.tokens, 3, shape.heads, shape.head_dim,
                         dtype=HALF, device=machine.device)  # fmt: skip
    assert machine.dry or stored.numel() > 2**31
    stored.normal_()
    q, k, v = (x.transpose(1, 2) for x in stored.unbind(2))
    q_blocks, k_blocks = (Blocks.cut(shape.grid, size) for size in sizes)
    drawn = torch.rand(2, shape.heads, len(q_blocks), len(k_blocks), device=machine.device) < 0.03
    plan = BlockPlan.from_levels(torch.where(drawn, 0, SKIP).to(torch.int8), q_blocks, k_blocks,
                                 (0,)).with_rest(k_blocks.levels, "global")  # fmt: skip
    return far_error((q, k, v), plan, one)


def wide_error(machine: Machine, one: Way, sizes: tuple[int, int]) -> Found:
    shape = Shape("tiny", TokenGrid(1, 5, 31), 3, 128) if machine.dry else WIDE
    q, k, v = random_qkv(shape, machine.device)
    assert machine.dry or q.numel() > 2**31
    return far_error((q, k, v), exact_plan(shape, 0.03, sizes, machine.device, coherent=True), one)


def far_error(qkv: QKV, plan: BlockPlan, one: Way) -> Found:
    out, _ = triton_engine.execute(*qkv, plan, **one.settings)
    if not bool(out.isfinite().all()):
        raise Wrong("some of the output was not written")
    return sampled_error(*qkv, out, plan, blocks=2), density_of(plan)
