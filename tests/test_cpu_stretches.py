"""The CPU engine on plans with moments of rows and orders of heads, whose rows run in stretches."""

from collections.abc import Iterable
from itertools import accumulate

import pytest
import torch
from cpu_calls import (
    TOLERANCES,
    assert_matches,
    calm,  # noqa: F401 - a fixture
    cuts,
    level_map,
    tensors,
)
from plans import biased, ordered
from torch.profiler import ProfilerActivity, profile

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.kernels import reference
from vidsparse.kernels.cpu import call as cpu_call
from vidsparse.kernels.cpu import engine, fused
from vidsparse.kernels.cpu.routes import Route
from vidsparse.plan import SKIP, BlockPlan

FORMS = {
    "row": ("row",),
    "row-bias": ("row", biased),
    "orders": ("none", ordered),
    "all": ("row", biased, ordered),
}
ROUTES = {"products": Route(), "sdpa": Route(fused=True)}
every_route = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
every_form = pytest.mark.parametrize("form", FORMS)


def plan_of(
    form: str, grids: str = "text-first", blocks: tuple[int, int] = (16, 32), kind: str = "mixed"
) -> BlockPlan:
    q_blocks, k_blocks = cuts(grids, *blocks)
    plan = BlockPlan.from_levels(level_map(q_blocks, k_blocks, kind), q_blocks, k_blocks)
    first_order, *carried = FORMS[form]
    plan = plan.with_rest(k_blocks.levels, first_order)  # type: ignore[arg-type]
    for carry in carried:
        plan = carry(plan)
    return plan


def with_depths(dtypes: Iterable[torch.dtype]) -> pytest.MarkDecorator:
    """Each dtype and each head dim with every form; the other pairs of the two are slow."""
    pairs = [
        pytest.param(dtype, depth, marks=[pytest.mark.slow] * ((n + m) % 2))
        for n, dtype in enumerate(dtypes)
        for m, depth in enumerate((40, 128))
    ]
    return pytest.mark.parametrize(("dtype", "depth"), pairs, ids=str)


@every_form
@with_depths(TOLERANCES)
def test_dtypes(dtype: torch.dtype, depth: int, form: str) -> None:
    plan = plan_of(form)
    assert_matches(*tensors(plan, depth, dtype), plan)


@every_form
@with_depths(fused.DTYPES)
def test_dtypes_of_torchs_attention(dtype: torch.dtype, depth: int, form: str) -> None:
    """The LSE is as exact as the keys, of which centroids are rounded."""
    plan = plan_of(form)
    q, k, v = tensors(plan, depth, dtype)
    want, want_lse = reference.execute(q.double(), k.double(), v.double(), plan)
    out, lse = engine.execute(q, k, v, plan, route=ROUTES["sdpa"], return_lse=True)
    assert lse is not None and want_lse is not None
    assert (out.double() - want).norm() <= TOLERANCES[dtype][0] * want.norm()
    near = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=near)


@every_route
@every_form
@pytest.mark.parametrize("grids", ["1337", "cross", "one-block"])
def test_ragged_plans(monkeypatch: pytest.MonkeyPatch, grids: str, form: str, route: Route) -> None:
    """Also where rows run a part of their queries at a time, and widths are rounded."""
    plan = plan_of(form, grids, (64, 16), "exact")
    given = tensors(plan, 32)
    assert_matches(*given, plan, route=route)
    monkeypatch.setattr(cpu_call, "SCORE_ENTRIES", 20 * 300)
    monkeypatch.setattr(cpu_call, "EXACT_WIDTHS", 0)
    assert_matches(*given, plan, route=route)


