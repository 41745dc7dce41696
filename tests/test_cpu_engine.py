"""The CPU engine against the reference in float64: every form of plan, dtype and promise."""

import threading
from collections.abc import Iterator
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vidsparse.kernels import cpu, cpu_call, cpu_matmul, cpu_step, cpu_threads, reference
from vidsparse.plan import SKIP, BlockPlan, Blocks, TokenGrid

GRIDS = {
    "1000": (TokenGrid(5, 10, 20),) * 2,
    "1337": (TokenGrid(1, 7, 191),) * 2,
    "text-first": (TokenGrid(3, 10, 21, 77, True),) * 2,
    "text-last": (TokenGrid(3, 10, 21, 77),) * 2,
    "cross": (TokenGrid(1, 3, 100), TokenGrid(1, 1, 641, 30)),
    "one-block": (TokenGrid(1, 1, 5),) * 2,
}
CUTS = [(grids, (128, 64)) for grids in GRIDS]
CUTS += [(grids, blocks) for grids in ("1337", "text-first") for blocks in ((64, 64), (32, 16))]
TOLERANCES = {  # output relative L2, LSE absolute
    torch.float32: (2e-6, 5e-6),
    torch.bfloat16: (4e-3, 5e-6),
    torch.float16: (1e-3, 5e-6),
    torch.float64: (1e-13, 1e-12),
}


def cuts(grids: str, block_q: int, block_k: int) -> tuple[Blocks, Blocks]:
    q_grid, k_grid = GRIDS[grids]
    return Blocks.cut(q_grid, block_q), Blocks.cut(k_grid, block_k)


def level_map(q_blocks: Blocks, k_blocks: Blocks, kind: str, heads: int = 2) -> Tensor:
    """Random levels, "mixed" over all or "exact" ones; with an empty and a full row."""
    levels = torch.randint(SKIP, k_blocks.levels + 1, (1, heads, len(q_blocks), len(k_blocks)))
    if kind == "exact":
        levels = torch.where(torch.rand(levels.shape) < 0.3, 0, SKIP)
    levels[0, 0, 0] = SKIP
    levels[0, -1, -1] = 0
    levels[0, 0, -1, -1] = 0  # the last block kept, here and
    levels[0, 0, -1, 0] = SKIP  # the first one not
    return levels.to(torch.int8)


