"""Step, number of steps, guidance branch, start of a run, without touching a pipeline's code.

A run belongs to the pipeline that runs (`runner.py`); a `Loop` says where it stands. Best first:

told     `step(index, total, branch)`; or the `step_index` and `num_inference_steps` that a
         `cache_context` carries.
counted  calls of `scheduler.step`, of the scheduler that the running pipeline has now, that follow
         a forward; or a new `_current_timestep` of the pipeline, or `step_index` of the scheduler
         (its `step` may have been taken before it was wrapped), after a forward, whichever shows
         first. Forwards alone are skipped by caches and doubled by guidance and by Heun; timesteps
         repeat or are rescaled, and reading them would synchronise with the GPU. Two transformers
         share one count.
run      starts with a new `scheduler.timesteps` object, unless the pipeline still walks through the
         old one (its scheduler was exchanged on the way), with a new list of the pipeline's own
         after the last item of one (diffusion forcing), and after the end of a pipeline call.
branch   from the name of the running `cache_context`; by order for pipelines that never enter one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from vidsparse.pipelines import private
from vidsparse.pipelines.loop import Loop, identity, shares_memory
from vidsparse.pipelines.position import Position, branch_of, manual_step, told_by
from vidsparse.pipelines.report import RunReport
from vidsparse.pipelines.runner import running_pipeline
from vidsparse.plan import Branch

GUIDED = 3
"""Forwards at one step that guidance needs, at most."""

MAX_FORWARDS = 8
"""Forwards at one step that are believed where nothing but `scheduler.step` tells steps apart."""


class Runs:
    """The loops and reports of all pipelines that run the transformers of one installation.

    owner: the pipeline that was accelerated, held weakly; forwards that no pipeline runs are its.
    open_report: called when a run starts, before its first forward, with the pipeline or None.
    branch_order: see `Adapter.branch_order`.
    """

    def __init__(
        self,
        owner: Any,
        open_report: Callable[[Any | None], RunReport],
        branch_order: Mapping[str, tuple[Branch, ...]],
    ) -> None:
        self.owner = weakref.ref(owner)
        self.open_report, self.branch_order = open_report, branch_order
        self.loops: WeakKeyDictionary[Any, Loop] = WeakKeyDictionary()
        self.reports: WeakKeyDictionary[Any, RunReport] = WeakKeyDictionary()
        self.local = threading.local()  # `loop`: the one that this thread steps by hand
        self.lock = threading.Lock()

    def before_forward(
        self, transformer: nn.Module, context: Any | None
    ) -> tuple[RunReport, Position]:
        """Report and position of the forward about to run. context: the running `CacheContext`.

        Raises RuntimeError if the loop cannot be followed.
        """
        running = running_pipeline(transformer)
        pipe = self.owner() if running is None else running
        name = getattr(context, "name", None)
        manual = manual_step.get()
        told = told_by(context)
        if manual is not None:
            loop = self._by_hand(pipe, manual.step, manual.steps)
            at = Position(manual.step, manual.steps, manual.branch, name)
        elif told is not None and running is None:
            loop = self._by_hand(pipe, *told)
            at = Position(*told, branch_of(str(name)), name)
        elif pipe is None:
            raise RuntimeError(
                "the accelerated pipeline is gone, and no other one runs its transformer here: "
                "wrap each transformer call in `with vidsparse.step(index, total):`"
            )
        else:
            loop = self._loop(pipe)
            at = self._place(loop, pipe, name, told, pipe is running)
        assert loop.report is not None
        return loop.report, at

    def end(self, transformer: nn.Module) -> None:
        """The running pipeline's call has ended; said by someone else, every loop has."""
        running = running_pipeline(transformer)
        if running is not None:
            ended = [self._loop(running)]
        else:
            ended = [loop for loop in self._all() if loop.pipe() is self.owner()]
        by_hand: Loop | None = getattr(self.local, "loop", None)
        if by_hand is not None and (running is None or by_hand.pipe() is running):
            ended.append(by_hand)
        for loop in ended:
            loop.end()

    def report(self, pipe: Any) -> RunReport | None:
        """Of the last run of a pipeline to start, or of the one that this thread steps by hand."""
        by_hand: Loop | None = getattr(self.local, "loop", None)
        if manual_step.get() is not None and by_hand is not None and by_hand.pipe() is pipe:
            return by_hand.report
        return self.reports.get(pipe)

    def detach(self) -> None:
        """Give every scheduler its own `step` back."""
        for loop in self._all():
            loop.leave()
        self.loops.clear()

    def _loop(self, pipe: Any) -> Loop:
        with self.lock:
            return self.loops.setdefault(pipe, Loop(pipe))

    def _all(self) -> list[Loop]:
        with self.lock:  # another thread may start one
            return list(self.loops.values())

    def _by_hand(self, pipe: Any | None, index: int, steps: int) -> Loop:
        """The loop of this thread that is told its steps."""
        loop: Loop | None = getattr(self.local, "loop", None)
        if loop is None or loop.pipe() is not pipe:
            loop = self.local.loop = Loop(pipe)
        if not loop.running or loop.steps != steps or index < loop.index:
            self._start(loop, pipe, steps)
        loop.tell(index)
        return loop

    def _start(self, loop: Loop, pipe: Any | None, steps: int, source: object = None) -> None:
        if loop.running and loop.report is not None:  # nobody has told the end of the last run
            loop.report.guard.look()
            loop.report.guard.tell(lost=True)
            if loop.forwards > GUIDED:
                loop.end()
        report = self.open_report(pipe)
        loop.start(report, steps, source)
        if pipe is not None:
            self.reports[pipe] = report

    def _place(
        self, loop: Loop, pipe: Any, name: str | None, told: tuple[int, int] | None, running: bool
    ) -> Position:
        """Position of a forward in the loop of a pipeline. running: it is the caller."""
        scheduler = getattr(pipe, "scheduler", None)
        source = identity(scheduler)
        moment = private.current_timestep(pipe) if running else None
        goes_on = loop.goes_on(source, moment)
        if told is not None:
            goes_on = goes_on and told[1] == loop.steps and told[0] >= loop.index
        if not goes_on:
            steps = told[1] if told is not None else _steps(pipe, scheduler, running, moment)
            self._start(loop, pipe, steps, source)
        loop.follow(scheduler)
        loop.at(moment, _walked(scheduler))
        if told is not None:
            loop.tell(told[0])
        elif loop.index >= loop.steps or (moment is None and loop.forwards >= MAX_FORWARDS):
            raise RuntimeError(
                f"vidsparse cannot follow this loop: {loop.index} of {loop.steps} steps counted, "
                f"and {loop.forwards} forwards since, without {type(scheduler).__name__}.step of "
                f"{type(pipe).__name__}; wrap each transformer call in `with vidsparse.step(index, "
                "total):`"
            )
        branch = branch_of(name) if name is not None else self._by_order(loop, pipe, running)
        loop.forwards += 1
        return Position(loop.index, loop.steps, branch, name, loop.forwards - 1)

    def _by_order(self, loop: Loop, pipe: Any, running: bool) -> Branch:
        """The branch of a forward without a context: by its number within the step."""
        classes = [cls.__name__ for cls in type(pipe).__mro__]
        order = next((self.branch_order[c] for c in classes if c in self.branch_order), ())
        if order and running and getattr(pipe, "do_classifier_free_guidance", False):
            return order[loop.forwards % len(order)]
        return "single"


def _walked(scheduler: Any) -> int:
    """The `step_index` of a scheduler: the one to begin at before its first step, 0 if unknown."""
    for name in ("step_index", "begin_index"):
        index = getattr(scheduler, name, None)
        if isinstance(index, int):
            return index
    return 0


def _steps(pipe: Any, scheduler: Any, running: bool, moment: object) -> int:
    """Steps that this run executes; for video-to-video fewer than there are timesteps. More of them
    only where the pipeline, at `moment`, walks through a list of its own.

    Raises RuntimeError if the scheduler has no timesteps.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None:
        raise RuntimeError(
            f"the scheduler of this {type(pipe).__name__} ({type(scheduler).__name__}) has no "
            "timesteps, so vidsparse cannot tell the step: call set_timesteps, or wrap each "
            "transformer call in `with vidsparse.step(index, total):`"
        )
    known = len(timesteps)
    begin = getattr(scheduler, "begin_index", None)
    if isinstance(begin, int):
        return known - begin
    executed = private.executed_steps(pipe) if running else None
    if not isinstance(executed, int) or executed < 1:
        return known
    own = moment is not None and not shares_memory(moment, timesteps)
    return executed if executed <= known or own else known
