"""The runs of pipelines without a model: what each forward is told, and when a run ends."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loops import Pipeline, Report, asked, made, told

import vidsparse
from vidsparse.pipelines.steps import GUIDED, MAX_FORWARDS, Runs


def test_a_run_of_told_steps_that_starts_again_is_another_one() -> None:
    """Of one step, too, where neither the step nor the number of steps says so."""
    for total in (1, 2):
        pipe, runs = made(total)
        reports = []
        for _ in range(2):
            for index in range(total):
                assert pipe.forward(runs, told(index, total)) == (index, total, "cond", 0)
                assert pipe.forward(runs, told(index, total, "uncond"))[2] == "uncond"
                reports.append(runs.report(pipe))
            pipe.scheduler.set_timesteps(total)
        assert len(set(map(id, reports))) == 2
        assert len(set(map(id, reports[:total]))) == 1


def test_told_steps_that_fall_or_are_of_another_number_are_a_run() -> None:
    pipe, runs = made()
    reports = []
    for index, total in ((2, 4), (3, 4), (3, 4), (2, 4), (2, 5), (4, 5)):
        assert pipe.forward(runs, told(index, total))[:2] == (index, total)
        reports.append(runs.report(pipe))
    assert [a is b for a, b in pairwise(reports)] == [
        *(True, True),
        *(False, False, True),
    ]


@pytest.mark.parametrize("forwards", [GUIDED, GUIDED + 1])
def test_a_run_whose_end_nobody_tells_is_looked_at_when_the_next_starts(forwards: int) -> None:
    """More forwards than guidance needs, and no step: that is said, too."""
    pipe, runs = made()
    for number in range(forwards):
        assert pipe.forward(runs) == (0, 4, "single", number)
    lost: Any = runs.report(pipe)
    assert lost.acts == []
    pipe.scheduler.set_timesteps(4)
    if forwards > GUIDED:
        with pytest.warns(RuntimeWarning, match=f"its {forwards} forwards ran as step 0 of 4"):
            pipe.forward(runs)
    else:
        pipe.forward(runs)
    assert lost.acts == ["look", "lost", *["look", "tell"] * (forwards > GUIDED)]
    assert runs.report(pipe) is not lost
    assert pipe.forward(runs) == (0, 4, "single", 1)


@pytest.mark.parametrize("begin", [0, 1])
def test_an_index_that_a_scheduler_sets_within_its_first_step(begin: int) -> None:
    """It knows none before; then it is the one to begin at, and no step was made."""
    pipe, runs = made()
    pipe.scheduler.begin_index = begin
    assert pipe.forward(runs) == (0, 4 - begin, "single", 0)
    pipe.scheduler.step_index = begin
    assert pipe.forward(runs) == (0, 4 - begin, "single", 1)
    pipe.scheduler.step_index = begin + 1
    assert pipe.forward(runs) == (1, 4 - begin, "single", 0)


def test_an_index_that_is_set_where_none_was_known_at_all() -> None:
    pipe, runs = made()
    pipe.forward(runs)
    pipe.scheduler.step_index = 0
    assert pipe.forward(runs) == (0, 4, "single", 1)


@pytest.mark.parametrize(
    ("executed", "moment", "steps"),
    [
        (3, None, 3),
        (4, None, 4),
        (5, None, 4),
        (3, "own", 3),
        (5, "own", 5),
        (5, "listed", 4),
        (0, "own", 4),
        (1, "own", 1),
        ("5", "own", 4),
        (None, "own", 4),
    ],
)
def test_steps_that_a_pipeline_says_it_executes(executed: Any, moment: Any, steps: int) -> None:
    """More than the scheduler has are believed only where the pipeline walks through its own."""
    pipe, runs = made(4)
    pipe._num_timesteps = executed  # type: ignore[attr-defined]
    if moment is not None:
        own, listed = torch.arange(9.0), pipe.scheduler.timesteps
        pipe._current_timestep = (own if moment == "own" else listed)[0]  # type: ignore[attr-defined]
    assert pipe.forward(runs)[1] == steps
    other = Pipeline(4, pipe.transformer)
    other._num_timesteps = executed  # type: ignore[attr-defined]
    runs = Runs(other, lambda pipe: Report(), {})  # type: ignore[arg-type, return-value]
    assert asked(runs, other.transformer)[1] == 4, "it does not run, so what it says is old"


def test_steps_by_hand_that_fall_or_are_of_another_number_are_a_run() -> None:
    pipe, runs = made()
    reports = []
    for index, total in ((1, 4), (1, 4), (3, 4), (2, 4), (2, 3), (2, 3)):
        with vidsparse.step(index, total, "uncond"):
            assert pipe.forward(runs) == (index, total, "uncond", 0)
            reports.append(runs.report(pipe))
    assert [a is b for a, b in pairwise(reports)] == [True, True, False, False, True]
    assert "step" not in vars(pipe.scheduler), "nothing is counted"
    other = Pipeline(4, pipe.transformer)
    with vidsparse.step(2, 3):
        assert other.forward(runs)[:2] == (2, 3)
        assert runs.report(other) not in (None, reports[-1]), "of another pipeline"


@pytest.mark.parametrize("inside", [True, False])
def test_a_context_tells_its_step_also_where_no_pipeline_runs(inside: bool) -> None:
    pipe, runs = made()
    reports = []
    for index in (1, 3, 0):
        context = told(index, 4, "uncond")
        found = pipe.forward(runs, context) if inside else asked(runs, pipe.transformer, context)
        assert found == (index, 4, "uncond", 0)
        reports.append(runs.report(pipe))
    assert [a is b for a, b in pairwise(reports)] == [True, False]
    assert ("step" in vars(pipe.scheduler)) == inside


@pytest.mark.parametrize("by", ["its pipeline", "another pipeline", "someone else"])
def test_whose_end_ends_steps_by_hand(by: str) -> None:
    pipe, runs = made()
    other = Pipeline(4, pipe.transformer)
    with vidsparse.step(0, 4):
        pipe.forward(runs)
        before: Any = runs.report(pipe)
    if by == "someone else":
        runs.end(pipe.transformer)
    else:
        (pipe if by == "its pipeline" else other).end(runs)
    ended = by != "another pipeline"
    assert before.acts == ["look", "tell"] * ended
    with vidsparse.step(1, 4):
        pipe.forward(runs)
        assert (runs.report(pipe) is before) != ended


@pytest.mark.parametrize("by", ["its pipeline", "another pipeline", "someone else"])
def test_whose_end_ends_a_counted_run(by: str) -> None:
    """Someone else's is the end of the pipeline that was accelerated."""
    pipe, runs = made()
    other = Pipeline(4, pipe.transformer)
    for each in (pipe, other):
        each.forward(runs)
        each.scheduler.step()
    reports: list[Any] = [runs.report(each) for each in (pipe, other)]
    assert reports[0] is not reports[1]
    for report in reports:
        report.memory.of(1, "stream").get("something", 4, object)
    if by == "someone else":
        runs.end(pipe.transformer)
    else:
        (pipe if by == "its pipeline" else other).end(runs)
    ended = [by != "another pipeline", by == "another pipeline"]
    for each, before, over in zip((pipe, other), reports, ended, strict=True):
        assert before.acts == ["look", "tell"] * over
        assert bool(before.memory.entries) != over, "what a run keeps ends with it"
        assert ("step" in vars(each.scheduler)) != over
        assert each.forward(runs)[0] == (0 if over else 1)
        assert (runs.report(each) is before) != over
        assert before.acts == ["look", "tell"] * over, "the next run says no more of it"


