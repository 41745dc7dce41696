"""Step, number of steps, guidance branch, start of a run, without touching a pipeline's code.

A run belongs to the pipeline that runs (`runner.py`); a `Loop` says where it stands. Best first:

told     `step(index, total, branch)`; or the `step_index` and `num_inference_steps` that a
         `cache_context` carries.
counted  calls of `scheduler.step`, of the scheduler that the running pipeline has now, that follow
         a forward; or a new `_current_timestep` of the pipeline after a forward, whichever shows
         first. Forwards alone are skipped by caches and doubled by guidance and by Heun; timesteps
         repeat or are rescaled, and reading them would synchronise with the GPU. Two transformers
         share one count.
run      starts with a new `scheduler.timesteps` object, unless the pipeline still walks through the
         old one (its scheduler was exchanged on the way), and after the end of a pipeline call.
branch   from the name of the running `cache_context`; by order for pipelines that never enter one.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, get_args
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from vidsparse.pipelines.counted import CountedStep, count_steps
from vidsparse.pipelines.report import RunReport
from vidsparse.pipelines.runner import running_pipeline
from vidsparse.plan import Branch

GUIDED = 3
"""Forwards at one step that guidance needs, at most."""

MAX_FORWARDS = 8
"""Forwards at one step that are believed where nothing but `scheduler.step` tells steps apart."""


@dataclass(frozen=True)
class Position:
    """step: index of the denoising step, 0-based. steps: their number. branch: of the guidance.
    context_name: of the running `cache_context`, as the pipeline gave it.
    """

    step: int
    steps: int
    branch: Branch
    context_name: str | None = None


_manual: ContextVar[Position | None] = ContextVar("vidsparse_step", default=None)


@contextmanager
def step(index: int, total: int, branch: Branch = "single") -> Iterator[None]:
    """Say to which step the transformer calls inside belong, for loops of your own.

    index: denoising step, 0 .. total - 1. total: number of steps. branch: cond | uncond | both |
    single. A new run starts when the index falls or the total changes.

        for i, t in enumerate(timesteps):
            with vidsparse.step(i, len(timesteps)):
                noise = pipe.transformer(latents, t, text)[0]
    """
    for number in (index, total):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"step({index!r}, {total!r}): expected two integers")
    if not 0 <= index < total:
        raise ValueError(f"step({index}, {total}): allowed is 0 <= index < total")
    if branch not in get_args(Branch):
        raise ValueError(f"step branch={branch!r}: allowed is {', '.join(get_args(Branch))}")
    token = _manual.set(Position(index, total, branch))
    try:
        yield
    finally:
        _manual.reset(token)


def branch_of(context_name: str) -> Branch:
    """Guidance branch of a `cache_context`. Pipelines invent names, so none is refused."""
    if "cond_uncond" in context_name:
        return "both"
    return "uncond" if "uncond" in context_name else "cond"


class Loop:
    """Where in its run one denoising loop stands.

    pipe: whose loop it is, held weakly; None for a loop that no pipeline runs.
    """

    def __init__(self, pipe: Any | None) -> None:
        self.pipe: Callable[[], Any] = _nothing if pipe is None else weakref.ref(pipe)
        self.report: RunReport | None = None
        self.running = False  # between the first forward of a run and its end
        self.source: object = None  # the timesteps object that the run walks through
        self.named: object = None  # the one that its scheduler has now
        self.moment: object = None  # `_current_timestep` of the pipeline at the last forward
        self.told = False
        self.steps = self.index = self.forwards = 0
        self.counted: CountedStep | None = None

    def start(self, report: RunReport, steps: int, source: object = None) -> None:
        """A run starts."""
        self.report, self.steps = report, steps
        self.source = self.named = source
        self.running, self.told, self.moment = True, False, None
        self.index = self.forwards = 0

    def goes_on(self, source: object, moment: object) -> bool:
        """Whether the run still runs. source: timesteps of its scheduler now; moment: as in `at`.

        They are the ones that it started with, or its scheduler was exchanged on the way and the
        pipeline has come to another item of those that it started with.
        """
        if not self.running:
            return False
        counts = isinstance(source, int) and isinstance(self.named, int)
        if source is self.named or (counts and source == self.named):
            return True
        walks = moment is not self.moment and _shares_memory(moment, self.source)
        self.named = source if walks else self.named
        return walks

    def tell(self, index: int) -> None:
        """The step is known from outside."""
        self.index, self.told = index, True
        self.forwards = 0

    def follow(self, scheduler: Any) -> None:
        """Count the steps of this scheduler, which may have been exchanged."""
        if self.counted is None or self.counted.scheduler is not scheduler:
            self.leave()
            if hasattr(scheduler, "step"):
                self.counted = count_steps(scheduler, self.count)

    def leave(self) -> None:
        """Give the scheduler its own `step` back."""
        counted, self.counted = self.counted, None
        if counted is not None:
            counted.drop(self.count)

    def at(self, moment: object) -> None:
        """The pipeline is at this `_current_timestep`; another one after a forward is a step."""
        if moment is not self.moment:
            if self.moment is not None:
                self.count()
            self.moment = moment

    def count(self) -> None:
        """A step was made; only the first time after a forward matters."""
        if self.forwards:
            self.index += 1
            self.forwards = 0

    def end(self) -> None:
        """The pipeline call has ended: the next forward starts a run.

        Warns if the run had more steps than were counted because none ever showed. Tells whether
        its attention was finite (`Guard.tell`).
        """
        running, self.running = self.running, False
        uncounted = running and not self.told and not self.index and self.forwards
        self.source = self.named = self.moment = None
        self.leave()
        if uncounted and self.steps > 1:
            name = type(self.pipe()).__name__
            warnings.warn(
                f"vidsparse has counted no step in this run of {name}: its {self.forwards} "
                f"forwards ran as step 0 of {self.steps}, where a preset may keep attention dense "
                "(see run_report). The loop does not call `step` of its pipeline's scheduler: wrap "
                "each transformer call in `with vidsparse.step(index, total):`",
                RuntimeWarning,
                stacklevel=2,
            )
        if running and self.report is not None:
            self.report.guard.look()
            self.report.guard.tell()


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
        manual = _manual.get()
        told = _told(context)
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
            ended = [loop for loop in list(self.loops.values()) if loop.pipe() is self.owner()]
        by_hand: Loop | None = getattr(self.local, "loop", None)
        if by_hand is not None and (running is None or by_hand.pipe() is running):
            ended.append(by_hand)
        for loop in ended:
            loop.end()

    def report(self, pipe: Any) -> RunReport | None:
        """Of the last run of a pipeline to start, or of the one that this thread steps by hand."""
        by_hand: Loop | None = getattr(self.local, "loop", None)
        if _manual.get() is not None and by_hand is not None and by_hand.pipe() is pipe:
            return by_hand.report
        return self.reports.get(pipe)

    def detach(self) -> None:
        """Give every scheduler its own `step` back."""
        for loop in list(self.loops.values()):
            loop.leave()
        self.loops.clear()

    def _loop(self, pipe: Any) -> Loop:
        with self.lock:
            return self.loops.setdefault(pipe, Loop(pipe))

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
        source = _identity(scheduler)
        moment = getattr(pipe, "_current_timestep", None) if running else None
        goes_on = loop.goes_on(source, moment)
        if told is not None:
            goes_on = goes_on and told[1] == loop.steps and told[0] >= loop.index
        if not goes_on:
            steps = told[1] if told is not None else _steps(pipe, scheduler, running)
            self._start(loop, pipe, steps, source)
        loop.follow(scheduler)
        loop.at(moment)
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
        return Position(loop.index, loop.steps, branch, name)

    def _by_order(self, loop: Loop, pipe: Any, running: bool) -> Branch:
        """The branch of a forward without a context: by its number within the step."""
        classes = [cls.__name__ for cls in type(pipe).__mro__]
        order = next((self.branch_order[c] for c in classes if c in self.branch_order), ())
        if order and running and getattr(pipe, "do_classifier_free_guidance", False):
            return order[loop.forwards % len(order)]
        return "single"


def _told(context: Any | None) -> tuple[int, int] | None:
    """Step and number of steps that a `CacheContext` carries."""
    index, total = (getattr(context, n, None) for n in ("step_index", "num_inference_steps"))
    given = all(isinstance(x, int) and not isinstance(x, bool) for x in (index, total))
    return (index, total) if given and 0 <= index < total else None  # type: ignore


def _identity(scheduler: Any) -> object:
    """What tells the runs of a scheduler apart: its timesteps, or their number if they are made
    anew whenever one asks."""
    timesteps: Any = getattr(scheduler, "timesteps", None)
    return timesteps if timesteps is getattr(scheduler, "timesteps", None) else len(timesteps)


def _shares_memory(moment: object, source: object) -> bool:
    """Whether a timestep is an item of these timesteps."""
    if not isinstance(moment, Tensor) or not isinstance(source, Tensor):
        return False
    return moment.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()


def _steps(pipe: Any, scheduler: Any, running: bool) -> int:
    """Steps that this run executes; for video-to-video fewer than there are timesteps.

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
    executed = getattr(pipe, "_num_timesteps", None) if running else None
    return executed if isinstance(executed, int) and 0 < executed <= known else known


def _nothing() -> None:
    return None
