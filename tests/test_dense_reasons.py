"""Where sparse ends and dense begins: each bound on both of its sides, and which reason wins."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidsparse import SparseConfig, StepContext, TokenGrid
from vidsparse.attention import attend
from vidsparse.blocks import Blocks
from vidsparse.decision import choose, decide, requested, too_dense, tried
from vidsparse.kernels.cpu import executor as cpu
from vidsparse.kernels.executor import Form
from vidsparse.kernels.gpu import executor as gpu
from vidsparse.kernels.gpu import support
from vidsparse.plan import SKIP, BlockPlan
from vidsparse.reasons import REASONS
from vidsparse.schedule.constant import Params as Constant

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GRID = TokenGrid(2, 8, 8)


def config(selector="topk", mode=None, **schedule):
    schedule = {"name": "constant", "density": 0.3, "min_tokens": 0, **schedule}
    method = {"name": selector, **({"mode": mode} if mode else {})}
    return SparseConfig.from_dict({"selector": method, "schedule": schedule})


PLAIN = config()


def executor(method, device, impl="auto"):
    """Who runs sparse calls of a method."""
    return choose(Form(method, GRID, device), impl).executor


def reason(method, grid=GRID, device=CPU, **call):
    return decide(method, grid, device=device, **call).reason


@pytest.fixture
def engine(monkeypatch):
    """The Triton engine runs on every device."""
    monkeypatch.setattr(support, "refusal", lambda device: None)
    monkeypatch.setattr(support, "capability", lambda device: (9, 0))


@given(
    frames=st.integers(1, 6),
    side=st.integers(1, 9),
    text=st.integers(0, 30),
    more=st.integers(-2, 2),
)
@settings(max_examples=60, deadline=None)
def test_min_tokens_are_enough_and_one_token_less_is_not(frames, side, text, more):
    grid = TokenGrid(frames, side, side, text)
    schedule = Constant(density=0.3, min_tokens=max(0, frames * side * side + text + more))
    method = replace(PLAIN, schedule=schedule)
    assert reason(method, grid) == ("too-short" if more > 0 else None)


def test_min_tokens_holds_for_the_default_too():
    default = SparseConfig.load("tiles", ["schedule.dense_steps=0"])
    least = default.schedule.min_tokens
    assert least == 1024
    assert reason(default, TokenGrid(1, 1, least)) is None
    assert reason(default, TokenGrid(1, 1, least - 1)) == "too-short"


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_density_at_the_crossover_is_sparse_and_the_next_one_is_not(device, engine):
    bound = {"cpu": cpu.CROSSOVER_DENSITY, "cuda": gpu.CROSSOVER_DENSITY}[device.type]
    above, below = math.nextafter(bound, 2), math.nextafter(bound, 0)
    for density, wanted in ((below, None), (bound, None), (above, "not-faster"), (0.01, None)):
        found = decide(config(density=density), GRID, device=device)
        assert (found.density, found.reason) == (1.0 if wanted else density, wanted)
        # a method that decides by content does so at its plan, and a user's word goes first
        assert reason(config("topp", density=density), device=device) is None
    forced = "cpu" if device.type == "cpu" else "triton"
    assert reason(config(density=above), device=device, impl=forced) is None
    assert reason(config(density=1.0), device=device, impl=forced) == "user"


@pytest.mark.parametrize(
    ("selector", "mode", "spends"),
    [
        ("topk", None, True),
        ("threshold", None, True),
        ("pyramid", "quota", True),
        ("pyramid", "mass", False),
        ("topp", None, False),
    ],
)
def test_a_method_that_spends_its_budget_is_judged_before_it_plans(selector, mode, spends):
    method = config(selector, mode, density=0.99)
    assert method.selector.spends_budget == spends
    assert method.selector.levels == ((0, 3) if selector == "pyramid" else (0,))
    assert reason(method) == ("not-faster" if spends else None)


@pytest.mark.parametrize("nk", [1, 5, 10])
def test_a_plan_is_too_dense_above_the_crossover(nk):
    blocks = Blocks.cut(TokenGrid(1, 1, 16 * nk), 16)
    for kept in range(1, nk + 1):
        levels = torch.full((1, 1, nk, nk), SKIP, dtype=torch.int8)
        levels[..., :kept] = 0
        plan = BlockPlan.from_levels(levels, blocks, blocks)
        assert too_dense(plan, config("topp"), 0.6) == (kept / nk > 0.6), kept
        assert not too_dense(plan, config("topk"), 0.6), "its density was decided on before"


def test_a_plan_is_judged_by_the_mean_of_its_heads():
    blocks = Blocks.cut(TokenGrid(1, 1, 64), 16)
    levels = torch.full((1, 2, 4, 4), SKIP, dtype=torch.int8)
    levels[:, 0], levels[:, 1, :, 0] = 0, 0  # 1 and 1/4: 0.625
    plan = BlockPlan.from_levels(levels, blocks, blocks)
    assert too_dense(plan, config("topp"), 0.6) == (0.6 < 0.625)
    levels[:, 0, :, 3] = SKIP  # 3/4 and 1/4: 0.5
    plan = BlockPlan.from_levels(levels, blocks, blocks)
    assert too_dense(plan, config("topp"), 0.6) == (0.6 < 0.5)


def test_what_the_engine_of_a_gpu_takes(engine):
    for dim, wanted in ((1, None), (64, None), (128, None), (129, "unsupported-head-dim")):
        assert reason(config(), device=CUDA, dtype=torch.bfloat16, head_dim=dim) == wanted
        assert reason(config(), device=CPU, dtype=torch.bfloat16, head_dim=dim) is None
    for dtype in (torch.float32, torch.bfloat16, torch.float16, None):
        assert reason(config(), device=CUDA, dtype=dtype, head_dim=None) is None
    assert reason(config(), device=CUDA, dtype=torch.float64, head_dim=64) == "no-kernel"
    assert reason(config(), device=CPU, dtype=torch.float64, head_dim=64) is None


def test_the_oldest_gpu_that_is_new_enough(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, runs in (((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        support.refusal.cache_clear()
        assert (support.refusal(CUDA) is None) == runs == support.runs(CUDA), capability
        assert reason(config(), device=CUDA) == (None if runs else "no-kernel")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    support.refusal.cache_clear()
    assert "no CUDA device" in support.refusal(CUDA) and "no CUDA device" in support.refusal(
        torch.device("mps")
    )
    support.refusal.cache_clear()


def test_the_amd_gpus_for_which_the_kernels_are_compiled(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    for name, runs in (("gfx942:sramecc+:xnack-", True), ("gfx90a:sramecc+", False)):
        facts = SimpleNamespace(gcnArchName=name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d, f=facts: f)
        support.refusal.cache_clear()
        assert support.capability(CUDA) == support.AMD
        why = support.refusal(CUDA)
        assert why is None if runs else why == "AMD gfx90a: the kernels compile for gfx942 alone"
        assert reason(config(), device=CUDA) == (None if runs else "no-kernel")
    support.refusal.cache_clear()
    monkeypatch.setattr(support, "refusal", lambda device: None)
    for form, runs in (("auto", True), ("pointer", True), ("tma", False)):
        method = SparseConfig.load("tiles", [f"kernel.form={form}", "kernel.block_q=128"])
        refused = gpu.EXECUTOR.refuses(Form(method, GRID, CUDA, torch.bfloat16, 128))
        assert refused is None if runs else "an AMD GPU: form" in refused.why


def test_the_first_reason_of_the_list_wins(monkeypatch):
    """The schedule's word, then the length, then what the device can do, then what it gains."""
    monkeypatch.setattr(support, "refusal", lambda device: "none here")
    warm = {"name": "warmup", "dense_steps": 1, "dense_layers": [1], "density": 0.99}
    first, later = StepContext(0, 9, 1, 3), StepContext(4, 9, 1, 3)
    sparse = StepContext(4, 9, 2, 3)

    def at(context, min_tokens, device):
        found = decide(config(**warm, min_tokens=min_tokens), GRID, context, device=device)
        assert found.density == 1.0, "a dense call costs all of it"
        return found.reason

    assert at(first, 10**6, CUDA) == "warmup-step"
    assert at(later, 10**6, CUDA) == "dense-layer"
    assert at(sparse, 10**6, CUDA) == "too-short"
    assert at(sparse, 0, CUDA) == "no-kernel"
    assert at(sparse, 0, CPU) == "not-faster"
    assert {"warmup-step", "dense-layer", "too-short", "no-kernel", "not-faster"} <= set(REASONS)


