"""One self-attention call by itself: what is cut out of it, what is stock, what is noted."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import HookRegistry
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from torch import Tensor, nn

from vidsparse.config import SparseConfig
from vidsparse.grid import TokenGrid
from vidsparse.pipelines import call as module
from vidsparse.pipelines.call import Call, Link
from vidsparse.pipelines.families.wan import ADAPTER
from vidsparse.pipelines.forward import Forward, RealRows
from vidsparse.pipelines.report import RunReport
from vidsparse.plan import StepContext

HEADS, WORDS = 3, 5
FIRST = TokenGrid(2, 3, 4, text_tokens=WORDS, before=2, text_first=True)
LAST = replace(FIRST, text_first=False)
WHOLE = SparseConfig.from_dict(
    {
        "layout": {"name": "tile", "tile": [2, 2, 2]},
        "selector": {"name": "topk", "min_blocks": 3},
        "compensation": {"name": "none"},
        "schedule": {"name": "constant", "density": 0.4, "min_tokens": 0},
        "kernel": {"block_q": 16, "block_k": 64, "impl": "reference"},
    }
)
"""The sparse path, which reads everything: one key block for each part of the sequence."""
PART = nn.Identity()


def made(grid: TokenGrid, config: SparseConfig = WHOLE, part: Any = PART, **link: Any) -> Call:
    here = weakref.ref(part)
    tied = Link(Forward(), 0, config, here, here, **{"adapter": ADAPTER, **link})
    context = StepContext(1, 2, 0, 1, "cond", "transformer")
    return Call(tied, RunReport("custom", config), grid, context, stock)


def stock(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stands in for the stock call: known by what it gives, padding included."""
    return q + 2 * k + 3 * v


def tensors(grid: TokenGrid, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, grid.tokens, HEADS, 16, generator=generator).unbind()
    return q, k, v


def without_padding(grid: TokenGrid, kept: list[list[int]], *qkv: Tensor) -> Tensor:
    """In float64: a row reads those of its sample that are no padding; rows of padding are 0."""
    q, k, v = (x.transpose(1, 2).double() for x in qkv)
    start = 0 if grid.text_first else grid.other_tokens
    real = torch.ones(len(kept), grid.tokens, dtype=torch.bool)
    real[:, start : start + WORDS] = False
    for sample, words in enumerate(kept):
        real[sample, [start + n for n in words]] = True
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
    return out.transpose(1, 2) * real[:, :, None, None]


def first(*counts: int) -> tuple[RealRows, ...]:
    return tuple(RealRows(count, None, WORDS) for count in counts)


def these(*rows: int) -> RealRows:
    return RealRows(len(rows), torch.tensor(rows), WORDS)


MASK = torch.ones(1)
PADDED: dict[str, tuple[tuple[RealRows, ...], list[list[int]], int]] = {
    "one sample": (first(2), [[0, 1]], 1),
    "alike": (first(3, 3), [[0, 1, 2]] * 2, 1),
    "unlike": (first(3, 1, 4), [[0, 1, 2], [0], [0, 1, 2, 3]], 3),
    "one whole": (first(5, 2), [[0, 1, 2, 3, 4], [0, 1]], 2),
    "no words": (first(0, 0), [[], []], 1),
    "as many elsewhere": ((these(0, 2), these(1, 4)), [[0, 2], [1, 4]], 2),
    "as many, one elsewhere": ((first(2)[0], these(3, 4)), [[0, 1], [3, 4]], 2),
    "one elsewhere, as many": ((these(3, 4), first(2)[0]), [[3, 4], [0, 1]], 2),
    "all whole": (first(5, 5), [[0, 1, 2, 3, 4]] * 2, 1),
    "all whole, by name": ((these(*range(5)), these(*range(5))), [[0, 1, 2, 3, 4]] * 2, 1),
}
"""Real rows, the same as lists, and how many calls they take."""


@pytest.mark.parametrize("grid", [FIRST, LAST], ids=["text first", "text last"])
@pytest.mark.parametrize("case", PADDED)
def test_padding_is_not_read_and_its_rows_are_zero(case: str, grid: TokenGrid) -> None:
    real, kept, calls = PADDED[case]
    seen: list[Any] = []
    call, qkv = made(grid, observers=[seen.append]), tensors(grid, len(real))
    out = call.run(*qkv, MASK, real)
    assert torch.allclose(out.double(), without_padding(grid, kept, *qkv), atol=1e-5)
    assert [c.reason for c in call.report.calls] == [None] * calls
    rows = [len(words) for words in kept][:calls]
    assert [c.grid for c in seen] == [replace(grid, text_tokens=n) for n in rows]
    assert all(c.q.shape[1] == c.k.shape[1] == c.v.shape[1] == c.grid.tokens for c in seen)
    assert sum(c.q.shape[0] for c in seen) == len(real)


