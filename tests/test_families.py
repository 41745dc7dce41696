"""Every family, the same proofs: against the stock transformer, and with each entry left out."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor
from zoo import Case, Subject

import vidsparse
from vidsparse import TokenGrid
from vidsparse.accelerate import observing
from vidsparse.pipelines.forward import Forward
from vidsparse.pipelines.hoist import Hoist
from vidsparse.pipelines.observation import ObservedCall

CASES = zoo.cases()
FORMS = [
    (case, case.grids[n % len(case.grids)], case.head_dims[n % len(case.head_dims)])
    for case in CASES
    for n in range(max(len(case.grids), len(case.head_dims)))
]
"""Every grid and every head dim of each case."""
BLOCK = 16
DENSITY = 0.4
SPARSE: dict[str, Any] = {
    "layout": {"name": "tile", "tile": [2, 2, 4]},
    "selector": {"name": "topk"},
    "compensation": {"name": "none"},
    "schedule": {"name": "constant", "density": DENSITY, "min_tokens": 0},
    "kernel": {"block_q": BLOCK, "block_k": BLOCK, "impl": "reference"},
}
WHOLE = ("kernel.block_k=512", "selector.min_blocks=3")
"""The sparse path, which then reads everything: one key block of each part of the sequence."""


def shuffled(grid: TokenGrid) -> tuple[Tensor, Tensor]:
    """Random, but no token crosses a cut."""
    generator = torch.Generator().manual_seed(7)
    bounds, plane = (0, *grid.cuts, grid.frames), grid.height * grid.width
    parts = [
        torch.randperm((end - begin) * plane, generator=generator) + begin * plane
        for begin, end in pairwise(bounds)
    ]
    order = torch.cat(parts)
    return order, order.argsort()


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a part of the largest number, if that is above 1."""
    assert a.isfinite().all() and b.isfinite().all()
    return float((a - b).abs().max() / a.abs().max().clamp(min=1))


def accelerated(subject: Subject, *overrides: str) -> Tensor:
    vidsparse.accelerate_pipeline(subject.pipe, SPARSE, list(overrides))
    with vidsparse.step(1, 2):
        return subject.forward()


@pytest.mark.parametrize("case, grid, dim", FORMS, ids=str)
def test_a_random_order_changes_nothing(case: Case, grid: zoo.Grid, dim: int) -> None:
    subject = case.build(grid, head_dim=dim)
    plain = subject.forward()
    hoist = Hoist(subject.model, subject.adapter, shuffled, Forward())
    hoist.attach()
    assert 0 < distance(plain, subject.forward()) < case.rounding
    hoist.detach()
    assert torch.equal(plain, subject.forward())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_entry_matters(case: Case) -> None:
    subject = case.build(case.grids[-1], batch=1)
    plain, adapter = subject.forward(), subject.adapter
    left_out = [str(s) for s in adapter.entries] if case.controls is None else case.controls
    assert left_out
    for site in adapter.entries:
        if str(site) not in left_out:
            continue
        rest = tuple(entry for entry in adapter.entries if entry != site)
        hoist = Hoist(subject.model, replace(adapter, entries=rest), shuffled, Forward())
        hoist.attach()
        assert distance(plain, subject.forward()) > 1e-3, f"without {site}"
        hoist.detach()


