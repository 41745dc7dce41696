"""What a run keeps from step to step: blocks, residuals, tails; by formula, per stream, dropped."""

from collections.abc import Callable
from typing import Any

import masked
import pytest
import tiny
import torch
from torch import Tensor

import vidsparse
from vidsparse.attention import attend
from vidsparse.config import SparseConfig
from vidsparse.memory import Memory
from vidsparse.plan import SKIP, StepContext
from vidsparse.result import AttentionResult
from vidsparse.selector import topk

GRID = masked.RAGGED
STEPS, DENSE = 8, 2


def config(*changes: str, preset: str = "topp") -> SparseConfig:
    small = "schedule.min_tokens=0", "kernel.crossover=1", "kernel.block_q=32", "kernel.block_k=16"
    dense = f"schedule.dense_steps={DENSE}", "schedule.dense_layers=[]", "schedule.density=0.3"
    return SparseConfig.load(preset, [*small, *dense, *changes])


def drifting(step: int, seed: int = 0) -> list[Tensor]:
    """q, k, v that move a little with every step."""
    base, other = masked.random(GRID, seed=seed), masked.random(GRID, seed=seed + 100)
    pace = 0.05 if seed < 50 else 0.4
    return [x + pace * step * y for x, y in zip(base, other, strict=True)]


def run(
    method: SparseConfig, memory: Memory | None = None, impl: str = "reference", **streams: int
) -> dict[str, list[AttentionResult]]:
    """All steps of some streams, in turn; stream -> results. streams: their seeds, from 50 on of
    what moves fast."""
    memory = Memory() if memory is None else memory
    found: dict[str, list[AttentionResult]] = {name: [] for name in streams}
    for step in range(STEPS):
        for name, seed in streams.items():
            context = StepContext(step, STEPS, 0, 1, context_name=name)
            recall = memory.of(step, context.stream)
            found[name].append(
                masked.call(method, drifting(step, seed), GRID, impl, context, recall)
            )
    return found


def dense_of(step: int, seed: int = 0) -> Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in drifting(step, seed))
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("impl", masked.EXECUTORS)
@pytest.mark.parametrize("preset", ["topp", "balanced", "sta", "jenga"])
def test_a_residual_is_what_the_last_dense_step_had_beyond_a_sparse_one(
    preset: str, impl: str
) -> None:
    changes = ("layout.refresh=100",) if preset == "balanced" else ()
    if preset == "sta":
        changes = "layout.tile=[2,4,2]", "pattern.tile=[2,4,2]"
    kept = run(config("keep.residual=true", *changes, preset=preset), impl=impl, one=0)["one"]
    plain_memory = Memory()
    plain = run(config(*changes, preset=preset), plain_memory, impl, one=0)["one"]
    base = StepContext(DENSE - 1, STEPS, 0, 1)
    alone = config("schedule.dense_steps=0", *changes, preset=preset)
    recall = Memory().of(0)
    if preset == "balanced":  # the orders of the step in which the residual was made
        lacked = masked.call(alone, drifting(DENSE - 1), GRID, impl, base, recall)
        plain = [
            masked.call(alone, drifting(n), GRID, impl, StepContext(n, STEPS, 0, 1), recall)
            for n in range(STEPS)
        ]
    else:
        lacked = masked.call(alone, drifting(DENSE - 1), GRID, impl, base)
    residual = dense_of(DENSE - 1) - lacked.out.double()
    assert float(residual.norm()) > 0.01
    for step in range(STEPS):
        if step < DENSE:
            assert kept[step].reason == "warmup-step" and "residual" not in kept[0].seconds
            continue
        wanted = plain[step].out.double() + residual
        torch.testing.assert_close(kept[step].out.double(), wanted, rtol=0, atol=5e-5)
        assert kept[step].density == plain[step].density and "residual" in kept[step].seconds
    assert "residual" in kept[DENSE - 1].seconds, "a sparse call more, and the report tells"
    near = [(x.out.double() - dense_of(DENSE)).norm() for x in (kept[DENSE], plain[DENSE])]
    assert near[0] < 0.5 * near[1]


