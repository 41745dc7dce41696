"""Where in a run a forward stands, and who may say so: a `step` block or a `cache_context`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, get_args

from vidsparse.plan import Branch


@dataclass(frozen=True)
class Position:
    """step: index of the denoising step, 0-based. steps: their number. branch: of the guidance.
    context_name: of the running `cache_context`, as the pipeline gave it. forward: number of the
    forward within the step, 0-based; 0 where the steps are told from outside.
    """

    step: int
    steps: int
    branch: Branch
    context_name: str | None = None
    forward: int = 0


manual_step: ContextVar[Position | None] = ContextVar("vidsparse_step", default=None)


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
    token = manual_step.set(Position(index, total, branch))
    try:
        yield
    finally:
        manual_step.reset(token)


def branch_of(context_name: str) -> Branch:
    """Guidance branch of a `cache_context`. Pipelines invent names, so none is refused."""
    if "cond_uncond" in context_name:
        return "both"
    return "uncond" if "uncond" in context_name else "cond"


def told_by(context: Any | None) -> tuple[int, int] | None:
    """Step and number of steps that a `CacheContext` carries."""
    index, total = (getattr(context, n, None) for n in ("step_index", "num_inference_steps"))
    if isinstance(index, bool) or isinstance(total, bool):
        return None
    if not isinstance(index, int) or not isinstance(total, int):
        return None
    return (index, total) if 0 <= index < total else None
