"""Correctness on a GPU, against float64: every form of the sparse forward, the kernels around it.

Every output buffer starts as NaN: what a kernel does not write is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import inf
from typing import Any

import torch
from gpu_cases import QKV, Shape, method, prepare, sampled_error
from gpu_check_stages import stages
from gpu_compare import GRIDS, LIMITS, compare, level_plan, tokens
from gpu_results import Check, Job, Machine
from torch import Tensor

from vidsparse.attention import attend
from vidsparse.kernels import reference, triton_engine
from vidsparse.plan import SKIP, BlockPlan, Blocks, TokenGrid

LSE_LIMIT = 1e-4
"""Absolute, of LSE and rest share; against `reference.execute` for plans of exact blocks alone, as
means are rounded to the dtype of the input."""

INT8_LIMIT = 2e-2
FAR = Shape("wan2.1-14b-720p x 2, fused QKV", TokenGrid(21, 45, 80), 40, 128)
"""Two of them in one tensor of queries, keys and values hold more than 2^31 elements."""


def jobs(machine: Machine) -> list[Job]:
    """The checks, the ones that everything else rests on first."""
    parts = [
        ("plans of every kind", 100.0, lambda: plans(machine)),
        ("every form", 100.0, lambda: forms(machine)),
        ("offsets past 2^31 elements", 40.0, lambda: far_offsets(machine)),
        ("stages", 60.0, lambda: stages(machine)),
        ("int8 QK", 40.0, lambda: int8(machine)),
    ]
    return [Job(f"check: {name}", time, act, "gpu_checks") for name, time, act in parts]


def error_of(qkv: QKV, plan: BlockPlan, order: Tensor | None = None, **how: Any) -> float:
    """Relative L2 of the output of the engine; infinite if an empty row or an LSE is wrong."""
    out, lse = triton_engine.execute(*qkv, plan, order=order, return_lse=True, **how)
    assert lse is not None
    if order is not None:
        *qkv, out, lse = (x[:, :, order] for x in (*qkv, out, lse))
    q, k, v = (x.double() for x in qkv)
    want, want_lse = reference.execute(q, k, v, plan)
    assert want_lse is not None
    empty = want_lse == -inf
    if not torch.equal(lse == -inf, empty) or bool(out[empty].any()):
        return inf
    exact = plan.listed == (0,) and plan.rest == SKIP and how.get("qk") != "int8"
    if exact and not bool(((lse - want_lse)[~empty].abs() <= LSE_LIMIT).all()):
        return inf
    return float((out.double() - want).norm() / want.norm())


def kernel_error(qkv: QKV, plan: BlockPlan, form: str) -> float:
    """Relative L2 of the output of one form on the rows of its key buffer.

    Infinite if an empty row, an LSE or a share of the rest is wrong.
    """
    given = prepare(*qkv, plan, form)
    keys, lists = given.keys, given.lists
    out, lse, rest = given.forward(), given.lse, given.rest
    packed = lists.entry, lists.bits, lists.count, lists.whole
    rows = reference.named_rows(*packed, given.shape.block_n, keys.k.shape[2])
    want, want_lse, want_rest = reference.sparse_forward(
        given.q, keys.k, keys.v, keys.bias, *rows, plan.q_blocks
    )
    empty = want_lse == -inf
    if not torch.equal(lse == -inf, empty) or bool(out[empty].any()):
        return inf
    pairs = [(lse[~empty], want_lse[~empty])] + [(rest, want_rest)] * (rest is not None)
    if not all(bool(((found - exact).abs() <= LSE_LIMIT).all()) for found, exact in pairs):
        return inf
    return float((out.double() - want).norm() / want.norm())


def plans(machine: Machine) -> Iterator[Check]:
    """`triton_engine.execute` over dtypes, head dims, grids, block sizes, levels and rests."""
    half, full = (torch.bfloat16, 128), ((128, 64), "mixed", "global")
    cases: list[tuple[Any, ...]] = [
        *((torch.bfloat16, depth, "ragged", *full, 2) for depth in (64, 96, 128)),
        *((torch.float32, depth, "ragged", *full, 2) for depth in (64, 128)),
        (torch.float16, 128, "ragged", *full, 2),
        *((*half, grid, (128, 64), "exact", "skip", 1) for grid in GRIDS),
        *((*half, "text first", (128, 64), "mixed", rest, 1) for rest in ("skip", "centroid")),
        *((*half, "text first", (128, 64), "exact", rest, 1) for rest in ("centroid", "global")),
        *((*half, "ragged", (n, n), "mixed", "global", 1) for n in (16, 64, 128)),
    ]
    step = 6 if machine.dry else 1
    for dtype, depth, grid, sizes, kind, rest, batch in cases[::step]:
        plan = level_plan(machine, grid, sizes, kind, rest, batch)
        for data in ("random", "structured"):
            exact = (kind, rest) == ("exact", "skip")
            if data == "structured" and dtype != torch.float32 and not exact:
                continue  # sharp scores: rounding of the means alone is more than the limit
            qkv = tokens(machine, plan, depth, dtype, data)
            name = f"plan: {kind}, rest {rest}, blocks {sizes[0]}x{sizes[1]}, {data}"
            shape = f"{grid}, B {batch}, D {depth}"
            act = partial(error_of, qkv, plan)
            yield compare(name, shape, dtype, "engine", LIMITS[dtype], act)


def forms(machine: Machine) -> Iterator[Check]:
    """Each form with plain and shared tiles, with and without the share of the rest.

    In the engine against the oracle of plans, and alone against the oracle of its operands.
    """
    cases: list[tuple[Any, ...]] = [
        (torch.bfloat16, 128, "exact", "skip"),
        (torch.bfloat16, 128, "exact", "global"),
        (torch.bfloat16, 128, "mixed", "skip"),
        (torch.bfloat16, 64, "exact", "skip"),
        (torch.bfloat16, 96, "mixed", "global"),
        (torch.float16, 128, "mixed", "global"),
    ]
    for form in machine.forms:
        for dtype, depth, kind, rest in cases[:: 3 if machine.dry else 1]:
            plan = level_plan(machine, "ragged", (128, 64), kind, rest, batch=2)
            qkv = tokens(machine, plan, depth, dtype)
            name = f"form: {kind}, rest {rest}"
            shape = f"ragged, B 2, D {depth}"
            act = partial(error_of, qkv, plan, form=form)
            yield compare(name, shape, dtype, form, LIMITS[dtype], act)
            act = partial(kernel_error, qkv, plan, form)
            yield compare(f"kernel: {kind}, rest {rest}", shape, dtype, form, LIMITS[dtype], act)
            order = torch.randperm(plan.q_blocks.tokens, device=machine.device)
            act = partial(error_of, qkv, plan, order, form=form)
            yield compare(f"order: {kind}, rest {rest}", shape, dtype, form, LIMITS[dtype], act)


def int8(machine: Machine) -> Iterator[Check]:
    """Keys with a common offset, which must cost nothing."""
    for form in machine.forms:
        for kind, rest in (("exact", "skip"), ("mixed", "global"))[: 1 if machine.dry else 2]:
            plan = level_plan(machine, "ragged", (128, 64), kind, rest)
            q, k, v = tokens(machine, plan, 128, torch.bfloat16)
            qkv = q, k + 2, v
            order = torch.randperm(plan.q_blocks.tokens, device=machine.device)
            act = partial(error_of, qkv, plan, order, form=form, qk="int8")
            name = f"int8: {kind}, rest {rest}"
            yield compare(name, "ragged, D 128", torch.bfloat16, form, INT8_LIMIT, act)


def far_offsets(machine: Machine) -> Iterator[Check]:
    """Two videos at once in one tensor [B, S, 3, H, D], whose end lies past 2^31 elements."""
    shape = Shape("tiny", TokenGrid(1, 5, 31), 2, 128) if machine.dry else FAR
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
    for form in machine.forms:

        def act(form: str = form) -> float:
            out, _ = triton_engine.execute(q, k, v, plan, form=form)
            written = bool(out.isfinite().all())
            return sampled_error(q, k, v, out, plan, blocks=2) if written else inf

        yield compare("offsets", shape.name, torch.bfloat16, form, LIMITS[torch.bfloat16], act)


def probe(machine: Machine) -> Iterator[str]:
    """A small call of everything per form; names those that answer.

    A form with a barrier bug hangs here. compute-sanitizer watches the same calls.
    """
    for form in machine.forms:
        plan = level_plan(machine, "ragged", (128, 64), "exact", "global")
        q, k, v = tokens(machine, plan, 128, torch.bfloat16)
        for qk in ("native", "int8"):
            triton_engine.execute(q, k, v, plan, form=form, qk=qk)
        rows = [x.transpose(1, 2) for x in (q, k, v)]
        config = method(0.3, kernel__form=form)
        attend(*rows, grid=GRIDS["ragged"], config=config)
        if not machine.dry:
            torch.cuda.synchronize()
        yield form
