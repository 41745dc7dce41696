"""One denoising loop: where in its run it stands, whether that goes on, what its end says."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from vidsparse.pipelines.counted import CountedStep, count_steps
from vidsparse.pipelines.report import RunReport


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
        self.first: object = None  # `_current_timestep` of the pipeline at the first forward
        self.moment: object = None  # the same at the last forward
        self.walked = 0  # `step_index` of its scheduler at the last forward
        self.told = False
        self.steps = self.index = self.forwards = 0
        self.counted: CountedStep | None = None

    def start(self, report: RunReport, steps: int, source: object = None) -> None:
        """A run starts."""
        if self.report is not None:
            self.report.memory.clear()
        self.report, self.steps = report, steps
        self.source = self.named = source
        self.running, self.told, self.first, self.moment = True, False, None, None
        self.index = self.forwards = 0

    def goes_on(self, source: object, moment: object) -> bool:
        """Whether the run still runs. source: timesteps of its scheduler now; moment: as in `at`.

        They are the ones that it started with, or its scheduler was exchanged on the way and the
        pipeline has come to another item of those that it started with. A pipeline may walk through
        a list of its own; after the last step, an item of another list is the next run.
        """
        if not self.running or (self._walked_all() and not shares_memory(moment, self.first)):
            return False
        counts = isinstance(source, int) and isinstance(self.named, int)
        if source is self.named or (counts and source == self.named):
            return True
        walks = moment is not self.moment and shares_memory(moment, self.source)
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

    def at(self, moment: object, walked: int) -> None:
        """A forward, at this `_current_timestep` and `step_index`; others than before are a step.

        moment: None if it is not known.
        """
        moved = self.moment is not None and moment is not self.moment
        if moved or walked != self.walked:
            self.count()
        self.first = moment if self.first is None else self.first
        self.moment, self.walked = moment, walked

    def _walked_all(self) -> bool:
        """Whether every step had a forward, and all of them were at items of one list."""
        done = self.index + (self.forwards > 0) >= self.steps
        return done and self.steps > 1 and shares_memory(self.moment, self.first)

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
        self.source = self.named = self.first = self.moment = None
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
        if self.report is not None:
            self.report.memory.clear()
        if running and self.report is not None:
            self.report.settle()
            self.report.guard.look()
            self.report.guard.tell()


def identity(scheduler: Any) -> object:
    """What tells the runs of a scheduler apart: its timesteps, or their number if they are made
    anew whenever one asks."""
    timesteps: Any = getattr(scheduler, "timesteps", None)
    return timesteps if timesteps is getattr(scheduler, "timesteps", None) else len(timesteps)


def shares_memory(moment: object, source: object) -> bool:
    """Whether a timestep is an item of these timesteps, or of the same ones as another timestep."""
    if not isinstance(moment, Tensor) or not isinstance(source, Tensor):
        return False
    return moment.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()


def _nothing() -> None:
    return None