SIZES = {"num_frames", "height", "width"}
NEEDED = {
    "hunyuan_image": {"encoder_hidden_states_2"},
    "ltx long video": {"video_coords"},
    "ltx2": SIZES,
    "ltx2 keyframes": SIZES,
    "ltx2 masked": SIZES,
    "ltx2 token times": SIZES,
}
"""Case -> arguments that stock may do without, and we do not: a mask or the grid is unclear."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_arguments_that_stock_does_without(case: Case) -> None:
    """Any that the forward has a default for: the others still give what stock gives."""
    first = case.build(batch=1)
    parameters = inspect.signature(type(first.model).forward).parameters
    left_out = 0
    for name in first.arguments:
        if parameters[name].default is inspect.Parameter.empty:
            continue
        subject = case.build(case.grids[-1], batch=1)
        del subject.arguments[name]
        try:
            plain = subject.forward()
        except (AttributeError, NameError, RuntimeError, TypeError, ValueError):
            continue
        Hoist(subject.model, subject.adapter, shuffled, Forward()).attach()
        left_out += 1
        if name in NEEDED.get(str(case), ()):
            with pytest.raises(ValueError):
                subject.forward()
        else:
            assert distance(plain, subject.forward()) < case.rounding, f"without {name}"
    if not left_out:
        pytest.skip("stock needs all of them")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuts_are_those_of_the_case(case: Case) -> None:
    subject = case.build(batch=1)
    assert bool(subject.adapter.video(subject.model, subject.arguments).cuts) == case.cuts


@pytest.mark.parametrize("case", [case for case in CASES if case.cuts], ids=str)
def test_cuts_matter_where_there_are_some(case: Case) -> None:
    subject = case.build(batch=1)
    plain = subject.forward()
    Hoist(subject.model, replace(subject.adapter, cuts=None), shuffled, Forward()).attach()
    assert distance(plain, subject.forward()) > 1e-3


@pytest.mark.parametrize("case, grid, dim", FORMS, ids=str)
def test_density_one_and_restore(case: Case, grid: zoo.Grid, dim: int) -> None:
    subject = case.build(grid, head_dim=dim)
    plain = subject.forward()
    assert torch.equal(plain, accelerated(subject, "schedule.density=1.0", "layout.name=raster"))
    assert distance(plain, accelerated(subject, "schedule.density=1.0")) < case.rounding
    report = vidsparse.run_report(subject.pipe)
    assert set(report.dense_reasons) == {*(["user"] if case.sparse else []), *case.dense}
    vidsparse.restore_pipeline(subject.pipe)
    assert torch.equal(plain, subject.forward())


@pytest.mark.parametrize("case, grid, dim", FORMS, ids=str)
def test_sparse_at_the_density_asked_for(case: Case, grid: zoo.Grid, dim: int) -> None:
    """The sparse path with one key block is stock; with more it is sparse, as much as asked for."""
    subject = case.build(grid, head_dim=dim)
    plain = subject.forward()
    assert distance(plain, accelerated(subject, *WHOLE)) < case.rounding
    assert (distance(plain, accelerated(subject)) > 1e-4) == case.sparse
    report = vidsparse.run_report(subject.pipe)
    assert report.dense_reasons == case.dense
    layers = len(subject.adapter.self_attention(subject.model))
    assert {call.layer for call in report.calls} == set(range(layers))
    for call in report.calls:
        if call.reason is None:
            assert DENSITY - 0.15 < call.mean_density < DENSITY + 0.25


@pytest.mark.parametrize("case", [case for case in CASES if case.sparse], ids=str)
def test_what_each_call_reads(case: Case) -> None:
    """Text rows are exact, and every row is a mean of values of the same sample."""
    subject, seen = case.build(), Counter[str]()

    def look(call: ObservedCall) -> None:
        q, k, v = (x.transpose(1, 2).double() for x in (call.q, call.k, call.v))
        right = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        grid = call.grid
        assert call.result.out.shape[1] == grid.tokens
        text = slice(0, grid.text_tokens) if grid.text_first else slice(grid.other_tokens, None)
        assert torch.allclose(call.result.out[:, text].double(), right[:, text], atol=1e-5)
        seen["exact text"] += grid.text_tokens
        video = slice(grid.video_start, grid.video_start + grid.video_tokens)
        seen["inexact video"] += int(
            not torch.allclose(call.result.out[:, video].double(), right[:, video], atol=1e-4)
        )

    vidsparse.accelerate_pipeline(subject.pipe, SPARSE)
    with observing(subject.pipe, look), vidsparse.step(1, 2):
        subject.forward()
    assert seen["inexact video"]
    assert bool(seen["exact text"]) == (subject.adapter.text != "none")
