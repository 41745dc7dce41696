"""An accelerated forward needs at most a fifth more memory at its peak than a stock one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
import zoo
from torch.profiler import ProfilerActivity, profile

import vidsparse

BOUND = 1.2
GRID = (4, 16, 16)
"""1,024 tokens: scores of all pairs would be four times the largest tensor of a stock forward."""

SPARSE = ("schedule.name=constant", "schedule.density=0.25", "schedule.min_tokens=0")
CASES = {case.name: case for case in zoo.cases()}
NAMES = ("wan", "wan token times", "hunyuan_video", "hunyuan_video15", "cogvideox", "mochi", "ltx")
NAMES += ("flux controlnet", "ltx2 masked")


def peak(act: Callable[[], object]) -> int:
    """Most bytes that torch's allocator has held at once for `act`, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        act()
    assert seen.profiler is not None
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(size for _, size in changes))


def peaks(name: str, *overrides: str) -> tuple[int, int]:
    """Of a forward at its second call: stock, and accelerated."""
    subject = CASES[name].build(GRID)
    subject.forward()
    stock = peak(subject.forward)
    vidsparse.accelerate_pipeline(subject.pipe, "tiles", [*SPARSE, *overrides])
    with vidsparse.step(1, 2):
        subject.forward()
        ours = peak(subject.forward)
    user = {"user"} if "schedule.density=1" in overrides else set()
    assert set(vidsparse.run_report(subject.pipe).dense_reasons) == {*CASES[name].dense, *user}
    return stock, ours


def test_the_peak_is_what_was_held_at_once() -> None:
    def act() -> None:
        for _ in range(3):
            torch.empty(1000, dtype=torch.float32)
        _held = torch.empty(2000, dtype=torch.float32), torch.empty(500, dtype=torch.float64)

    assert peak(act) == 12000


@pytest.mark.parametrize("name", NAMES)
def test_sparse(name: str) -> None:
    stock, ours = peaks(name, "kernel.impl=cpu")
    assert ours <= BOUND * stock


def test_density_one() -> None:
    stock, ours = peaks("cogvideox", "schedule.density=1")
    assert ours <= BOUND * stock


def test_scores_of_all_pairs_would_be_seen() -> None:
    """The oracle keeps them, in float64."""
    stock, ours = peaks("wan", "kernel.impl=reference")
    assert ours > 2 * stock