@pytest.mark.parametrize("impl", masked.EXECUTORS)
def test_a_tail_is_merged_with_the_blocks_that_were_listed_then(impl: str) -> None:
    method = config("keep.tail=3", "compensation.name=none", "selector.name=topk")
    found = run(method, impl=impl, one=0)["one"]
    for first in range(DENSE, STEPS, 3):
        fresh = found[first]
        torch.testing.assert_close(fresh.out.double(), dense_of(first), rtol=0, atol=5e-5)
        assert fresh.density == (1.0, 1.0) and fresh.reason is None, "the report tells what it cost"
        assert fresh.plan is not None
        listed = fresh.plan.levels != SKIP
        q, k, v = parts(first)
        for step in range(first + 1, min(first + 3, STEPS)):
            later = found[step]
            assert later.plan is fresh.plan and later.density[0] < 0.7
            now = parts(step)
            score = torch.where(tokens(listed), now[0] @ now[1].mT, q @ k.mT) / 4
            weight = score.softmax(-1)
            out = weight.masked_fill(~tokens(listed), 0) @ now[2]
            out = (out + weight.masked_fill(tokens(listed), 0) @ v).transpose(1, 2)
            wanted = out[:, masked.token_order(GRID, method.layout)[1]]
            torch.testing.assert_close(later.out.double(), wanted, rtol=0, atol=5e-5)


def parts(step: int) -> list[Tensor]:
    order, _ = masked.token_order(GRID, config().layout)
    return [x.double()[:, order].transpose(1, 2) for x in drifting(step)]


def tokens(blocks: Tensor) -> Tensor:
    q_blocks, k_blocks = masked.cuts(GRID, config())
    return blocks[..., q_blocks.owner, :][..., k_blocks.owner]


def test_frozen_inputs_with_a_tail_are_dense_at_any_age_and_lse_too() -> None:
    method = config("keep.tail=9", "compensation.name=none", "layout.name=content",
                    "selector.name=topk")  # fmt: skip
    memory, qkv = Memory(), [x.double() for x in drifting(0)]
    score = torch.stack([qkv[0][:, :, h] @ qkv[1][:, :, h].mT for h in range(2)], 1) / 4
    for step in range(DENSE, DENSE + 4):
        how: Any = {"context": StepContext(step, STEPS), "recall": memory.of(step)}
        result = attend(*qkv, grid=GRID, config=method, impl="reference", return_lse=True, **how)
        torch.testing.assert_close(result.out, dense_of(0), rtol=0, atol=1e-9)
        torch.testing.assert_close(result.lse, score.logsumexp(-1), rtol=0, atol=1e-9)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    stock: Callable[..., Tensor] = topk.select
    monkeypatch.setattr(topk, "select", lambda *given: made.append(1) or stock(*given))
    return made


