"""An accelerated pipeline says, once, that it gains nothing at this size on this device."""

import warnings
from dataclasses import replace

import pytest
import tiny
import torch

import vidsparse
from vidsparse import SparseConfig, TokenGrid
from vidsparse.costs import gpus
from vidsparse.costs.forward import Forward
from vidsparse.decision import Choice
from vidsparse.pipelines import expectation
from vidsparse.pipelines.expectation import Expectation, both, slower_here
from vidsparse.plan import StepContext
from vidsparse.result import AttentionResult, full_density

GRID = TokenGrid(4, 16, 16)
CONFIG = SparseConfig.load("tiles", ["schedule.min_tokens=0"])
LATE = StepContext(9, 10)


def result(reason, crossover=1.0):
    choice = Choice("cpu", crossover=crossover)
    return AttentionResult(torch.zeros(1), None, None, full_density(2), reason, choice)


def said(*results, context=LATE, config=CONFIG):
    q = torch.zeros(1, GRID.tokens, 2, 64)
    met = Expectation(config, "tiles")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for one in results:
            met.meet(GRID, context, q, one, True)
    return [str(warning.message) for warning in found]


def test_calls_that_are_as_fast_dense_are_told_of_once():
    first, *others = said(*[result("not-faster", 0.15)] * 3)
    assert not others
    assert first.startswith("vidsparse 'tiles': attention over 1,024 tokens is as fast dense")
    assert "from density 0.15 on, so at 0.25 it runs dense" in first
    assert "at any density" in said(result("not-faster", 0.0))[0]


@pytest.mark.parametrize("reason", [None, "warmup-step", "too-short", "masked"])
def test_nothing_is_said_of_other_calls_on_a_cpu(reason):
    assert not said(result(reason))


def test_the_first_sparse_call_counts_and_not_the_dense_steps_before_it():
    assert said(result("warmup-step"), result("not-faster", 0.1))


def test_a_run_that_is_dense_all_along_warns_once():
    pipe, arguments = tiny.build("wan")
    overrides = ["schedule.min_tokens=0", "kernel.crossover=0.1"]
    vidsparse.accelerate_pipeline(pipe, "tiles", overrides)
    with pytest.warns(RuntimeWarning, match="is as fast dense on this cpu from density 0.1 on"):
        pipe(**arguments)
    assert set(vidsparse.run_report(pipe).dense_reasons) == {"warmup-step", "not-faster"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        pipe(**arguments)
    vidsparse.restore_pipeline(pipe)


def short(tokens):
    return Forward(TokenGrid(1, 1, tokens), 1, 12, 128, (), 0.0, 0, "bfloat16")


@pytest.mark.parametrize("name", ["H100", "A100", "4090"])
def test_short_sequences_are_slower_and_long_ones_faster(name):
    """What the host does for a sparse call takes longer than a short dense one."""
    where = gpus.named(name)
    sparse, dense = both(short(1024), CONFIG, 0.25, where)
    assert sparse > dense
    sparse, dense = both(short(32_760), CONFIG, 0.25, where)
    assert sparse < dense


class OnGpu:
    """The form of a tensor on a GPU."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, tokens, dtype=torch.bfloat16):
        self.shape, self.dtype = (1, tokens, 12, 128), dtype


def test_a_gpu_of_the_table_is_told_of_with_the_sources(monkeypatch):
    monkeypatch.setattr(expectation, "_machine", lambda index: gpus.named("H100"))
    grid = TokenGrid(1, 1, 1024)
    text = slower_here(CONFIG, grid, 0.25, OnGpu(1024), True)
    assert "1,024 tokens at density 0.25" in text and "on this H100" in text
    assert "(from measured, published and assumed figures)" in text
    assert slower_here(CONFIG, replace(grid, width=32_760), 0.25, OnGpu(32_760), True) == ""
    assert slower_here(CONFIG, grid, 0.25, OnGpu(1024, torch.float32), True) == ""
    monkeypatch.setattr(expectation, "_machine", lambda index: None)
    assert slower_here(CONFIG, grid, 0.25, OnGpu(1024), True) == ""


def test_nothing_is_measured(monkeypatch):
    def fail(*args):
        raise AssertionError("measured")

    from vidsparse.kernels.cpu import crossover, store

    monkeypatch.setattr(store, "recall", fail)
    monkeypatch.setattr(crossover, "measure", fail)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA A100-SXM4-80GB")
    expectation._machine.cache_clear()
    assert "on this A100" in slower_here(CONFIG, TokenGrid(1, 1, 1024), 0.25, OnGpu(1024), True)
    expectation._machine.cache_clear()
