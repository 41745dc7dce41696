"""The CPU engine against the reference in float64: every form of plan."""

import pytest
import torch
import torch.nn.functional as F
from cpu_calls import (
    CUTS,
    TOLERANCES,
    assert_matches,
    calm,  # noqa: F401 - a fixture
    cuts,
    exact_plan,
    level_map,
    tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import biased, ordered

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.kernels.cpu import call as cpu_call
from vidsparse.kernels.cpu import engine, routes, step
from vidsparse.plan import SKIP, BlockPlan


@pytest.mark.parametrize(
    ("kind", "rest"),
    [("exact", "skip"), ("exact", "centroid"), ("mixed", "skip"), ("mixed", "global")],
)
@pytest.mark.parametrize(("grids", "blocks"), CUTS, ids=str)
def test_any_plan(grids: str, blocks: tuple[int, int], kind: str, rest: str) -> None:
    q_blocks, k_blocks = cuts(grids, *blocks)
    plan = BlockPlan.from_levels(level_map(q_blocks, k_blocks, kind), q_blocks, k_blocks)
    if rest != "skip":
        plan = plan.with_rest(k_blocks.levels, "global" if rest == "global" else "none")
    assert_matches(*tensors(plan, 32), plan, route=routes.Route(), workers=2)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_hypothesis_exact_in_float64(data: st.DataObject) -> None:
    """Random small grids, text, levels, rests and orders are executed to the last digits."""
    torch.manual_seed(data.draw(st.integers(0, 999)))
    side = st.integers(1, 6)
    grid = TokenGrid(
        data.draw(side), data.draw(side), data.draw(side), data.draw(st.integers(0, 40)),
        data.draw(st.booleans()),
    )  # fmt: skip
    q_blocks = Blocks.cut(grid, data.draw(st.sampled_from([16, 32, 64])))
    k_blocks = Blocks.cut(grid, data.draw(st.sampled_from([1, 2, 16, 32])))
    levels = torch.randint(SKIP, k_blocks.levels + 1, (1, 2, len(q_blocks), len(k_blocks)))
    plan = BlockPlan.from_levels(levels.to(torch.int8), q_blocks, k_blocks)
    if data.draw(st.booleans()):
        orders = st.sampled_from(["none", "global", "row"])
        plan = plan.with_rest(k_blocks.levels, data.draw(orders))
        plan = biased(plan) if data.draw(st.booleans()) else plan
    plan = ordered(plan) if data.draw(st.booleans()) else plan
    assert_matches(*tensors(plan, 8, torch.float64), plan)


def test_few_different_widths() -> None:
    """Hundreds of widths become a few dozen, at most 7 % wider from 256 on."""
    plan = exact_plan()
    q = tensors(plan, 64)[0]
    call = cpu_call.Call(q, q, None, plan, torch.float32, torch.float32)
    call.exact = False
    fitted = {width: call.fit(width) for width in range(256, 16384)}
    assert len(set(fitted.values())) <= 6 * 16 + 1
    assert all(width <= fit <= 1.07 * width for width, fit in fitted.items())


def test_few_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are too wide for the score buffer run in parts."""
    monkeypatch.setattr(cpu_call, "SCORE_ENTRIES", 40 * 300)
    plan = exact_plan("text-last")
    assert_matches(*tensors(plan, 64), plan, route=routes.Route())


@pytest.mark.parametrize("rest", [SKIP, 6])
def test_rounded_widths(monkeypatch: pytest.MonkeyPatch, rest: int) -> None:
    monkeypatch.setattr(cpu_call, "EXACT_WIDTHS", 0)
    plan = exact_plan("1337", rest)
    assert_matches(*tensors(plan, 64), plan)


def test_rows_run_without_the_global_lock() -> None:
    """On every torch that is supported today; threads do not scale otherwise."""
    assert all(
        isinstance(step.compiled(rows), torch.jit.ScriptFunction)
        for rows in (step.run_rows, step.attend_rows)
    )


@pytest.mark.parametrize("route", [routes.Route(), routes.Route(fused=True)], ids=["mm", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_torchscript(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, route: routes.Route
) -> None:
    q_blocks, k_blocks = cuts("text-first", 128, 64)
    plan = BlockPlan.from_levels(level_map(q_blocks, k_blocks, "mixed"), q_blocks, k_blocks)
    plan = plan.with_rest(k_blocks.levels, "global")
    q, k, v = tensors(plan, 64, dtype)
    compiled = engine.execute(q, k, v, plan, return_lse=True, route=route)

    def removed(function: object) -> None:
        raise RuntimeError("no TorchScript")

    monkeypatch.setattr(torch.jit, "script", removed)
    step.compiled.cache_clear()
    try:
        assert step.compiled(step.run_rows) is step.run_rows
        plain = engine.execute(q, k, v, plan, return_lse=True, route=route)
    finally:
        step.compiled.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_density_1_is_dense_attention(dtype: torch.dtype) -> None:
    plan = exact_plan(density=1.1)
    q, k, v = tensors(plan, 64, dtype)
    out, _ = engine.execute(q, k, v, plan)
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (out.double() - dense).norm() <= TOLERANCES[dtype][0] * dense.norm()