MASKED: dict[str, tuple[RealRows, ...] | None] = {
    "not known": None,
    "of another batch": first(2),
    "of twice the batch": first(2, 2, 2, 2),
    "one of another text": (first(2)[0], RealRows(2, None, WORDS + 1)),
    "more than there are": (RealRows(WORDS + 1), first(2)[0]),
}


@pytest.mark.parametrize("case", MASKED)
def test_a_mask_that_nobody_can_read_is_left_to_the_stock_call(case: str) -> None:
    seen: list[Any] = []
    call, qkv = made(LAST, observers=[seen.append]), tensors(LAST, 2)
    assert torch.equal(call.run(*qkv, MASK, MASKED[case]), stock(*qkv))
    (noted,) = call.report.calls
    assert (noted.reason, noted.density) == ("masked", (1.0,) * HEADS)
    (shown,) = seen
    assert (shown.context, shown.grid, shown.result.reason) == (call.context, LAST, "masked")
    assert all(a is b for a, b in zip((shown.q, shown.k, shown.v), qkv, strict=True))


@pytest.mark.parametrize("real", [None, first(2, 2)], ids=["not known", "known"])
def test_without_a_mask_all_rows_are_real(real: tuple[RealRows, ...] | None) -> None:
    call, qkv = made(FIRST), tensors(FIRST, 2)
    wanted = without_padding(FIRST, [[0, 1, 2, 3, 4]] * 2, *qkv)
    assert torch.allclose(call.run(*qkv, None, real).double(), wanted, atol=1e-5)
    assert [c.reason for c in call.report.calls] == [None]


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        ({"name": "constant", "density": 1.0}, "user"),
        ({"name": "warmup", "density": 0.4, "dense_steps": 2, "min_tokens": 0}, "warmup-step"),
        ({"name": "constant", "density": 0.4, "min_tokens": 32}, "too-short"),
    ],
    ids=["user", "step", "short"],
)
def test_a_dense_call_keeps_its_mask_and_all_rows(schedule: Any, reason: str) -> None:
    """Of 31 tokens, in step 1 of 2."""
    config = SparseConfig.from_dict({"schedule": schedule})
    call, qkv = made(LAST, config), tensors(LAST, 2)
    assert torch.equal(call.run(*qkv, MASK, first(1, 2)), stock(*qkv))
    assert [c.reason for c in call.report.calls] == [reason]


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_a_skipped_layer_is_stock(mask: Tensor | None) -> None:
    part = nn.Identity()
    registry = HookRegistry.check_if_exists_or_initialize(part)
    registry.register_hook(AttentionProcessorSkipHook(None, skip_attention_scores=True), "skip")
    call, qkv = made(LAST, part=part), tensors(LAST, 2)
    assert torch.equal(call.run(*qkv, mask, first(1, 2)), stock(*qkv))
    assert [c.reason for c in call.report.calls] == ["layer-skip"]


@pytest.mark.parametrize("hoisted", [True, False])
@pytest.mark.parametrize("real", [None, first(1, 2)], ids=["whole", "padded"])
def test_tokens_are_permuted_in_a_call_only_if_they_were_not_before(
    real: tuple[RealRows, ...] | None, hoisted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decision is about the same call as is then made."""
    decided: list[bool] = []
    decide = module.decision_for

    def decision_for(q: Tensor, **how: Any) -> Any:
        decided.append(how["hoisted"])
        return decide(q, **how)

    monkeypatch.setattr(module, "decision_for", decision_for)
    adapter = ADAPTER if hoisted else replace(ADAPTER, exit=None)
    call, qkv = made(LAST, adapter=adapter), tensors(LAST, 2)
    call.run(*qkv, None if real is None else MASK, real)
    for noted in call.report.calls:
        assert ("permute" in noted.seconds) != hoisted
    assert decided == ([] if real is None else [hoisted])


@pytest.mark.parametrize("real", [None, first(1, 2)], ids=["whole", "padded"])
def test_numbers_that_are_not_finite_are_noted(real: tuple[RealRows, ...] | None) -> None:
    call, (q, k, v) = made(LAST), tensors(LAST, 2)
    k[1, 0, 0, 0] = torch.inf
    with pytest.warns(RuntimeWarning, match="k of attention at step 1, layer 0 of transformer"):
        call.run(q, k, v, None if real is None else MASK, real)
    assert [found.inputs for found in call.report.non_finite] == [("k",)]


def test_an_observer_may_leave_while_it_is_told() -> None:
    """The report knows of a call first; every observer of then hears of it."""
    heard: list[tuple[str, int]] = []
    outs: list[Tensor] = []
    observers: list[Any] = []

    def once(seen: Any) -> None:
        heard.append(("once", len(call.report.calls)))
        observers.remove(once)

    def always(seen: Any) -> None:
        heard.append(("always", len(call.report.calls)))
        outs.append(seen.result.out)

    observers += [once, always]
    call, qkv = made(LAST, observers=observers), tensors(LAST, 1)
    assert [call.run(*qkv, None, None) is outs[n] for n in range(2)] == [True, True]
    assert heard == [("once", 1), ("always", 1), ("always", 2)]
