"""Every family on grids by hypothesis, of one token and of lengths that nothing divides."""

from __future__ import annotations

import math

import pytest
import zoo
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_families import SPARSE, WHOLE, distance
from zoo import Case

import vidsparse
from vidsparse.config import resolve

DENSE = resolve(SPARSE, "schedule.density=1.0")
SHORT = resolve(SPARSE, "schedule.min_tokens=1000000")
READING_ALL = resolve(SPARSE, WHOLE)
READING_FEW = resolve(SPARSE)


FIRST = [file.CASES[0] for file in zoo.files().values()]
"""Of each family; the other ways to call its transformer are slow tests here."""


@pytest.mark.parametrize(
    "case",
    [case if case in FIRST else pytest.param(case, marks=pytest.mark.slow) for case in zoo.cases()],
    ids=str,
)
@given(data=st.data())
@settings(max_examples=3, deadline=None, derandomize=True, database=None)
def test_any_grid(case: Case, data: st.DataObject) -> None:
    """At density 1, too short, and sparse with one key block, which is then read whole, it is
    stock; and nothing is dense but for a reason that the case or the settings name."""
    images = all(frames == 1 for frames, _, _ in case.grids)
    size = st.integers(1, 9)
    grid = data.draw(st.tuples(st.integers(1, 1 if images else 5), size, size), "grid")
    assume(case.takes(grid))
    subject = case.build(grid, batch=data.draw(st.integers(1, 2), "batch"))
    plain = subject.forward()
    for config, reason, bound in (
        (DENSE, {"user"}, case.rounding),
        (SHORT, {"too-short"}, case.rounding),
        (READING_ALL, set(), case.rounding),
        (READING_FEW, set(), math.inf),
    ):
        vidsparse.accelerate_pipeline(subject.pipe, config)
        with vidsparse.step(1, 2):
            assert distance(plain, subject.forward()) < bound
        found = set(vidsparse.run_report(subject.pipe).dense_reasons)
        assert found == {*(reason if case.sparse else ()), *case.dense}
