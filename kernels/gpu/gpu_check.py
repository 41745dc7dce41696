"""Correctness on a GPU, against float64: every form of the sparse forward, the kernels around it.

Every output buffer starts as NaN: what a kernel does not write is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any

import torch
from gpu_cases import QKV, Shape, exact_plan, prepare, random_qkv, sampled_error
from gpu_check_stages import stages
from gpu_compare import GRIDS, LIMITS, Wrong, check, density_of, level_plan, tokens
from gpu_results import Machine
from gpu_units import FIRST, Unit
from torch import Tensor

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.kernels import reference
from vidsparse.kernels.gpu import engine as triton_engine
from vidsparse.kernels.gpu import oracles
from vidsparse.plan import SKIP, BlockPlan

Found = tuple[float, float]
"""Error and density."""

LSE_LIMIT = 1e-4
"""Absolute, of LSE and rest share; against `reference.execute` for plans of exact blocks alone, as
means are rounded to the dtype of the input."""

INT8_LIMIT = 2e-2
FUSED = Shape("wan2.1-14b-720p x 2, fused QKV", TokenGrid(21, 45, 80), 40, 128)
"""Two of them in one tensor of queries, keys and values hold more than 2^31 elements."""

WIDE = Shape("wan2.1-14b-720p x 6 heads", TokenGrid(21, 45, 80), 240, 128)
"""Queries alone hold more than 2^31 elements, and so do the key buffer and the output."""


def units(machine: Machine) -> list[Unit]:
    """The checks, the ones that everything else rests on first."""
    return [*forms(machine), *plans(machine), *int8(machine), *far_offsets(machine),
            *stages(machine)]  # fmt: skip


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


def engine_error(case: Case, ordered: bool = False, shift: float = 0, **how: Any) -> Found:
    """Of the engine, of tokens in random order if asked, keys shifted by a constant."""
    (q, k, v), plan = case.make()
    device = case.machine.device
    order = torch.randperm(plan.q_blocks.tokens, device=device) if ordered else None
    return error_of((q, k + shift, v), plan, order, **how)


def error_of(qkv: QKV, plan: BlockPlan, order: Tensor | None = None, **how: Any) -> Found:
    """Relative L2 of the output of the engine, and density; raises `Wrong`."""
    out, lse = triton_engine.execute(*qkv, plan, order=order, return_lse=True, **how)
    assert lse is not None
    if order is not None:
        *qkv, out, lse = (x[:, :, order] for x in (*qkv, out, lse))
    q, k, v = (x.double() for x in qkv)
    want, want_lse = reference.execute(q, k, v, plan)
    assert want_lse is not None
    empty = want_lse == -inf
    if not torch.equal(lse == -inf, empty) or bool(out[empty].any()):
        raise Wrong("a row that lists nothing is not zero with LSE -inf, or another is")
    exact = plan.listed == (0,) and plan.rest == SKIP and how.get("qk") != "int8"
    if exact:
        within("LSE", lse[~empty], want_lse[~empty])
    return float((out.double() - want).norm() / want.norm()), density_of(plan)


def kernel_error(case: Case, form: str) -> Found:
    """Of the output of one form on the rows of its key buffer; raises `Wrong`."""
    qkv, plan = case.make()
    given = prepare(*qkv, plan, form)
    keys, lists = given.keys, given.lists
    out, lse, rest = given.forward(), given.lse, given.rest
    packed = lists.entry, lists.bits, lists.count, lists.whole
    rows = oracles.named_rows(*packed, given.shape.block_n, keys.k.shape[2])
    want, want_lse, want_rest = oracles.sparse_forward(
        given.q, keys.k, keys.v, keys.bias, *rows, plan.q_blocks
    )
    empty = want_lse == -inf
    if not torch.equal(lse == -inf, empty) or bool(out[empty].any()):
        raise Wrong("a row that lists nothing is not zero with LSE -inf, or another is")
    within("LSE", lse[~empty], want_lse[~empty])
    if rest is not None:
        within("share of the rest", rest, want_rest)
    return float((out.double() - want).norm() / want.norm()), density_of(plan)


def within(name: str, found: Tensor, want: Tensor) -> None:
    """Raise `Wrong` unless all numbers are within LSE_LIMIT; NaN is not."""
    off = (found - want).abs()
    if not bool((off <= LSE_LIMIT).all()):
        raise Wrong(f"{name} off by {float(off.max()):.2e}, allowed is {LSE_LIMIT:g}")


def plans(machine: Machine) -> Iterator[Unit]:
    """`triton_engine.execute` over dtypes, head dims, grids, block sizes, levels and rests."""
    half = torch.bfloat16
    mixed: dict[str, Any] = {"kind": "mixed", "rest": "global"}
    one: dict[str, Any] = {"batch": 1}
    text: dict[str, Any] = {"grid": "text first", **one}
    cases = [
        *(Case(machine, half, depth, **mixed) for depth in (64, 96, 128)),
        *(Case(machine, torch.float32, depth, **mixed) for depth in (64, 128)),
        Case(machine, torch.float16, 128, **mixed),
        *(Case(machine, half, 128, grid, **one) for grid in GRIDS),
        *(Case(machine, half, 128, kind="mixed", rest=r, **text) for r in ("skip", "centroid")),
        *(Case(machine, half, 128, rest=r, **text) for r in ("centroid", "global")),
        *(Case(machine, half, 128, sizes=(n, n), **mixed, **one) for n in (16, 64, 128)),
    ]
    for case in cases[:: 9 if machine.dry else 1]:
        for data in ("random", "structured"):
            exact = (case.kind, case.rest) == ("exact", "skip")
            if data == "structured" and case.dtype != torch.float32 and not exact:
                continue  # sharp scores: rounding of the means alone is more than the limit
            this = replace(case, data=data)
            sizes = "x".join(map(str, case.sizes))
            name = f"plan: {case.kind}, rest {case.rest}, blocks {sizes}, {data}"
            yield check(name, this.shape, this.dtype, "engine", LIMITS[this.dtype],
                        partial(engine_error, this))  # fmt: skip


def forms(machine: Machine) -> Iterator[Unit]:
    """Each form with plain and shared tiles, with and without the share of the rest.

    In the engine against the oracle of plans, and alone against the oracle of its operands. The
    first of each form comes before all else.
    """
    half = torch.bfloat16
    cases = [
        Case(machine, half, 128),
        Case(machine, half, 128, rest="global"),
        Case(machine, half, 128, kind="mixed"),
        Case(machine, half, 64),
        Case(machine, half, 96, kind="mixed", rest="global"),
        Case(machine, torch.float16, 128, kind="mixed", rest="global"),
    ]
    for form in machine.forms:
        for n, case in enumerate(cases[: 1 if machine.dry else None]):
            what = f"{case.kind}, rest {case.rest}"
            acts: dict[str, Any] = {
                "form": partial(engine_error, case, form=form),
                "kernel": partial(kernel_error, case, form),
                "order": partial(engine_error, case, ordered=True, form=form),
            }
            for name, act in acts.items():
                limit = LIMITS[case.dtype]
                rank = FIRST if (n, name) == (0, "form") else 2
                yield check(f"{name}: {what}", case.shape, case.dtype, form, limit, act, rank=rank)


def int8(machine: Machine) -> Iterator[Unit]:
    """Keys with a common offset, which must cost nothing."""
    half = torch.bfloat16
    cases = [Case(machine, half, 128), Case(machine, half, 128, kind="mixed", rest="global"),
             Case(machine, half, 64)]  # fmt: skip
    for form in machine.forms:
        for n, case in enumerate(cases[: 1 if machine.dry else 3]):
            act = partial(engine_error, case, ordered=True, shift=2.0, form=form, qk="int8")
            name = f"int8: {case.kind}, rest {case.rest}"
            yield check(name, case.shape, case.dtype, f"{form}-int8", INT8_LIMIT, act,
                        rank=FIRST if n == 0 else 2)  # fmt: skip


def far_offsets(machine: Machine) -> Iterator[Unit]:
    """Tensors past 2^31 elements: two videos in one tensor [B, S, 3, H, D], and many heads."""
    for form in machine.forms:
        for name, shape, act in (("fused", FUSED, fused_error), ("heads", WIDE, wide_error)):
            shown = "tiny" if machine.dry else shape.name
            yield check(f"offsets past 2^31: {name}", shown, torch.bfloat16, form,
                        LIMITS[torch.bfloat16], partial(act, machine, form), seconds=20.0,
                        rank=3)  # fmt: skip


def fused_error(machine: Machine, form: str) -> Found:
    shape = Shape("tiny", TokenGrid(1, 5, 31), 2, 128) if machine.dry else FUSED
    stored = torch.empty(2, shape.grid.tokens, 3, shape.heads, shape.head_dim,
                         dtype=torch.bfloat16, device=machine.device)  # fmt: skip
    assert machine.dry or stored.numel() > 2**31
    stored.normal_()
    q, k, v = (x.transpose(1, 2) for x in stored.unbind(2))
    q_blocks, k_blocks = Blocks.cut(shape.grid, 128), Blocks.cut(shape.grid, 64)
    sizes = (2, shape.heads, len(q_blocks), len(k_blocks))
    drawn = torch.rand(sizes, device=machine.device) < 0.03
    plan = BlockPlan.from_levels(torch.where(drawn, 0, SKIP).to(torch.int8), q_blocks, k_blocks,
                                 (0,)).with_rest(k_blocks.levels, "global")  # fmt: skip
    return far_error((q, k, v), plan, form)


def wide_error(machine: Machine, form: str) -> Found:
    shape = Shape("tiny", TokenGrid(1, 5, 31), 3, 128) if machine.dry else WIDE
    q, k, v = random_qkv(shape, machine.device)
    assert machine.dry or q.numel() > 2**31
    plan = exact_plan(shape, 0.03, (128, 64), machine.device, coherent=True)
    return far_error((q, k, v), plan, form)


def far_error(qkv: QKV, plan: BlockPlan, form: str) -> Found:
    out, _ = triton_engine.execute(*qkv, plan, form=form)
    if not bool(out.isfinite().all()):
        raise Wrong("some of the output was not written")
    return sampled_error(*qkv, out, plan, blocks=2), density_of(plan)
