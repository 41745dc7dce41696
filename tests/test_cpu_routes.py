"""Routes of the CPU engine: torch's attention on gathered keys is right, and taken where faster."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cpu_calls import CUTS, TOLERANCES, calm, cuts, exact_plan, level_map, tensors  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse import SparseConfig, TokenGrid, registry, sparse_attention
from vidsparse.attention import attend, decision_for
from vidsparse.kernels import reference
from vidsparse.kernels.cpu import contest, crossover, engine, fused, routes, store
from vidsparse.kernels.cpu.contest import BLOCKS, Contest
from vidsparse.kernels.cpu.routes import Probe, Route
from vidsparse.kernels.executor import Form
from vidsparse.plan import SKIP, BlockPlan

SDPA = Route(fused=True)
CPU = torch.device("cpu")
LSE = {torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Absolute; of bf16 and fp16 the centroids are rounded."""


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which no contest has been held, and no route is asked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(contest.VARIABLE, raising=False)
    monkeypatch.setattr(routes, "_probed", Probe(0.0, 0.0, 0.5))
    monkeypatch.setattr(store, "_records", {})
    monkeypatch.setattr(contest, "_known", {})


def held(gains: tuple[float, float], error: float, speed: float = 1.0) -> store.Figures:
    """Of a contest: gains over products by size of blocks, error, time at 64 / at 128."""
    found = {}
    for block, gain, ms in zip(BLOCKS, gains, (speed, 1.0), strict=True):
        found |= {f"ms_{block}": ms, f"products_{block}": gain * ms, f"error_{block}": error}
    return found


# right -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rest"),
    [("exact", "skip"), ("exact", "none"), ("exact", "global"), ("mixed", "none"),
     ("mixed", "global")],
)  # fmt: skip
@pytest.mark.parametrize("dtype", fused.DTYPES, ids=str)
@pytest.mark.parametrize(("grids", "blocks"), CUTS, ids=str)
def test_any_plan(
    grids: str, blocks: tuple[int, int], dtype: torch.dtype, kind: str, rest: str
) -> None:
    """In fresh memory that holds NaN; what nobody lists has a zero output and LSE -inf."""
    q_blocks, k_blocks = cuts(grids, *blocks)
    plan = BlockPlan.from_levels(level_map(q_blocks, k_blocks, kind), q_blocks, k_blocks)
    if rest != "skip":
        plan = plan.with_rest(k_blocks.levels, rest)  # type: ignore[arg-type]
    q, k, v = tensors(plan, 40, dtype)
    want, want_lse = reference.execute(q.double(), k.double(), v.double(), plan)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        out, lse = engine.execute(q, k, v, plan, return_lse=True, workers=2, route=SDPA)
    finally:
        torch.use_deterministic_algorithms(False)
    assert lse is not None and want_lse is not None
    assert out.dtype == dtype and out.stride() == q.stride()
    assert (out.double() - want).norm() <= TOLERANCES[dtype][0] * want.norm()
    empty = want_lse.isinf()
    assert torch.equal(lse.isinf(), empty) and not out[empty].any()
    assert ((lse.double() - want_lse)[~empty].abs() <= LSE[dtype]).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_query_stays_alone(bad: float) -> None:
    plan = exact_plan("1337").with_rest(6, "global")
    q, k, v = tensors(plan, 64)
    clean, _ = engine.execute(q, k, v, plan, route=SDPA)
    q = q.clone(memory_format=torch.preserve_format)
    q[0, 1, 200, 3] = bad
    out, _ = engine.execute(q, k, v, plan, route=SDPA)
    assert out[0, 1, 200].isnan().all()
    out[0, 1, 200] = clean[0, 1, 200]
    assert torch.equal(out, clean)


def test_a_bad_key_reaches_its_readers_only() -> None:
    plan = exact_plan("1337", SKIP)
    q, k, v = tensors(plan, 64)
    k = k.clone(memory_format=torch.preserve_format)
    k[:, :, 650] = v[:, :, 650] = math.nan
    out, _ = engine.execute(q, k, v, plan, route=SDPA)
    reads = plan.level_map()[:, :, plan.q_blocks.owner, 10] == 0
    assert torch.equal(out.isnan().any(-1), reads)


