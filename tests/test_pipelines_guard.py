"""Attention that is not finite: noticed, told apart by whose fault it is, and never silent."""

from __future__ import annotations

import json
import pickle
import warnings
from functools import partial
from itertools import permutations
from math import inf, nan
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import vidsparse
from vidsparse import SparseConfig, TokenGrid, registry, sparse_attention
from vidsparse.pipelines import guard
from vidsparse.pipelines.guard import Guard, NonFinite
from vidsparse.plan import StepContext
from vidsparse.result import finite_numbers


class Fault:
    """An executor that gives one infinite number in its n-th call, from 0, and no other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.calls, self.number = 0, number
        for executor in registry.executors().values():
            monkeypatch.setattr(executor, "execute", partial(self.act, executor.execute))

    def act(self, stock: Any, *args: Any, **how: Any) -> tuple[Tensor, Tensor | None]:
        out, lse = stock(*args, **how)
        if self.calls == self.number:
            out[0, -1, -1, 5] = inf
        self.calls += 1
        return out, lse


def test_an_output_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE, ["schedule.density=0.3"])
    expected = tiny.run(pipe, call)
    assert vidsparse.run_report(pipe).non_finite == []
    with monkeypatch.context() as patch:
        Fault(patch, number=4 + 2 + 1)  # one dense step; then step 1 has four calls
        message = r"output of attention at step 2, layer 1 of transformer \(uncond\).*finite q, k"
        with pytest.raises(RuntimeError, match=message + r".*'custom schedule\.density=0\.3'.*16"):
            tiny.run(pipe, call)
    report = vidsparse.run_report(pipe)
    assert report.non_finite == [NonFinite(2, 1, "uncond", "transformer", ())]
    assert "not finite: output of attention at step 2, layer 1" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["non_finite"] == [
        {"step": 2, "layer": 1, "branch": "uncond", "transformer": "transformer", "inputs": []}
    ]
    assert pickle.loads(pickle.dumps(report)).non_finite == report.non_finite
    assert torch.equal(expected, tiny.run(pipe, call))
    assert vidsparse.run_report(pipe).non_finite == []


def test_inputs_are_the_models_fault_and_warn_once() -> None:
    pipe, call = tiny.build("wan")
    with torch.no_grad():
        pipe.transformer.blocks[1].attn1.to_v.bias[3] = inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = tiny.run(pipe, call)
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    with pytest.warns(RuntimeWarning, match="step 1, layer 0.*model itself") as caught:
        out = tiny.run(pipe, call)
    assert len([w for w in caught if "not finite" in str(w.message)]) == 1
    assert plain.isnan().all() and out.isnan().all()
    found = vidsparse.run_report(pipe).non_finite
    assert [f.step for f in found] == [1, 2, 3] and found[0].inputs == ("q", "k", "v")


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_isfinite_numbers(dtype: torch.dtype) -> None:
    """Against isfinite, also where the sum of finite numbers is not, in any order of memory."""
    x = torch.randn(1, 40, 2, 16).to(dtype)
    large = torch.full_like(x, torch.finfo(dtype).max)
    assert finite_numbers(x, x, x, x) is None and finite_numbers(x, x, x, large) is None
    for axes in permutations(range(4)):
        out = x.permute(axes).contiguous().permute([axes.index(axis) for axis in range(4)])
        assert torch.equal(out, x) and finite_numbers(x, x, x, out) is None
        for value, place in ((inf, 0), (-inf, 637), (nan, 1279), (nan, 128)):
            bad = out.clone()
            assert bad.stride() == out.stride()
            bad[(*map(int, torch.unravel_index(torch.tensor(place), x.shape)),)] = value
            finite = finite_numbers(x, x, x, bad)
            assert finite is not None and finite.tolist() == [True, True, True, False]
    for value in (inf, -inf, nan):
        for place in range(4):
            tensors = [x.clone() for _ in range(4)]
            tensors[place][0, 17, 1, 3] = value
            finite = finite_numbers(*tensors)
            if place < 3:
                assert finite is None, "the output is finite, so nobody asks"
                tensors[3][0, 1, 1, 1] = nan
                finite = finite_numbers(*tensors)
            assert finite is not None
            assert finite.tolist() == [bool(t.isfinite().all()) for t in tensors]
    both = x.clone()
    both[0, 3], both[0, 5] = inf, -inf
    assert finite_numbers(x, x, x, both) is not None


def test_a_call_without_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SparseConfig.load("tiles", ["schedule.min_tokens=0", "kernel.impl=cpu"])
    q = torch.randn(1, 1024, 1, 16)
    how: Any = {"grid": TokenGrid(4, 16, 16), "config": config}
    bad = q.clone()
    bad[0, 7] = nan
    assert sparse_attention(q, q, bad, **how).isnan().any(), "as scaled_dot_product_attention"
    Fault(monkeypatch, number=0)
    with pytest.raises(RuntimeError, match=r"finite q, k and v is not finite in torch\.float32"):
        sparse_attention(q, q, q, **how)


class Arrival:
    """Stands in for `torch.Event`: whether a copy to the host has arrived."""

    arrived = False
    waits = 0

    def __init__(self, device: torch.device) -> None:
        pass

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return Arrival.arrived

    def synchronize(self) -> None:
        Arrival.waits += 1


class Elsewhere:
    """Flags on a device: bool [n, 4] that refuse to be read before they are on the host."""

    device = torch.device("cuda:0")

    def __init__(self, *rows: list[bool]) -> None:
        self.rows = list(rows)

    def to(self, device: str, non_blocking: bool) -> Elsewhere:
        assert device == "cpu" and non_blocking
        return self

    def tolist(self) -> list[list[bool]]:
        assert Arrival.arrived or Arrival.waits, "read before it has arrived"
        return self.rows


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Arrival, "arrived", False)
    monkeypatch.setattr(Arrival, "waits", 0)
    monkeypatch.setattr(guard.torch, "Event", Arrival)
    monkeypatch.setattr(
        guard.torch, "stack", lambda flags: Elsewhere(*[row for f in flags for row in f.rows])
    )


def noted(watch: Guard, step: int, *rows: list[bool]) -> None:
    watch.at(step)
    for layer, row in enumerate(rows):
        watch.note(StepContext(step, 9, layer, len(rows)), Elsewhere(row))  # type: ignore[arg-type]


FINE, OUTPUT, INPUT = [True] * 4, [True, True, True, False], [False, True, True, False]


@pytest.mark.usefixtures("device")
def test_a_device_is_never_waited_for_within_a_run() -> None:
    watch = Guard("tiles")
    noted(watch, 0, FINE, FINE)
    noted(watch, 1, FINE, OUTPUT, INPUT)
    noted(watch, 2, INPUT, INPUT)
    assert watch.found == [] and Arrival.waits == 0
    Arrival.arrived = True
    with pytest.raises(RuntimeError, match=r"output of attention at step 1, layer 1 .*'tiles'"):
        watch.at(3)
    assert [(f.step, f.layer, f.inputs) for f in watch.look()] == [(1, 1, ()), (2, 0, ("q",))]
    assert Arrival.waits == 0
    watch.at(4)


@pytest.mark.usefixtures("device")
def test_the_last_step_is_looked_at_when_the_run_ends() -> None:
    watch = Guard("tiles")
    noted(watch, 0, FINE)
    noted(watch, 1, FINE, OUTPUT)
    assert [(f.step, f.layer) for f in watch.look()] == [(1, 1)] and Arrival.waits == 2
    with pytest.warns(RuntimeWarning, match="step 1, layer 1"):
        watch.tell(lost=True)
    watch.tell()


def test_the_end_of_a_pipeline_call_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the last step of a device: nothing but the end can tell it."""
    pipe, call = tiny.build("wan")
    vidsparse.accelerate_pipeline(pipe, tiny.SPARSE)
    calls = []

    def note(self: Guard, context: StepContext, finite: Tensor | None) -> None:
        calls.append(context)
        if len(calls) == 16:
            self.found = [NonFinite(3, context.layer, "cond", "transformer", ())]

    monkeypatch.setattr(Guard, "note", note)
    with pytest.raises(RuntimeError, match="step 3, layer"):
        tiny.run(pipe, call)
    assert len(calls) == 16
