"""What is found by its file: methods of the stages, executors, engines.

`vidsparse/<stage>/<name>.py` is the method <name> of that stage in YAML. In `vidsparse/kernels` a
file with an `EXECUTOR`, or a folder with an `executor.py` that has one, is an executor. A file of
`vidsparse/kernels/gpu/exact` is an exact engine of the executor for GPUs, one of
`vidsparse/batch/engines` an engine of `vidsparse batch`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType
from typing import Any

ENGINES = "vidsparse.kernels.gpu.exact"
BATCH = "vidsparse.batch.engines"
STAGES = ("layout", "pattern", "estimator", "selector", "compensation", "schedule")


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
    return module(f"vidsparse.{stage}.{name}")


@cache
def module(name: str) -> ModuleType:
    """An imported module: `importlib.import_module` of one that is there takes 5 microseconds."""
    return importlib.import_module(name)


@cache
def executors() -> dict[str, Any]:
    """All executors (`vidsparse.kernels.executor`) by name, sorted."""
    package = importlib.import_module("vidsparse.kernels")
    found = {}
    for entry in pkgutil.iter_modules(package.__path__, "vidsparse.kernels."):
        name = f"{entry.name}.executor" if entry.ispkg else entry.name
        executor = getattr(importlib.import_module(name), "EXECUTOR", None)
        if executor is not None:
            found[executor.name] = executor
    return dict(sorted(found.items()))


def executor(name: str) -> Any:
    """One executor. Raises ValueError with the existing names if there is none."""
    if name not in executors():
        raise ValueError(f"impl {name!r}: no such executor; there are {', '.join(executors())}")
    return executors()[name]


def implementations() -> tuple[str, ...]:
    """What `impl` may say: auto, or the name of an executor."""
    return ("auto", *executors())


@cache
def engines() -> tuple[str, ...]:
    """Names of the exact engines (`vidsparse.kernels.gpu.exact`), sorted."""
    package = importlib.import_module(ENGINES)
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__)))


def engine(name: str) -> Any:
    """One exact engine. Raises ValueError with the existing names if there is none."""
    if name not in engines():
        raise ValueError(f"kernel.engine={name!r}: allowed are auto, {', '.join(engines())}")
    return module(f"{ENGINES}.{name}").ENGINE


@cache
def batch_engines() -> tuple[str, ...]:
    """Names of the engines of `vidsparse batch`, sorted."""
    package = importlib.import_module(BATCH)
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__)))


def batch_engine(name: str) -> ModuleType:
    """The module of one of them. Raises ValueError with the existing names if there is none."""
    if name not in batch_engines():
        raise ValueError(f"--engine {name}: no such engine; there are {', '.join(batch_engines())}")
    return importlib.import_module(f"{BATCH}.{name}")
