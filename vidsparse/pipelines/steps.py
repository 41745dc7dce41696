"""Step, number of steps, guidance branch, start of a run, without touching a pipeline's code.

step    counts calls of `scheduler.step` that follow a forward of a transformer. Forwards alone are
        skipped by caches and doubled by guidance and by Heun; timesteps repeat or are rescaled, and
        reading them would synchronise with the GPU. Two transformers share one count.
run     starts with a new `scheduler.timesteps` object, and after the end of a pipeline call.
branch  the name of the running `cache_context`; by order for pipelines that never enter one.

`step(index, total, branch)` outranks all of it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, get_args

from vidsparse.plan import Branch

MAX_FORWARDS = 8
"""Forwards without a counted step that are believed; guidance needs two or three."""

BRANCHES: dict[str, Branch] = {
    "cond": "cond",
    "pred_cond": "cond",
    "uncond": "uncond",
    "pred_uncond": "uncond",
    "cond_uncond": "both",
}
"""Names of cache contexts in diffusers."""


@dataclass(frozen=True)
class Position:
    """step: index of the denoising step, 0-based. steps: their number. branch: of the guidance."""

    step: int
    steps: int
    branch: Branch


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


class StepTracker:
    """Where in a run each transformer forward of one pipeline stands.

    pipe: held weakly. on_run: called when a run starts, before its first forward.
    branch_order: see `Adapter.branch_order`.
    """

    def __init__(
        self,
        pipe: Any,
        on_run: Callable[[], None],
        branch_order: Mapping[str, tuple[Branch, ...]],
    ) -> None:
        self.pipe = weakref.ref(pipe)
        self.on_run = on_run
        self.branch_order = branch_order.get(type(pipe).__name__, ())
        self.counted: _CountedStep | None = None
        self.source: object = None  # what a run is told by: a timesteps object, or a manual total
        self.index = self.forwards = 0

    def before_forward(self, context_name: str | None) -> Position:
        """Position of the forward about to run. context_name: of the running `cache_context`.

        Raises RuntimeError if the loop cannot be followed by counting.
        """
        manual = _manual.get()
        if manual is not None:
            same = isinstance(self.source, int) and self.source == manual.steps
            if not same or manual.step < self.index:
                self._start(manual.steps)
            self.index, self.forwards = manual.step, 0
            return manual
        pipe = self.pipe()
        if pipe is None:
            raise RuntimeError("the accelerated pipeline is gone, but its transformer still runs")
        self._follow(pipe.scheduler)
        if pipe.scheduler.timesteps is not self.source:
            self._start(pipe.scheduler.timesteps)
        steps = self._steps(pipe)
        if self.forwards >= MAX_FORWARDS or self.index >= steps:
            raise RuntimeError(
                f"vidsparse cannot follow this loop: {self.index} of {steps} steps counted, and "
                f"{self.forwards} forwards since, without {type(pipe.scheduler).__name__}.step of "
                "this pipeline; wrap each transformer call in `with vidsparse.step(index, total):`"
            )
        branch = self._branch(pipe, context_name)
        self.forwards += 1
        return Position(self.index, steps, branch)

    def end_run(self) -> None:
        """A pipeline call has ended: the next forward starts a run."""
        self.source = None

    def count(self) -> None:
        """The scheduler has stepped; only the first time after a forward matters."""
        if self.forwards:
            self.index += 1
            self.forwards = 0

    def detach(self) -> None:
        """Give the scheduler its own `step` back."""
        if self.counted is not None:
            self.counted.remove()
        self.counted = self.source = None

    def _start(self, source: object) -> None:
        self.source, self.index, self.forwards = source, 0, 0
        self.on_run()

    def _follow(self, scheduler: Any) -> None:
        """Count the steps of this scheduler, which may have been exchanged."""
        if self.counted is None or scheduler is not self.counted.scheduler:
            self.detach()
            self.counted = _CountedStep(scheduler, self.count)

    def _steps(self, pipe: Any) -> int:
        """Steps that this run executes; for video-to-video fewer than there are timesteps."""
        timesteps = pipe.scheduler.timesteps
        known = 0 if timesteps is None else len(timesteps)
        begin = getattr(pipe.scheduler, "begin_index", None)
        if isinstance(begin, int):
            return known - begin
        executed = getattr(pipe, "_num_timesteps", None)
        return executed if isinstance(executed, int) and 0 < executed <= known else known

    def _branch(self, pipe: Any, context_name: str | None) -> Branch:
        if context_name is not None and context_name not in BRANCHES:
            raise ValueError(
                f"cache_context({context_name!r}): no such guidance branch, there are "
                f"{', '.join(BRANCHES)}; use `with vidsparse.step(index, total, branch):`"
            )
        if context_name is not None:
            return BRANCHES[context_name]
        if self.branch_order and getattr(pipe, "do_classifier_free_guidance", False):
            return self.branch_order[self.forwards % len(self.branch_order)]
        return "single"


class _CountedStep:
    """`scheduler.step` of one scheduler, counted; it sits in the object, not in the class."""

    def __init__(self, scheduler: Any, on_step: Callable[[], None]) -> None:
        self.scheduler, self.on_step = scheduler, on_step
        self.replaced = scheduler.__dict__.get("step")
        self.original = scheduler.step
        functools.update_wrapper(self, self.original)  # pipelines look at the signature of step
        scheduler.step = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.original(*args, **kwargs)
        self.on_step()
        return out

    def remove(self) -> None:
        """Undo; if someone has wrapped us since, stay as a mere passage."""
        self.on_step = _nothing
        if self.scheduler.__dict__.get("step") is not self:
            return
        if self.replaced is None:
            del self.scheduler.step
        else:
            self.scheduler.step = self.replaced

    def __reduce__(self) -> Any:
        """A copied or pickled scheduler steps itself, uncounted."""
        return _own_step, (self.scheduler,)


def _own_step(scheduler: Any) -> Any:
    return type(scheduler).step.__get__(scheduler)


def _nothing() -> None:
    pass