def test_steps_by_hand_have_a_report_of_their_own_while_they_run() -> None:
    pipe, runs = made()
    other = Pipeline(4, pipe.transformer)
    assert runs.report(pipe) is None
    with vidsparse.step(0, 4):
        assert runs.report(pipe) is None
        pipe.forward(runs)
        by_hand = runs.report(pipe)
    other.forward(runs)
    pipe.forward(runs)
    counted = runs.report(pipe)
    assert counted is not by_hand and runs.report(other) not in (None, counted, by_hand)
    with vidsparse.step(1, 4):
        assert runs.report(pipe) is by_hand
        assert runs.report(other) not in (None, by_hand)
    assert runs.report(pipe) is counted


def test_forwards_of_no_pipeline_are_those_of_the_one_that_was_accelerated() -> None:
    pipe, runs = made()
    transformer = pipe.transformer
    assert asked(runs, transformer) == (0, 4, "single", 0)
    pipe.scheduler.step()
    assert asked(runs, transformer, SimpleNamespace(name="uncond")) == (1, 4, "uncond", 0)
    assert runs.report(pipe) is not None
    runs.detach()
    del pipe
    with pytest.raises(RuntimeError, match=r"the accelerated pipeline is gone.*vidsparse\.step"):
        asked(runs, transformer)
    with vidsparse.step(1, 2):
        assert asked(runs, transformer) == (1, 2, "single", 0)
    assert asked(runs, transformer, told(1, 3)) == (1, 3, "cond", 0)


