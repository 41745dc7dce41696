"""`scheduler.step`, counted: one wrapper for each scheduler, however many runs listen to it.

It sits in the object, not in its class, and only while somebody listens.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

_lock = threading.RLock()  # a listener may be collected, which takes it off, at any moment


class CountedStep:
    """`step` of one scheduler; calls every listener after each step.

    Listeners are bound methods, held weakly.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.replaced = vars(scheduler).get("step")
        self.original = scheduler.step
        self.listeners: tuple[weakref.WeakMethod[Callable[[], None]], ...] = ()
        # Pipelines look at the signature of step. Not its __dict__: it may be a wrapper with state.
        functools.update_wrapper(self, self.original, updated=())
        scheduler.step = self
        scheduler.__reduce_ex__ = self.reduce

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.original(*args, **kwargs)
        for reference in self.listeners:
            listener = reference()
            if listener is not None:
                listener()
        return out

    def drop(self, listener: object) -> None:
        """Take a listener (a bound method) off, and those that are gone; with the last one, undo.

        If someone has wrapped us since, we stay as a mere passage.
        """
        with _lock:
            kept = [r for r in self.listeners if r() not in (None, listener)]
            self.listeners = tuple(kept)
            if not kept:
                put_back(self.scheduler, self)

    def reduce(self, protocol: Any) -> Any:
        """Stands in for `__reduce_ex__`: a copied or pickled scheduler is as it was without us.

        Else a shallow copy would step the original.
        """
        scheduler = self.scheduler
        made: Any = type(scheduler).__reduce_ex__(scheduler, protocol)  # type: ignore[call-arg]
        if not isinstance(made, tuple) or len(made) < 3 or not isinstance(made[2], dict):
            return made
        ours = {"step", "__reduce_ex__"} if made[2].get("step") is self else {"__reduce_ex__"}
        state = {name: value for name, value in made[2].items() if name not in ours}
        if "step" in ours and self.replaced is not None:
            state["step"] = self.replaced
        return (*made[:2], state, *made[3:])

    def __reduce__(self) -> Any:
        """A copy of someone's wrapper around us is one around the step that we count."""
        return _itself, (self.original,)


def count_steps(scheduler: Any, listener: Callable[[], None]) -> CountedStep:
    """Call `listener`, a bound method, after each `scheduler.step` until it is dropped or gone."""
    with _lock:
        step = vars(scheduler).get("step")
        if isinstance(step, CountedStep) and step.scheduler is not scheduler:
            put_back(scheduler, step)  # a shallow copy: this is the step of the original
            step = None
        counted = step if isinstance(step, CountedStep) else CountedStep(scheduler)
        counted.listeners += (weakref.WeakMethod(listener, counted.drop),)
        return counted


def put_back(scheduler: Any, counted: CountedStep) -> None:
    """Take a wrapper off a scheduler, unless someone has wrapped it since."""
    held = vars(scheduler)
    if held.get("step") is counted:
        if counted.replaced is None:
            del scheduler.step
        else:
            scheduler.step = counted.replaced
    reduce = held.get("__reduce_ex__")
    if getattr(reduce, "__func__", None) is CountedStep.reduce:
        del scheduler.__reduce_ex__


def _itself(step: Callable[..., Any]) -> Callable[..., Any]:
    return step
