"""A loop against what is said of it: what is a step, what goes on, what the end of a run tells."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vidsparse.memory import Memory
from vidsparse.pipelines.loop import Loop, identity, shares_memory


class Pipeline:
    """Somebody's."""


class Told:
    """Stands in for a report and its guard."""

    def __init__(self) -> None:
        self.guard, self.acts, self.memory = self, [], Memory()

    def look(self) -> None:
        self.acts.append("look")

    def tell(self) -> None:
        self.acts.append("tell")

    def settle(self) -> None:
        """Nothing is shared with other processes."""


PIPE = Pipeline()


def started(steps: int = 4, source: object = None) -> Loop:
    loop = Loop(PIPE)
    loop.start(Told(), steps, source)  # type: ignore[arg-type]
    return loop


def forward(loop: Loop, moment: object = None, walked: int = 0) -> int:
    """One forward, as `Runs` makes it known; the step that it is in."""
    loop.at(moment, walked)
    loop.forwards += 1
    return loop.index


def test_a_step_is_what_follows_a_forward() -> None:
    loop = started()
    loop.count()
    assert [forward(loop), forward(loop)] == [0, 0], "before the first forward nothing is a step"
    for _ in range(3):
        loop.count()
    assert [forward(loop), forward(loop)] == [1, 1]
    loop.tell(3)
    assert (loop.index, loop.forwards, loop.told) == (3, 0, True)
    loop.start(Told(), 2)  # type: ignore[arg-type]
    assert (loop.index, loop.forwards, loop.told, loop.steps) == (0, 0, False, 2)


def test_a_new_moment_is_a_step_and_so_is_a_new_index() -> None:
    times, loop = torch.tensor([9, 5, 1]), started()
    first, second = times[0], times[1]
    moments = (first, first, second, second)
    assert [forward(loop, moment) for moment in moments] == [0, 0, 1, 1]
    assert [forward(loop, second, walked) for walked in (1, 1, 2)] == [2, 2, 3]
    loop = started()
    assert [forward(loop, None), forward(loop, first)] == [0, 0], "unknown before, so no other one"
    assert [forward(loop, None, walked) for walked in (1, 2)] == [1, 2]
    loop = started()
    assert [forward(loop, m, w) for m, w in ((first, 0), (second, 1))] == [0, 1], "once, not twice"


def test_a_run_goes_on_with_the_timesteps_that_it_started_with() -> None:
    source = torch.tensor([9.0, 5.0, 1.0])
    loop = Loop(PIPE)
    assert not loop.goes_on(None, None), "none has started"
    loop = started(source=source)
    forward(loop)
    assert loop.goes_on(source, None) and not loop.goes_on(source.clone(), None)
    loop.count()
    loop.end()
    assert not loop.goes_on(source, None) and not loop.goes_on(None, None)
    loop = started(source=int("1000"))
    forward(loop)
    assert loop.goes_on(int("1000"), None) and not loop.goes_on(999, None)
    assert not loop.goes_on(source, None)
    loop = started(source=source)
    assert not loop.goes_on(3, None)


def test_a_run_goes_on_when_its_scheduler_is_exchanged() -> None:
    """The pipeline comes to another item of the list that it walks through."""
    source, other = torch.tensor([9.0, 5.0, 1.0]), torch.tensor([9.0, 5.0, 1.0])
    loop, moments = started(source=source), [source[0], source[1]]
    forward(loop, moments[0])
    assert not loop.goes_on(other, moments[0]), "at the same item: a run anew"
    assert not loop.goes_on(other, other[1]) and not loop.goes_on(other, None)
    assert loop.goes_on(other, moments[1])
    forward(loop, moments[1])
    assert loop.goes_on(other, moments[1]), "the scheduler's list is the new one from then on"
    assert not loop.goes_on(torch.tensor([9.0]), moments[1])


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_item_of_another_list_after_the_last_step_is_the_next_run(
    steps: int, counted: bool
) -> None:
    """Diffusion forcing. A list of one step says nothing: each timestep may be a tensor alone."""
    source, own, later = torch.ones(9), torch.arange(5.0), torch.arange(5.0)
    loop = started(steps, source)
    for step in range(steps):
        if counted:
            loop.count()
        assert loop.goes_on(source, later[0]), "the last step has not had its forward"
        assert forward(loop, own[step]) == step
    assert loop.goes_on(source, own[steps - 1]), "a second forward of the last step"
    assert loop.goes_on(source, later[0]) == (steps == 1)
    assert loop.goes_on(source, None) == (steps == 1)
    loop.count()
    assert loop.goes_on(source, later[0]) == (steps == 1)