def test_undone_within_a_run_every_scheduler_is_as_before() -> None:
    pipe, runs = made()
    pipes = (pipe, Pipeline(4, pipe.transformer))
    for each in pipes:
        each.forward(runs)
        assert "step" in vars(each.scheduler)
    held = list(runs.loops.values())
    runs.detach()
    assert len(held) == 2
    for each in pipes:
        assert "step" not in vars(each.scheduler)
    assert not runs.loops


class Guided(Pipeline):
    do_classifier_free_guidance = True


class Derived(Guided):
    """Of a class that a family knows."""


def test_branches_by_order() -> None:
    """Where the pipeline guides, and runs: those of its class, over and over within a step."""
    order = {"Pipeline": ("single",), "Guided": ("uncond", "cond")}
    pipe = Derived()
    runs = Runs(pipe, lambda pipe: Report(), order)  # type: ignore[arg-type, return-value]
    wanted = ["uncond", "cond", "uncond"]
    for step in range(2):
        assert [pipe.forward(runs)[:3:2] for _ in range(3)] == [(step, b) for b in wanted]
        pipe.scheduler.step()
    assert asked(runs, pipe.transformer)[2] == "single", "it does not run"
    assert pipe.forward(runs, SimpleNamespace(name="cond"))[2] == "cond", "said, so not by order"
    pipe.do_classifier_free_guidance = False
    assert pipe.forward(runs)[2] == "single"
    plain = Pipeline(4, pipe.transformer)
    assert plain.forward(Runs(plain, runs.open_report, {"Pipeline": ("cond",)}))[2] == "single"
    other = Guided(4, pipe.transformer)
    runs = Runs(pipe, lambda pipe: Report(), {"Derived": ("cond",)})  # type: ignore[arg-type, return-value]
    assert other.forward(runs)[2] == "single", "nobody knows its order"


def test_another_list_of_the_pipelines_own_is_a_run() -> None:
    """Diffusion forcing: the scheduler's timesteps are not even looked at."""
    pipe, runs = made(4)
    pipe._num_timesteps = 2  # type: ignore[attr-defined]
    reports = []
    for _ in range(2):
        own = torch.arange(2.0)
        for step in range(2):
            pipe._current_timestep = own[step]  # type: ignore[attr-defined]
            assert [pipe.forward(runs)[:2] for _ in range(2)] == [(step, 2)] * 2
            reports.append(runs.report(pipe))
    assert [a is b for a, b in pairwise(reports)] == [True, False, True]


def test_where_a_pipeline_stood_says_nothing_of_forwards_that_it_does_not_run() -> None:
    pipe, runs = made(2)
    pipe._current_timestep = pipe.scheduler.timesteps[0]  # type: ignore[attr-defined]
    for number in range(MAX_FORWARDS):
        assert asked(runs, pipe.transformer) == (0, 2, "single", number)
    with pytest.raises(RuntimeError, match="vidsparse cannot follow this loop"):
        asked(runs, pipe.transformer)


def test_a_loop_that_cannot_be_followed() -> None:
    pipe, runs = made(2)
    for number in range(MAX_FORWARDS):
        assert pipe.forward(runs)[3] == number
    message = f"0 of 2 steps counted, and {MAX_FORWARDS} forwards since, without Scheduler.step of"
    with pytest.raises(RuntimeError, match=message):
        pipe.forward(runs)
    pipe.scheduler.step()
    assert pipe.forward(runs) == (1, 2, "single", 0)
    pipe.scheduler.step()
    with pytest.raises(RuntimeError, match="2 of 2 steps counted, and 0 forwards since"):
        pipe.forward(runs)
    assert pipe.forward(runs, told(1, 2)) == (1, 2, "cond", 0), "told, it needs no counting"


def test_forwards_at_one_timestep_of_the_pipeline_may_be_many() -> None:
    pipe, runs = made(2)
    for step in range(2):
        pipe._current_timestep = pipe.scheduler.timesteps[step]  # type: ignore[attr-defined]
        for number in range(MAX_FORWARDS + 2):
            assert pipe.forward(runs) == (step, 2, "single", number)


def test_a_scheduler_without_timesteps_is_refused_unless_steps_are_told() -> None:
    pipe, runs = made()
    pipe.scheduler.timesteps = None
    with pytest.raises(RuntimeError, match=r"this Pipeline \(Scheduler\) has no timesteps"):
        pipe.forward(runs)
    assert pipe.forward(runs, told(2, 5)) == (2, 5, "cond", 0)