def test_who_executes(monkeypatch, engine):
    auto, native = config(), "kernel.qk=native"
    assert (executor(auto, CPU), executor(auto, CUDA)) == ("cpu", "triton")
    for name in ("reference", "cpu"):
        assert executor(auto, CPU, name) == name
        assert requested(auto, name) == name
        chosen = auto.override(f"kernel.impl={name}")
        assert executor(chosen, CPU) == requested(chosen, "auto") == name
        assert requested(chosen, "triton") == "triton", "the call's word goes before the config's"
    assert executor(auto, CUDA, "reference") == "reference"
    with pytest.raises(ValueError, match=r"impl 'cpu' on cuda: .*use impl auto"):
        executor(auto, CUDA, "cpu")
    eight = auto.override("kernel.qk=int8")
    assert executor(eight, CUDA) == "triton" and executor(auto.override(native), CPU) == "cpu"
    for name in ("auto", "cpu", "reference"):
        with pytest.raises(ValueError, match=r"kernel\.qk='int8'"):
            executor(eight, CPU, name)
    blockwise = auto.override("compensation.name=taylor", "compensation.scope=block")
    assert executor(blockwise, CPU, "reference") == "reference"
    for device, name in ((CPU, "cpu"), (CUDA, "triton")):
        with pytest.raises(ValueError, match=rf"scope='block': impl '{name}' .*impl='reference'"):
            executor(blockwise, device)
    monkeypatch.setattr(support, "refusal", lambda device: "out of order")
    with pytest.raises(ValueError, match=r"impl 'triton' on cuda: out of order; use impl auto"):
        executor(auto, CUDA, "triton")
    with pytest.raises(ValueError, match="impl='fast': allowed is auto, cpu, reference, triton"):
        requested(auto, "fast")