def test_timesteps_that_share_no_list_never_end_a_run() -> None:
    source = torch.ones(2)
    loop = started(2, source)
    for step in range(2):
        assert forward(loop, torch.tensor(1.0 * step)) == step
    assert not loop.goes_on(source.clone(), torch.tensor(9.0))
    assert loop.goes_on(source, torch.tensor(9.0))


def ended(loop: Loop) -> list[str]:
    """What was said at the end of a run: warnings, and acts of the guard."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.end()
    return [str(w.message) for w in caught] + loop.report.acts  # type: ignore[union-attr]


def test_the_end_tells_of_a_run_that_showed_no_step() -> None:
    loop = started(2)
    for _ in range(3):
        forward(loop)
    said = ended(loop)
    assert said[1:] == ["look", "tell"] and len(said) == 3
    assert "no step in this run of Pipeline: its 3 forwards ran as step 0 of 2" in said[0]
    assert "wrap each transformer call in `with vidsparse.step(index, total):`" in said[0]
    assert ended(loop) == ["look", "tell"], "nothing more: the run has ended already"


@pytest.mark.parametrize("why", ["no forward", "one step", "counted", "told"])
def test_the_end_of_a_run_that_is_in_order(why: str) -> None:
    loop = started(1 if why == "one step" else 4)
    if why != "no forward":
        forward(loop)
    if why == "counted":
        loop.count()
        forward(loop)
    if why == "told":
        loop.tell(0)
        forward(loop)
    assert ended(loop) == ["look", "tell"]


def test_a_loop_that_never_ran_ends_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Loop(None).end()


class Scheduler:
    def step(self) -> str:
        return "stepped"


def test_only_the_scheduler_of_now_is_counted() -> None:
    first, second, loop = Scheduler(), Scheduler(), started()
    loop.follow(first)
    wrapped = vars(first)["step"]
    loop.follow(first)
    assert vars(first)["step"] is wrapped, "once"
    forward(loop)
    assert first.step() == "stepped" and loop.index == 1
    loop.follow(second)
    assert "step" not in vars(first) and "step" in vars(second)
    forward(loop)
    first.step()
    assert loop.index == 1
    second.step()
    assert loop.index == 2
    loop.follow(None)
    assert "step" not in vars(second) and loop.counted is None
    loop.follow(second)
    loop.end()
    assert "step" not in vars(second)


def test_what_shares_memory() -> None:
    x = torch.arange(4.0)
    assert shares_memory(x[1], x) and shares_memory(x[1], x[3]) and shares_memory(x, x)
    others: tuple[Any, ...] = (x.clone(), x.clone()[1], None, 3, [1.0])
    for other in others:
        assert not shares_memory(x, other) and not shares_memory(other, x)
    assert not shares_memory(None, None) and not shares_memory(3, 3)


def test_what_tells_the_runs_of_a_scheduler_apart() -> None:
    x = torch.arange(4.0)
    assert identity(SimpleNamespace(timesteps=x)) is x
    assert identity(SimpleNamespace()) is None and identity(None) is None

    class Anew:
        timesteps = property(lambda self: torch.arange(4.0))

    assert identity(Anew()) == 4
