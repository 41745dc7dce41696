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
from typing import Any

from torch import nn

from vidsparse.pipelines import eager

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
            values = frame.f_locals
            for name in code.co_varnames[:2]:
                if name in names and holds(values.get(name), transformer):
                    return values[name]
        frame = frame.f_back  # type: ignore[assignment]
    return None


def holds(thing: object, transformer: nn.Module) -> bool:
    """Whether an object has a scheduler and the transformer among its own attributes."""
    held = getattr(thing, "__dict__", None)
    if not isinstance(held, dict) or "scheduler" not in held or type(thing).__hash__ is None:
        return False
    modules = [value for value in held.values() if isinstance(value, nn.Module)]
    return any(eager(module) is transformer for module in modules)
