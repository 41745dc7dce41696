"""A method is a file: `vidsparse/<stage>/<name>.py` is the method <name> of that stage in YAML."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

STAGES = ("layout", "estimator", "selector", "compensation", "schedule")


@cache
def methods(stage: str) -> tuple[str, ...]:
    """Names of the methods of a stage, sorted."""
    package = importlib.import_module(f"vidsparse.{stage}")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__)))


def method(stage: str, name: str) -> ModuleType:
    """The module of one method. Raises ValueError with the existing names if there is none."""
    if name not in methods(stage):
        raise ValueError(
            f"{stage}.name={name!r}: no such method; there are {', '.join(methods(stage))}"
        )
    return importlib.import_module(f"vidsparse.{stage}.{name}")