# taken -------------------------------------------------------------------------------------------


@given(
    gains=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)),
    error=st.floats(0, 1e-2),
    speed=st.floats(0.5, 2),
    dtype=st.sampled_from(fused.DTYPES),
)
@settings(max_examples=200, deadline=None)
def test_it_is_taken_where_it_is_faster_and_exact(
    gains: tuple[float, float], error: float, speed: float, dtype: torch.dtype
) -> None:
    figures = held(gains, error, speed)
    by_name = ({b: figures[f"{name}_{b}"] for b in BLOCKS} for name in ("ms", "products", "error"))
    found = Contest(*by_name, contest.MAX_ERROR[dtype])
    limit = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 1e-3}[dtype]
    if abs(max(gains) - 1.1) > 1e-9:
        assert (found.refusal is None) == (error <= limit and max(gains) > 1.1)
    if abs(speed - 1.15) > 1e-9:
        assert found.block == (128 if speed > 1.15 else 64)


def form(tokens: int = 2048, dtype: torch.dtype = torch.bfloat16, **kernel: object) -> Form:
    config = SparseConfig.from_dict({"kernel": kernel, "schedule": {"name": "constant"}})
    return Form(config, TokenGrid(8, 16, tokens // 128), CPU, dtype, 64, 2, trial=print)


def test_the_contest_of_a_machine_is_held_once_and_kept(
    unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def measure(dtype: torch.dtype, depth: int, products: Route) -> store.Figures:
        made.append((dtype, depth, products.name))
        return held((1.5, 2.0), 1e-6, 1.3)

    monkeypatch.setattr(contest, "measure", measure)
    for depth in (1, 40, 64, 65, 128, 129, 256, 300):
        assert contest.choose(torch.float32, depth).name == "sdpa"
    assert made == [(torch.float32, depth, "native") for depth in (64, 128, 256, 300)]
    monkeypatch.setattr(store, "_records", {})
    monkeypatch.setattr(contest, "_known", {})  # another process of this machine
    assert contest.choose(torch.float32, 64).name == "sdpa" and len(made) == 4
    assert contest.choose(torch.float64, 64).name == "native" and len(made) == 4
    executor = registry.executor("cpu")
    assert executor.query_block(form()) == 128 == executor.query_block(form(16_384))
    assert executor.query_block(form(block_q=32)) == 32
    said = executor.route(form())
    assert "1.50x at blocks of 64 and 2.00x at blocks of 128 as fast as products" in said


def test_it_is_what_a_call_runs(unmeasured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decided once, in the choice of the result, the same bits as when it is asked for."""
    monkeypatch.setattr(contest, "measure", lambda *_: held((1.5, 2.0), 1e-6, 1.3))
    q, k, v = (torch.randn(1, 2048, 2, 64) for _ in range(3))
    grid, schedule = TokenGrid(8, 16, 16), {"name": "constant", "density": 0.3}

    def call(**kernel: object) -> torch.Tensor:
        config = SparseConfig.from_dict({"schedule": schedule, "kernel": kernel})
        found = attend(q, k, v, grid=grid, config=config)
        assert found.reason is None and found.choice.executor == "cpu"
        assert ("gathered keys" in found.choice.route) == (not kernel.get("cpu_route"))
        return found.out

    auto = call(crossover=1.0)
    assert torch.equal(auto, call(cpu_route="sdpa", block_q=128, crossover=1.0))
    native = call(cpu_route="native", block_q=128, crossover=1.0)
    assert not torch.equal(auto, native) and (auto - native).abs().max() <= 1e-5
    monkeypatch.setenv(contest.VARIABLE, "native")
    pinned = SparseConfig.from_dict({"schedule": schedule, "kernel": {"crossover": 1.0}})
    decision = decision_for(q, grid=grid, config=pinned)
    assert (decision.choice.route, decision.block_q) == ("route native, asked for", 64)


def test_a_route_that_is_asked_for_is_run_or_refused(
    unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest, "measure", lambda *_: pytest.fail("asked for"))
    x = torch.randn(1, 256, 1, 16)

    def run(route: str, dtype: torch.dtype = torch.float32, *more: str) -> torch.Tensor:
        changes = [f"kernel.cpu_route={route}", "schedule.min_tokens=0", "kernel.impl=cpu", *more]
        config = SparseConfig.load("tiles", ["schedule.name=constant", *changes])
        q = x.to(dtype)
        return sparse_attention(q, q, q, grid=TokenGrid(1, 16, 16), config=config)

    for route in ("native", "sdpa"):
        assert run(route).isfinite().all()
    assert run("mixed", torch.bfloat16).isfinite().all()
    with pytest.raises(ValueError, match=r"cpu_route='mixed': for bfloat16 alone.*=native"):
        run("mixed")
    with pytest.raises(ValueError, match=r"cpu_route='sdpa': not for torch.float64; use .*native"):
        run("sdpa", torch.float64)
    with pytest.raises(ValueError, match=r"cpu_route='onednn': .*needed 1.2x; use cpu_route=nat"):
        run("onednn")
    monkeypatch.setenv(contest.VARIABLE, "mkl")
    with pytest.raises(ValueError, match=r"VIDSPARSE_CPU_ROUTE='mkl': allowed is auto, native"):
        run("auto")
    monkeypatch.setenv(contest.VARIABLE, "sdpa")
    with pytest.raises(ValueError, match=r"^VIDSPARSE_CPU_ROUTE='sdpa': not for torch.float64"):
        run("auto", torch.float64)
    assert run("native").isfinite().all(), "the config's word goes first"


def test_no_flag_is_set_for_products_that_take_none() -> None:
    """What nobody has found exact here, as in float64, is never switched on."""
    assert contest.choose(torch.float64, 64, "onednn") == Route()
    assert contest.choose(torch.float32, 64, "onednn") == Route(onednn=True)


@pytest.mark.parametrize("route", ["native", "sdpa"])
def test_the_crossover_is_that_of_the_route_that_runs(
    unmeasured: None, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    """A route that the environment pins has figures of its own."""
    monkeypatch.setenv(contest.VARIABLE, route)
    asked: list[str] = []

    def density(kind: crossover.Kind, tokens: int, trial: object) -> float:
        asked.append(kind.method)
        return 0.5

    monkeypatch.setattr(crossover, "density", density)
    assert registry.executor("cpu").crossover(form(block_q=64)) == 0.5
    assert [f'"route": "{route}"' in method for method in asked] == [True]


def test_a_torch_without_the_operator(unmeasured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "OPERATOR", "_no_such_operator")
    assert contest.choose(torch.float32, 64).name == "native"
    assert "there is no such kernel" in contest.described(torch.float32, 64)


def test_a_kernel_that_gives_no_numbers_is_not_taken(
    unmeasured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = engine.execute

    def broken(*args: object, route: Route, **how: object) -> object:
        out, lse = stock(*args, route=route, **how)  # type: ignore[arg-type]
        return (out * math.nan if route.fused else out), lse

    monkeypatch.setattr(engine, "execute", broken)
    assert contest.choose(torch.float32, 64).name == "native"
    assert "not finite" in contest.described(torch.float32, 64)
    assert not list((store.folder() or Path()).glob("cpu-route*")), "held for this process alone"


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", fused.DTYPES, ids=str)
def test_the_contest_for_real(dtype: torch.dtype, one_thread: None) -> None:
    figures = contest.measure(dtype, 64, Route())
    assert set(figures) == set(contest.FIGURES)
    assert all(0 < figures[f"error_{b}"] <= contest.MAX_ERROR[dtype] for b in BLOCKS)
    assert all(figures[f"{name}_{b}"] > 0 for b in BLOCKS for name in ("ms", "products"))