def test_an_engine_that_is_asked_for_refuses_a_dtype_that_it_cannot_compute(engine):
    """Where nobody asked for it, such a call is dense ("no-kernel")."""
    pytest.importorskip("triton")
    call = {"device": CUDA, "impl": "triton", "head_dim": 64}
    assert reason(PLAIN, dtype=torch.float32, **call) is None
    with pytest.raises(ValueError, match=r"torch\.float64: the Triton engine computes in float32"):
        reason(PLAIN, dtype=torch.float64, **call)


@pytest.mark.parametrize(
    ("selector", "mode", "timed"),
    [
        ("topk", None, "topk"),
        ("threshold", None, "threshold"),
        ("pyramid", "quota", "pyramid"),
        ("pyramid", "mass", "topk"),
        ("topp", None, "topk"),
    ],
)
def test_what_is_timed_in_place_of_a_call(selector, mode, timed):
    """The method itself at the density asked for; top-k where the content decides the density."""
    method = config(selector, mode, min_tokens=4096).override("kernel.block_k=128")
    trial = tried(method, "cpu", 256, 0.6)
    assert trial.selector.name == timed
    assert (trial.selector == method.selector) == (timed == selector)
    assert (trial.kernel.block_q, trial.kernel.block_k, trial.kernel.impl) == (256, 128, "cpu")
    found = decide(trial, TokenGrid(1, 16, 64), StepContext(0, 9), device=CPU)
    assert (found.density, found.reason) == (0.6, None), "in every step, however short"


def test_an_engine_that_is_asked_for_never_goes_dense_for_speed():
    q = k = v = torch.zeros(1, GRID.tokens, 1, 16)
    everything = {"name": "topp", "p": 1.0}
    schedule = {"name": "constant", "density": 0.99, "min_tokens": 0}
    blocks = {"block_q": 16, "block_k": 16}
    parts = {"selector": everything, "schedule": schedule, "kernel": blocks}
    method = SparseConfig.from_dict(parts)
    assert attend(q, k, v, grid=GRID, config=method).reason == "not-faster"
    for impl in ("cpu", "reference"):
        assert attend(q, k, v, grid=GRID, config=method, impl=impl).reason is None