@every_route
@every_form
def test_no_bit_depends_on_the_number_of_workers(form: str, route: Route) -> None:
    """Nor on where the jobs are cut, or on whether the LSE is wanted."""
    plan = plan_of(form, "1337", (16, 32))
    assert len(plan.q_blocks) > 2 * cpu_call.MIN_STRETCH
    q, k, v = tensors(plan, 64)
    out, lse = engine.execute(q, k, v, plan, workers=1, return_lse=True, route=route)
    assert lse is not None
    for workers in (2, 3):
        found = engine.execute(q, k, v, plan, workers=workers, return_lse=True, route=route)
        assert torch.equal(found[0], out) and torch.equal(found[1], lse)
    assert torch.equal(engine.execute(q, k, v, plan, workers=3, route=route)[0], out)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_jobs_of_rows_with_moments_are_whole_stretches(workers: int) -> None:
    """A product of fewer rows may round in another way."""
    plan = plan_of("row", "1337", (16, 32))
    q, k, v = tensors(plan, 64)
    call = cpu_call.Call(q, q, None, plan, torch.float32, torch.float32)
    jobs = list(call.jobs(k, v, workers))
    assert all(job.first % call.stretch == 0 for job in jobs)
    rows = sorted((job.head, row) for job in jobs for row in range(job.first, job.end))
    assert rows == [(head, row) for head in range(2) for row in range(len(plan.q_blocks))]
    assert workers == 1 or len(jobs) > 2


@every_route
@every_form
def test_memory_layout(form: str, route: Route) -> None:
    plan = plan_of(form, "1337")
    q, k, v = tensors(plan, 64)
    out, _ = engine.execute(q, k, v, plan, route=route)
    same, _ = engine.execute(q.contiguous(), k.contiguous(), v.contiguous(), plan, route=route)
    odd = torch.stack([q, k, v], -1).unbind(-1)
    strided, _ = engine.execute(*odd, plan, route=route)
    assert out.transpose(1, 2).is_contiguous() and same.is_contiguous()
    torch.testing.assert_close(same, out)
    torch.testing.assert_close(strided, out)


def test_orders_of_one_side_only() -> None:
    both = plan_of("all")
    for orders in ((both.order_q, None), (None, both.order_k)):
        plan = both.with_orders(*orders)
        assert_matches(*tensors(plan, 32), plan)


@every_route
def test_orders_move_numbers_and_change_none(route: Route) -> None:
    """Bit by bit what the plan without orders gives for tokens that stand in order already."""
    plan = plan_of("all")
    q, k, v = (x.contiguous() for x in tensors(plan, 64))
    assert plan.order_q is not None and plan.order_k is not None
    ids_q, ids_k = (x[..., None].expand(-1, -1, -1, 64) for x in (plan.order_q, plan.order_k))
    moved = q.gather(2, ids_q), k.gather(2, ids_k), v.gather(2, ids_k)
    plain, plain_lse = engine.execute(
        *moved, plan.with_orders(None, None), return_lse=True, route=route
    )
    out, lse = engine.execute(q, k, v, plan, return_lse=True, route=route)
    assert lse is not None and plain_lse is not None
    assert torch.equal(out.gather(2, ids_q), plain)
    assert torch.equal(lse.gather(2, plan.order_q), plain_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_route
@every_form
def test_poisoned_memory(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, form: str, route: Route
) -> None:
    """Nothing is read that was not written: fresh memory holds NaN."""
    plan = plan_of(form)
    q, k, v = tensors(plan, 40, dtype)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        out, lse = engine.execute(q, k, v, plan, return_lse=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert lse is not None and not out.isnan().any() and not lse.isnan().any()
    assert_matches(q, k, v, plan)


@every_route
@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float32, 0.5), (torch.bfloat16, 0.75)], ids=str
)
def test_extra_memory(dtype: torch.dtype, share: float, route: Route) -> None:
    """With four heads and 8,192 tokens, per thread and as a share of the size of k and v.

    The moments of all rows of a head, or of all its key blocks, would take an eighth of it in
    float32 and a quarter in bfloat16, and break the bound.
    """
    grid = TokenGrid(8, 32, 32)
    q_blocks, k_blocks = Blocks.cut(grid, 64), Blocks.cut(grid, 64)
    levels = torch.full((1, 4, len(q_blocks), len(k_blocks)), SKIP, dtype=torch.int8)
    levels[..., ::5] = 0
    plan = BlockPlan.from_levels(levels, q_blocks, k_blocks).with_rest(6, "row")
    plan = ordered(biased(plan))
    q, k, v = tensors(plan, 64, dtype)
    engine.execute(q, k, v, plan, route=route)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out, _ = engine.execute(q, k, v, plan, route=route)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = max(accumulate(size for _, size in changes)) - out.nbytes
    assert k.nbytes / 4 < peak <= share * (k.nbytes + v.nbytes)
