"""`scheduler.step`, counted: who hears of it, and what is left when nobody listens any more."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
from typing import Any

import pytest

from vidsparse.pipelines.counted import CountedStep, count_steps, put_back

WRAPPED = {"step", "__reduce_ex__"}


class Scheduler:
    def __init__(self) -> None:
        self.made = 0

    def step(self, sample: int, *, scale: int = 1) -> int:
        """One step."""
        self.made += 1
        return sample * scale


class Listener:
    def __init__(self) -> None:
        self.heard = 0

    def hear(self) -> None:
        self.heard += 1


def test_every_listener_hears_of_every_step_once() -> None:
    scheduler, first, second = Scheduler(), Listener(), Listener()
    counted = count_steps(scheduler, first.hear)
    assert scheduler.step(3, scale=2) == 6 and scheduler.made == 1
    assert count_steps(scheduler, second.hear) is counted, "one wrapper for each scheduler"
    assert scheduler.step(4) == 4
    assert (first.heard, second.heard, scheduler.made) == (2, 1, 2)
    assert inspect.signature(scheduler.step) == inspect.signature(Scheduler().step)
    counted.drop(first.hear)
    scheduler.step(5)
    assert (first.heard, second.heard) == (2, 2) and set(vars(scheduler)) >= WRAPPED
    counted.drop(second.hear)
    assert not WRAPPED & set(vars(scheduler))
    scheduler.step(6)
    assert (first.heard, second.heard, scheduler.made) == (2, 2, 4)


def test_a_listener_that_is_gone_takes_itself_off() -> None:
    scheduler, first, second = Scheduler(), Listener(), Listener()
    count_steps(scheduler, first.hear)
    count_steps(scheduler, second.hear)
    del first
    gc.collect()
    scheduler.step(1)
    assert second.heard == 1 and set(vars(scheduler)) >= WRAPPED
    del second
    gc.collect()
    assert not WRAPPED & set(vars(scheduler))


@pytest.mark.parametrize("own", [True, False])
def test_a_step_of_the_object_is_put_back(own: bool) -> None:
    """Another tool's wrapper sits in the object, too."""
    scheduler, listener = Scheduler(), Listener()
    if own:
        scheduler.step = theirs = lambda *args, **kw: 7  # type: ignore[method-assign]
    counted = count_steps(scheduler, listener.hear)
    assert scheduler.step(1) == (7 if own else 1) and listener.heard == 1
    counted.drop(listener.hear)
    assert vars(scheduler).get("step") is (theirs if own else None)


def test_a_wrapper_around_ours_stays_and_ours_is_a_passage() -> None:
    scheduler, listener = Scheduler(), Listener()
    counted = count_steps(scheduler, listener.hear)
    inner = scheduler.step
    scheduler.step = theirs = lambda *args: inner(*args)  # type: ignore[method-assign]
    counted.drop(listener.hear)
    assert vars(scheduler)["step"] is theirs and "__reduce_ex__" not in vars(scheduler)
    assert scheduler.step(3) == 3 and listener.heard == 0


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["shallow", "deep", "pickle"],
)
def test_a_copy_is_as_without_us(duplicate: Any) -> None:
    scheduler, listener = Scheduler(), Listener()
    count_steps(scheduler, listener.hear)
    twin = duplicate(scheduler)
    assert set(vars(twin)) == {"made"}
    twin.step(1)
    assert (twin.made, scheduler.made, listener.heard) == (1, 0, 0)


def test_a_copy_keeps_what_others_put_into_the_object() -> None:
    scheduler, listener = Scheduler(), Listener()
    scheduler.step = theirs = lambda *args: 7  # type: ignore[method-assign]
    count_steps(scheduler, listener.hear)
    assert copy.copy(scheduler).step is theirs
    around = scheduler.step
    scheduler.step = outer = lambda *args: around(*args)  # type: ignore[method-assign]
    assert copy.copy(scheduler).step is outer and "__reduce_ex__" not in vars(copy.copy(scheduler))


def test_a_shallow_copy_of_the_attributes_is_counted_by_itself() -> None:
    """Made without `copy`: its `step` would be that of the original."""
    scheduler, first, second = Scheduler(), Listener(), Listener()
    count_steps(scheduler, first.hear)
    twin = Scheduler()
    vars(twin).update(vars(scheduler))
    counted = count_steps(twin, second.hear)
    assert counted.scheduler is twin and scheduler.step is not twin.step
    twin.step(1)
    assert (twin.made, scheduler.made, first.heard, second.heard) == (1, 0, 0, 1)
    counted.drop(second.hear)
    assert not WRAPPED & set(vars(twin)) and set(vars(scheduler)) >= WRAPPED


class Listed(Scheduler, list):  # type: ignore[type-arg]
    """State of more than attributes."""


class Slotted(Scheduler):
    """State that is no dict."""

    __slots__ = ("kept",)


def made_again(*values: object) -> Scheduler:
    return Scheduler()


class Reducing(Scheduler):
    """Says itself what a copy is made of."""

    parts: Any = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.parts


def test_state_of_other_forms() -> None:
    listed, slotted, listener = Listed(), Slotted(), Listener()
    listed.extend([1, 2])
    count_steps(listed, listener.hear)
    assert copy.copy(listed) == [1, 2] and set(vars(copy.copy(listed))) == {"made"}
    slotted.kept = 5
    count_steps(slotted, listener.hear)
    assert slotted.__reduce_ex__(2) == object.__reduce_ex__(slotted, 2)


@pytest.mark.parametrize("parts", ["NAME", (made_again, ()), (made_again, (1,), None)])
def test_a_copy_without_attributes_is_left_alone(parts: Any) -> None:
    scheduler, listener = Reducing(), Listener()
    count_steps(scheduler, listener.hear)
    scheduler.parts = parts
    assert scheduler.__reduce_ex__(2) is parts


def test_attributes_alone() -> None:
    scheduler, listener = Reducing(), Listener()
    count_steps(scheduler, listener.hear)
    scheduler.parts = (made_again, (), dict(vars(scheduler), made=3))
    assert scheduler.__reduce_ex__(2) == (made_again, (), {"made": 3})


def test_a_copy_of_a_wrapper_around_ours_steps_the_copy() -> None:
    scheduler, listener = Scheduler(), Listener()
    count_steps(scheduler, listener.hear)
    twin = copy.deepcopy(functools.partial(scheduler.step, scale=2))
    assert twin(4) == 8 and (listener.heard, scheduler.made) == (0, 0)
    assert twin.func.__self__.made == 1


def test_a_step_with_attributes_keeps_them_to_itself() -> None:
    class Theirs:
        def __init__(self) -> None:
            self.scheduler, self.listeners = "theirs", ("theirs",)

        def __call__(self) -> int:
            return 7

    scheduler, listener = Scheduler(), Listener()
    scheduler.step = Theirs()  # type: ignore[method-assign, assignment]
    counted = count_steps(scheduler, listener.hear)
    assert counted.scheduler is scheduler and len(counted.listeners) == 1


def test_putting_back_takes_off_only_what_is_there() -> None:
    scheduler, listener = Scheduler(), Listener()
    counted = count_steps(scheduler, listener.hear)
    assert isinstance(scheduler.step, CountedStep)
    for _ in range(2):
        put_back(scheduler, counted)
        assert not WRAPPED & set(vars(scheduler))