@pytest.mark.parametrize("layout", ["tile", "content"])
def test_blocks_are_chosen_every_few_steps_of_a_stream(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = counted(monkeypatch)
    changes = "selector.name=topk", f"layout.name={layout}", "compensation.name=tilt"
    changes = *changes, "compensation.bound=1000", "schedule.density=0.6"
    method = config("keep.plans=4", *changes)
    if layout == "content":
        method = method.override("layout.refresh=3")
    found = run(method, cond=50, uncond=51)
    chosen = [DENSE, DENSE + 4] if layout == "tile" else [DENSE, DENSE + 3]
    assert len(made) == 2 * len(chosen), "blocks of an order last no longer than it"
    for results in found.values():
        maps = [r.plan.levels for r in results if r.plan is not None]
        for n, one in enumerate(maps[1:], start=DENSE + 1):
            assert torch.equal(one, maps[n - 1 - DENSE]) == (n not in chosen)
    plans = [found[name][-1].plan for name in ("cond", "uncond")]
    assert plans[0] is not None and plans[1] is not None
    assert not torch.equal(plans[0].levels, plans[1].levels)
    spread = [r.plan.rest_bias for r in found["cond"] if r.plan is not None]
    assert not torch.equal(spread[0], spread[1]), "the rest is drafted anew"


@pytest.mark.parametrize("keep", ["plans=3", "residual=true", "tail=3"])
def test_runs_repeat_bit_for_bit_and_streams_do_not_mix(keep: str) -> None:
    method = config(f"keep.{keep}", "compensation.name=none", "selector.name=topk")
    memory = Memory()
    first = run(method, memory, "cpu", cond=0, uncond=1)
    again = run(method, memory, "cpu", cond=0, uncond=1)  # not cleared: a loop begun anew
    memory.clear()
    assert not memory.entries and not memory.reserved
    alone = run(method, memory, "cpu", uncond=1)
    for step in range(STEPS):
        assert torch.equal(first["cond"][step].out, again["cond"][step].out)
        assert torch.equal(first["uncond"][step].out, again["uncond"][step].out)
        assert torch.equal(first["uncond"][step].out, alone["uncond"][step].out)


@pytest.mark.parametrize("keep", ["plans=3", "residual=true", "tail=3"])
def test_without_a_run_or_for_another_form_nothing_is_found(keep: str) -> None:
    changes = "compensation.name=none", "selector.name=topk"
    method, plain = config(f"keep.{keep}", *changes), config(*changes)
    context, memory = StepContext(DENSE, STEPS), Memory()
    want = attend(*drifting(DENSE), grid=GRID, config=plain, context=context)
    got = attend(*drifting(DENSE), grid=GRID, config=method, context=context)
    assert torch.equal(got.out, want.out), "no run, nothing kept"
    for step in range(DENSE + 1):
        how: Any = {"context": StepContext(step, STEPS), "recall": memory.of(step)}
        attend(*drifting(step), grid=GRID, config=method, **how)
    one = [x[:1] for x in drifting(DENSE + 1)]
    how = {"context": StepContext(DENSE + 1, STEPS)}
    fresh = attend(*one, grid=GRID, config=method, recall=memory.of(DENSE + 1), **how)
    want = attend(*one, grid=GRID, config=method, recall=Memory().of(DENSE + 1), **how)
    assert torch.equal(fresh.out, want.out), "another batch"


def test_what_is_kept_is_counted_and_refused_in_the_first_step() -> None:
    method = config("keep.residual=true")
    size = drifting(0)[0].numel() * 4
    memory = Memory()
    for step in range(DENSE + 1):
        how: Any = {"context": StepContext(step, STEPS), "recall": memory.of(step, "one")}
        attend(*drifting(step), grid=GRID, config=method, **how)
    assert memory.entries["residual", ("one",)][2].nbytes == size == sum(memory.reserved.values())
    for budget, layers, said in ((size * 3 - 1, 3, True), (size * 3, 3, False)):
        tight = method.override(f"keep.gigabytes={budget / 1e9}")
        how = {"context": StepContext(0, STEPS, 0, layers), "recall": Memory().of(0)}
        if said:
            with pytest.raises(
                ValueError, match=rf"keep\.residual takes {size:,} bytes in each of 3"
            ):
                attend(*drifting(0), grid=GRID, config=tight, **how)
        else:
            attend(*drifting(0), grid=GRID, config=tight, **how)
    memory, tight = Memory(), method.override(f"keep.gigabytes={2 * size / 1e9}")
    for branch in ("cond", "uncond"):
        how = {"context": StepContext(0, STEPS), "recall": memory.of(0, branch)}
        attend(*drifting(0), grid=GRID, config=tight, **how)
    with pytest.raises(ValueError, match=r"keep\.gigabytes"):
        attend(*drifting(0), grid=GRID, config=tight, **{**how, "recall": memory.of(0, "third")})
    tail = config("keep.tail=2", "compensation.name=none", "keep.gigabytes=0.000001")
    with pytest.raises(ValueError, match=r"keep\.tail takes"):
        run(tail, one=0)


def test_layers_and_steps_that_stay_dense_keep_no_residual() -> None:
    method, memory = config("keep.residual=true", "schedule.dense_layers=[1]"), Memory()
    for step in range(DENSE):
        for layer in range(2):
            context = StepContext(step, STEPS, layer, 2)
            recall = memory.of(step, layer)
            attend(*drifting(step), grid=GRID, config=method, context=context, recall=recall)
    assert {whose for what, whose in memory.entries if what == "residual"} == {(0,)}
    assert memory.entries["residual", (0,)][0] == DENSE - 1


def test_refusals() -> None:
    for change, said in (
        (["keep.plans=0"], "keep.plans=0: allowed is an integer >= 1"),
        (["keep.tail=0"], "keep.tail=0: allowed is an integer >= 1"),
        (["keep.gigabytes=0"], "keep.gigabytes=0.0: allowed is a number > 0"),
        (["keep.tail=2"], "both stand for the blocks that are not listed"),
        (["keep.tail=2", "keep.residual=true"], "keep.tail=2 with keep.residual=True"),
        (["keep.tail=2", "keep.plans=2"], "keep.tail=2 with keep.plans=2"),
        (["keep.residual=true", "schedule.dense_steps=0"], "there is nothing to begin from"),
        (["keep.residual=true", "schedule.name=constant"], "there is nothing to begin from"),
        (["keep.plan=2"], "keep key='plan': allowed is plans, residual, tail, gigabytes"),
    ):
        with pytest.raises(ValueError, match=said):
            SparseConfig.load("tiles", change)


def test_a_run_of_a_pipeline_keeps_and_drops() -> None:
    """The whole way; nothing is left when the run has ended."""
    pipe, call = tiny.build("wan")
    outs = []
    settings = ["schedule.dense_steps=1", "schedule.min_tokens=0", "kernel.block_q=16",
                "kernel.block_k=16", "kernel.impl=reference"]  # fmt: skip
    for keep in (["keep.residual=true"], ["keep.residual=true"], []):
        vidsparse.accelerate_pipeline(pipe, "tiles", [*settings, *keep])
        outs.append(tiny.run(pipe, call))
        report = vidsparse.run_report(pipe)
        assert not report.memory.entries and not report.memory.reserved
        assert ("residual" in report.seconds) == bool(keep)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
