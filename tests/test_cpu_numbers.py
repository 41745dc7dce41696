"""The CPU engine against the reference in float64: dtypes, memory, numbers that are not finite."""

from itertools import accumulate

import pytest
import torch
from cpu_calls import (
    TOLERANCES,
    assert_matches,
    calm,  # noqa: F401 - a fixture
    cuts,
    exact_plan,
    level_map,
    tensors,
)
from torch.profiler import ProfilerActivity, profile

from vidsparse.blocks import Blocks
from vidsparse.grid import TokenGrid
from vidsparse.kernels.cpu import call, engine, routes
from vidsparse.plan import SKIP, BlockPlan


@pytest.mark.parametrize("first_order", ["none", "global"])
@pytest.mark.parametrize("depth", [40, 64, 128])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dtypes(dtype: torch.dtype, depth: int, first_order: str) -> None:
    q_blocks, k_blocks = cuts("text-first", 128, 64)
    plan = BlockPlan.from_levels(level_map(q_blocks, k_blocks, "mixed"), q_blocks, k_blocks)
    plan = plan.with_rest(k_blocks.levels, first_order)  # type: ignore[arg-type]
    assert_matches(*tensors(plan, depth, dtype), plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_memory_layout(dtype: torch.dtype) -> None:
    """Contiguous and transposed inputs give the same numbers, each in its own layout."""
    plan = exact_plan("1337")
    q, k, v = tensors(plan, 64, dtype)
    out, _ = engine.execute(q, k, v, plan)
    assert out.transpose(1, 2).is_contiguous()
    same, _ = engine.execute(q.contiguous(), k.contiguous(), v.contiguous(), plan)
    assert same.is_contiguous()
    odd = torch.stack([q, k, v], -1).unbind(-1)
    strided, _ = engine.execute(*odd, plan)
    torch.testing.assert_close(same, out)
    torch.testing.assert_close(strided, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rounded", [False, True])
def test_poisoned_memory(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rounded: bool
) -> None:
    """Nothing is read that was not written: fresh memory holds NaN."""
    monkeypatch.setattr(call, "EXACT_WIDTHS", 0 if rounded else 1000)
    q_blocks, k_blocks = cuts("text-first", 128, 64)
    plan = BlockPlan.from_levels(level_map(q_blocks, k_blocks, "mixed"), q_blocks, k_blocks)
    q, k, v = tensors(plan, 40, dtype)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        for rest, first_order in ((SKIP, "none"), (6, "global")):
            out, lse = engine.execute(
                q, k, v, plan.with_rest(rest, first_order), return_lse=True, route=routes.Route()
            )
            assert lse is not None
            assert not out.isnan().any() and not lse.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_query_stays_alone(dtype: torch.dtype, bad: float) -> None:
    plan = exact_plan("1337").with_rest(6, "global")
    q, k, v = tensors(plan, 64, dtype)
    clean, _ = engine.execute(q, k, v, plan)
    q = q.clone(memory_format=torch.preserve_format)
    q[0, 1, 200, 3] = bad
    out, _ = engine.execute(q, k, v, plan)
    assert out[0, 1, 200].isnan().all()
    out[0, 1, 200] = clean[0, 1, 200]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("rounded", [False, True])
def test_bad_key_reaches_its_readers_only(monkeypatch: pytest.MonkeyPatch, rounded: bool) -> None:
    """A NaN in a skipped block does not come back through the reused workspace."""
    monkeypatch.setattr(call, "EXACT_WIDTHS", 0 if rounded else 1000)
    plan = exact_plan("1337", SKIP)
    q, k, v = tensors(plan, 64)
    k = k.clone(memory_format=torch.preserve_format)
    k[:, :, 650] = v[:, :, 650] = float("nan")
    out, _ = engine.execute(q, k, v, plan)
    reads = plan.level_map()[:, :, plan.q_blocks.owner, 10] == 0
    assert torch.equal(out.isnan().any(-1), reads)


@pytest.mark.parametrize("bf16_gain", [0.5, 2.0])
def test_bf16_on_cpus_with_and_without(monkeypatch: pytest.MonkeyPatch, bf16_gain: float) -> None:
    monkeypatch.setattr(routes, "_probed", routes.Probe(0.0, 0.0, bf16_gain))
    plan = exact_plan()
    assert_matches(*tensors(plan, 64, torch.bfloat16), plan)
    assert engine.engine_info()["bf16_values"] == ("bfloat16" if bf16_gain > 1 else "float32")


@pytest.mark.parametrize(
    ("dtype", "bf16_gain", "share", "route"),
    [
        (torch.float32, 2.0, 1.0, None),
        (torch.bfloat16, 2.0, 1.0, None),
        (torch.bfloat16, 0.5, 1.01, None),
        (torch.float32, 2.0, 1.0, routes.Route(fused=True)),
        (torch.bfloat16, 2.0, 1.0, routes.Route(fused=True)),
    ],
    ids=str,
)
def test_extra_memory(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    bf16_gain: float,
    share: float,
    route: routes.Route | None,
) -> None:
    """With two heads, two threads and 8,192 tokens, at most twice the size of k and v.

    A quarter of the queries takes as much as all of them: rows are computed one after another.
    A hundredth more where a CPU without fast products in bf16 holds values in fp32.
    """
    monkeypatch.setattr(routes, "_probed", routes.Probe(0.0, 0.0, bf16_gain))
    grid = TokenGrid(8, 32, 32)
    q_blocks, k_blocks = Blocks.cut(TokenGrid(2, 32, 32), 128), Blocks.cut(grid, 64)
    levels = torch.full((1, 2, len(q_blocks), len(k_blocks)), SKIP, dtype=torch.int8)
    levels[..., ::5] = 0
    plan = BlockPlan.from_levels(levels, q_blocks, k_blocks).with_rest(6)
    q, k, v = tensors(plan, 64, dtype)
    engine.execute(q, k, v, plan, route=route)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out, _ = engine.execute(q, k, v, plan, route=route)  # one thread: half the memory of two
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = max(accumulate(size for _, size in changes)) - out.nbytes
    assert k.nbytes / 2 < peak <= share * (k.nbytes + v.nbytes)
