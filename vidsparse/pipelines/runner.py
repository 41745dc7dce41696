"""Which pipeline runs a forward: the nearest caller that holds the transformer and a scheduler.

One transformer serves many pipelines: `copy.copy(pipe)` for each request, `X.from_pipe(pipe)`,
`X(**pipe.components)`, another class on the same weights, two threads at once. None of them tells
its transformer who it is. But their call is still running: the pipeline is `self` of a caller
(`components` in a modular pipeline). So the answer is of this thread, is right inside callbacks and
nested runs, holds under torch.compile, whose graph breaks keep the callers, and keeps nothing alive
longer than the call that it was found in.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import nn

from vidsparse.pipelines.adapter import eager

NAMES = frozenset({"self", "components", "pipe", "pipeline"})
"""What functions call the pipeline that they run; other functions are not looked into."""

PASSED = frozenset({"torch", "vidsparse", "accelerate"})
"""Packages whose own frames stand between a transformer and its pipeline."""


def running_pipeline(transformer: nn.Module) -> Any | None:
    """The pipeline whose code called `transformer`, or None.

    A pipeline is what holds the transformer (or its compiled wrapper) and a scheduler as attributes
    of its own: no base class is asked for. It must be the first or second argument of a caller.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        names = NAMES.intersection(code.co_varnames[: min(code.co_argcount, 2)])
        if names and frame.f_globals.get("__name__", "").partition(".")[0] not in PASSED:
            for value in _first(frame, names):
                if holds(value, transformer):
                    return value
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _first(frame: FrameType, names: frozenset[str]) -> list[Any]:
    """The values of those of the first two arguments of a function that bear these names.

    Before Python 3.13, `f_locals` is a dictionary that the frame keeps. What it holds would live as
    long as the pipeline's call (the last latents while the VAE decodes), so it is emptied, unless
    someone else, who has called `locals()`, holds it too.
    """
    held, values = frame.f_locals, []
    for name in frame.f_code.co_varnames[:2]:
        if name in names and name in held:
            values.append(held[name])
    if type(held) is dict and sys.getrefcount(held) <= OURS:
        held.clear()
    return values


OURS = 3
"""References to the locals of a frame that we look at: its own, ours, and that of the question."""


def holds(thing: object, transformer: nn.Module) -> bool:
    """Whether an object has a scheduler and the transformer among its own attributes."""
    held = getattr(thing, "__dict__", None)
    if not isinstance(held, dict) or "scheduler" not in held or type(thing).__hash__ is None:
        return False
    modules = [value for value in held.values() if isinstance(value, nn.Module)]
    return any(eager(module) is transformer for module in modules)