def tensors(plan: BlockPlan, depth: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v [B, H, S, D] as views of [B, S, H, D] memory."""
    batch, heads = plan.starts.shape[:2]
    sizes = (plan.q_blocks.tokens, plan.k_blocks.tokens, plan.k_blocks.tokens)
    made = (torch.randn(batch, n, heads, depth) * 1.3 for n in sizes)
    return [x.to(dtype).transpose(1, 2) for x in made]


def assert_matches(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, **options: object) -> None:
    """Engine output and LSE equal the reference in float64 on the same numbers."""
    want, want_lse = reference.execute(q.double(), k.double(), v.double(), plan)
    out, lse = cpu.execute(q, k, v, plan, return_lse=True, **options)  # type: ignore[arg-type]
    assert lse is not None and want_lse is not None
    assert out.dtype == q.dtype and out.shape == q.shape
    tolerance, lse_tolerance = TOLERANCES[q.dtype]
    assert (out.double() - want).norm() <= tolerance * want.norm()
    empty = want_lse.isinf()
    assert torch.equal(lse.isinf(), empty)
    assert not out[empty].any()
    assert ((lse.double() - want_lse)[~empty].abs() <= lse_tolerance).all()


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    """The same numbers in every run, and one thread unless a test asks for more."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    assert_matches(*tensors(plan, 32), plan, matmul="native", workers=2)


@pytest.mark.parametrize("first_order", ["none", "global"])
@pytest.mark.parametrize("depth", [40, 64, 128])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dtypes(dtype: torch.dtype, depth: int, first_order: str) -> None:
    q_blocks, k_blocks = cuts("text-first", 128, 64)
    plan = BlockPlan.from_levels(level_map(q_blocks, k_blocks, "mixed"), q_blocks, k_blocks)
    plan = plan.with_rest(k_blocks.levels, first_order)  # type: ignore[arg-type]
    assert_matches(*tensors(plan, depth, dtype), plan)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_hypothesis_exact_in_float64(data: st.DataObject) -> None:
    """Random small grids, text, levels and rests are executed to the last digits."""
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
        plan = plan.with_rest(k_blocks.levels, data.draw(st.sampled_from(["none", "global"])))
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


def exact_plan(grids: str = "1000", rest: int = 6, density: float = 0.3) -> BlockPlan:
    q_blocks, k_blocks = cuts(grids, 128, 64)
    shape = (2, 3, len(q_blocks), len(k_blocks))
    levels = torch.where(torch.rand(shape) < density, 0, SKIP).to(torch.int8)
    return BlockPlan.from_levels(levels, q_blocks, k_blocks).with_rest(rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_density_1_is_dense_attention(dtype: torch.dtype) -> None:
    plan = exact_plan(density=1.1)
    q, k, v = tensors(plan, 64, dtype)
    out, _ = cpu.execute(q, k, v, plan)
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (out.double() - dense).norm() <= TOLERANCES[dtype][0] * dense.norm()


def test_few_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are too wide for the score buffer run in parts."""
    monkeypatch.setattr(cpu_call, "SCORE_ENTRIES", 40 * 300)
    plan = exact_plan("text-last")
    assert_matches(*tensors(plan, 64), plan, matmul="native")


@pytest.mark.parametrize("rest", [SKIP, 6])
def test_rounded_widths(monkeypatch: pytest.MonkeyPatch, rest: int) -> None:
    monkeypatch.setattr(cpu_call, "EXACT_WIDTHS", 0)
    plan = exact_plan("1337", rest)
    assert_matches(*tensors(plan, 64), plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extra_memory(dtype: torch.dtype) -> None:
    """With two heads, two threads and 8,192 tokens, at most twice the size of k and v."""
    grid = TokenGrid(8, 32, 32)
    q_blocks, k_blocks = Blocks.cut(grid, 128), Blocks.cut(grid, 64)
    levels = torch.full((1, 2, len(q_blocks), len(k_blocks)), SKIP, dtype=torch.int8)
    levels[..., ::5] = 0
    plan = BlockPlan.from_levels(levels, q_blocks, k_blocks).with_rest(6)
    q, k, v = tensors(plan, 64, dtype)
    cpu.execute(q, k, v, plan)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out, _ = cpu.execute(q, k, v, plan)  # one thread: half the memory of two
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = max(accumulate(size for _, size in changes)) - out.nbytes
    assert k.nbytes / 2 < peak <= k.nbytes + v.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_memory_layout(dtype: torch.dtype) -> None:
    """Contiguous and transposed inputs give the same numbers, each in its own layout."""
    plan = exact_plan("1337")
    q, k, v = tensors(plan, 64, dtype)
    out, _ = cpu.execute(q, k, v, plan)
    assert out.transpose(1, 2).is_contiguous()
    same, _ = cpu.execute(q.contiguous(), k.contiguous(), v.contiguous(), plan)
    assert same.is_contiguous()
    odd = torch.stack([q, k, v], -1).unbind(-1)
    strided, _ = cpu.execute(*odd, plan)
    torch.testing.assert_close(same, out)
    torch.testing.assert_close(strided, out)


def test_inputs_stay_as_they_are() -> None:
    plan = exact_plan()
    given_tensors = [x.contiguous() for x in tensors(plan, 64)]
    before = [x.clone() for x in given_tensors]
    cpu.execute(*given_tensors, plan)
    assert all(torch.equal(a, b) for a, b in zip(given_tensors, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rounded", [False, True])
def test_poisoned_memory(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rounded: bool
) -> None:
    """Nothing is read that was not written: fresh memory holds NaN."""
    monkeypatch.setattr(cpu_call, "EXACT_WIDTHS", 0 if rounded else 1000)
    q_blocks, k_blocks = cuts("text-first", 128, 64)
    plan = BlockPlan.from_levels(level_map(q_blocks, k_blocks, "mixed"), q_blocks, k_blocks)
    q, k, v = tensors(plan, 40, dtype)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        for rest, first_order in ((SKIP, "none"), (6, "global")):
            out, lse = cpu.execute(
                q, k, v, plan.with_rest(rest, first_order), return_lse=True, matmul="native"
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
    clean, _ = cpu.execute(q, k, v, plan)
    q = q.clone(memory_format=torch.preserve_format)
    q[0, 1, 200, 3] = bad
    out, _ = cpu.execute(q, k, v, plan)
    assert out[0, 1, 200].isnan().all()
    out[0, 1, 200] = clean[0, 1, 200]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("rounded", [False, True])
def test_bad_key_reaches_its_readers_only(monkeypatch: pytest.MonkeyPatch, rounded: bool) -> None:
    """A NaN in a skipped block does not come back through the reused workspace."""
    monkeypatch.setattr(cpu_call, "EXACT_WIDTHS", 0 if rounded else 1000)
    plan = exact_plan("1337", SKIP)
    q, k, v = tensors(plan, 64)
    k = k.clone(memory_format=torch.preserve_format)
    k[:, :, 650] = v[:, :, 650] = float("nan")
    out, _ = cpu.execute(q, k, v, plan)
    reads = plan.level_map()[:, :, plan.q_blocks.owner, 10] == 0
    assert torch.equal(out.isnan().any(-1), reads)


def test_workers_do_not_change_the_result() -> None:
    """Six heads on 1 to 4 threads (with 4, two heads are cut into rows): the same bits."""
    plan = exact_plan()
    q, k, v = tensors(plan, 64)
    want, want_lse = cpu.execute(q, k, v, plan, return_lse=True, workers=1)
    for workers in (2, 4):
        out, lse = cpu.execute(q, k, v, plan, return_lse=True, workers=workers)
        assert torch.equal(out, want) and torch.equal(lse, want_lse)  # type: ignore[arg-type]


def test_workers_are_single_threaded() -> None:
    """Also after their first operation, and whatever the caller has."""
    torch.set_num_threads(2)
    seen: list[int] = []

    def worker() -> object:
        torch.ones(4) @ torch.ones(4)
        return lambda _: seen.append(torch.get_num_threads())

    for workers in (3, 2, 1):  # a new pool each time
        cpu_threads.for_each(range(4), worker, workers)  # type: ignore[arg-type]
    assert seen == [1] * 12


def global_state() -> tuple[object, ...]:
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    flag = torch.backends.mkldnn.matmul.fp32_precision
    return torch.get_num_threads(), fresh[0], flag, torch.get_rng_state().tolist()


def test_global_state_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thread counts, oneDNN flag and random state are the caller's again, also with a new pool."""
    monkeypatch.setattr(cpu_matmul, "_probed", None)
    plan = exact_plan()
    q, k, v = tensors(plan, 64)
    torch.set_num_threads(2)
    before = global_state()
    for workers in (3, 2):
        cpu.execute(q, k, v, plan, workers=workers)
        assert global_state() == before


def test_overlapping_calls_restore_the_flag() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    first, second = cpu_matmul.onednn(True), cpu_matmul.onednn(True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    second.__exit__(None, None, None)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_native_never_touches_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run = cpu.Worker.run

    def spy(worker: cpu.Worker, job: cpu_call.Job) -> None:
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        run(worker, job)

    plan = exact_plan()
    q, k, v = tensors(plan, 64)
    monkeypatch.setattr(cpu_matmul, "_probed", cpu_matmul.Probe(2.0, 1e-7, 2.0))
    monkeypatch.setattr(cpu.Worker, "run", spy)
    before = torch.backends.mkldnn.matmul.fp32_precision
    cpu.execute(q, k, v, plan, matmul="native")
    assert set(seen) == {before}
    cpu.execute(q, k, v, plan)
    assert set(seen) == {before, "bf16"}


def test_rows_run_without_the_global_lock() -> None:
    """On every torch that is supported today; threads do not scale otherwise."""
    assert isinstance(cpu_step.compiled_rows(), torch.jit.ScriptFunction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_torchscript(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    q_blocks, k_blocks = cuts("text-first", 128, 64)
    plan = BlockPlan.from_levels(level_map(q_blocks, k_blocks, "mixed"), q_blocks, k_blocks)
    plan = plan.with_rest(k_blocks.levels, "global")
    q, k, v = tensors(plan, 64, dtype)
    compiled = cpu.execute(q, k, v, plan, return_lse=True)

    def removed(function: object) -> None:
        raise RuntimeError("no TorchScript")

    monkeypatch.setattr(torch.jit, "script", removed)
    cpu_step.compiled_rows.cache_clear()
    try:
        assert cpu_step.compiled_rows() is cpu_step.run_rows
        plain = cpu.execute(q, k, v, plan, return_lse=True)
    finally:
        cpu_step.compiled_rows.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(compiled, plain, strict=True))


@pytest.mark.parametrize("bf16_gain", [0.5, 2.0])
def test_bf16_on_cpus_with_and_without(monkeypatch: pytest.MonkeyPatch, bf16_gain: float) -> None:
    monkeypatch.setattr(cpu_matmul, "_probed", cpu_matmul.Probe(0.0, 0.0, bf16_gain))
    plan = exact_plan()
    assert_matches(*tensors(plan, 64, torch.bfloat16), plan)
    assert cpu.engine_info()["bf16_values"] == ("bfloat16" if bf16_gain > 1 else "float32")


def test_probe_takes_only_exact_and_faster_routes() -> None:
    assert cpu_matmul.Probe(1.8, 3e-7, 1.0).onednn
    assert not cpu_matmul.Probe(1.8, 3e-3, 1.0).onednn
    assert not cpu_matmul.Probe(1.0, 3e-7, 1.0).onednn
    found = cpu_matmul.probe()
    assert found.onednn_gain >= 0 and found.bf16_gain > 0


def test_grad_modes() -> None:
    plan = exact_plan()
    q, k, v = tensors(plan, 64)
    want, _ = cpu.execute(q, k, v, plan, workers=2)
    with torch.inference_mode():
        out, _ = cpu.execute(q * 1, k, v, plan, workers=2)
        assert out.is_inference()
    assert torch.equal(out, want)
    q.requires_grad_(True)
    with torch.no_grad():
        out, _ = cpu.execute(q, k, v, plan, workers=2)
    assert torch.equal(out, want) and not out.requires_grad
    with pytest.raises(ValueError, match=r"inference only.*no_grad"):
        cpu.execute(q, k, v, plan)


def test_error_in_a_worker_is_raised_once_and_leaves_order() -> None:
    plan = exact_plan()
    q, k, v = tensors(plan, 64)
    flag = torch.backends.mkldnn.matmul.fp32_precision
    broken = BlockPlan.from_levels(plan.levels, plan.q_blocks, plan.k_blocks)
    broken.__dict__["index"] = plan.index + 99
    with pytest.raises((IndexError, RuntimeError)):
        cpu.execute(q, k, v, broken, workers=2)
    assert torch.backends.mkldnn.matmul.fp32_precision == flag
    assert_matches(q, k, v, plan, workers=2)


def test_refusals() -> None:
    plan = exact_plan()
    q, k, v = tensors(plan, 64)
    with pytest.raises(ValueError, match=r"'block'.*impl='reference'"):
        cpu.execute(q, k, v, plan.with_rest(6, "block"))
    with pytest.raises(ValueError, match=r"'global'.*rest=-1"):
        cpu.execute(q, k, v, plan.with_rest(SKIP, "global"))
    with pytest.raises(ValueError, match="rest=3"):
        cpu.execute(q, k, v, plan.with_rest(3))
    with pytest.raises(ValueError, match="1000 queries and 1000 keys"):
        cpu.execute(q[:, :, 1:], k, v, plan)
    with pytest.raises(ValueError, match=r"expected \(1, 3, 8, 16\)"):
        cpu.execute(q[:1], k[:1], v[:1], plan)
    with pytest.raises(ValueError, match="bfloat16"):
        cpu.execute(q, k, v.bfloat16(), plan)
    with pytest.raises(ValueError, match="int64"):
        cpu.execute(q.long(), k.long(), v.long(), plan)
    with pytest.raises(ValueError, match="auto, native"):
        cpu.execute(q, k, v, plan, matmul="fast")
    with pytest.raises(ValueError, match="workers=0"):
        cpu.execute(q, k, v, plan, workers=0)
