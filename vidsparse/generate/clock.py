"""When the steps of a run end, and who is told."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from time import perf_counter, process_time
from typing import Any

import torch
from torch import nn

from vidsparse.accelerate import run_report
from vidsparse.generate.job import Job
from vidsparse.interrupts import check
from vidsparse.pipelines.recognition import adapter_for


class Listener:
    """Is told what a run does while it works; this one ignores it."""

    def say(self, text: str) -> None:
        """Something begins, or is worth knowing."""

    def job(self, job: Job) -> None:
        """This is what will be done."""

    def begin(self, arm: str, steps: int) -> None:
        """An arm, "dense" or "sparse", begins."""

    def step(self, done: int, density: float) -> None:
        """A step has ended. density: mean of its self-attention calls, dense ones counting 1."""

    def end(self) -> None:
        """The arm has ended, or was broken off."""


class StepClock:
    """When the steps of a denoising loop ended; the first mark is the first transformer forward.

    A pipeline that calls nobody back at the end of a step moves its progress bar.
    """

    def __init__(self, pipe: Any, sparse: bool, listener: Listener) -> None:
        self.pipe, self.sparse, self.listener = pipe, sparse, listener
        self.marks: list[float] = []
        self.cpu_marks: list[float] = []
        self.density: list[float] = []
        self.seen = 0  # calls of the report that earlier steps have counted

    @contextmanager
    def running(self) -> Iterator[dict[str, Any]]:
        """The transformers are watched inside; yields arguments for the call of the pipeline."""
        transformers: list[nn.Module] = [*adapter_for(self.pipe).transformers(self.pipe).values()]
        handles = [m.register_forward_pre_hook(self._forward, prepend=True) for m in transformers]
        callback = "callback_on_step_end"
        told: dict[str, Any] = {callback: self.step_end, f"{callback}_tensor_inputs": []}
        if callback not in inspect.signature(self.pipe.__call__).parameters:
            self.pipe.progress_bar, told = partial(_Bar, self), {}
        try:
            yield told
        finally:
            vars(self.pipe).pop("progress_bar", None)
            for handle in handles:
                handle.remove()
            self.listener.end()

    def step_end(
        self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        """`callback_on_step_end` of a pipeline."""
        self._mark()
        density = 1.0
        if self.sparse:
            calls = run_report(pipe).calls
            fresh, self.seen = calls[self.seen :], len(calls)
            density = fmean(1.0 if c.reason else c.mean_density for c in fresh) if fresh else 1.0
        self.density.append(density)
        check()  # an interrupt that a library has swallowed
        self.listener.step(step + 1, density)
        return tensors

    def _forward(self, module: nn.Module, args: Any) -> None:
        if not self.marks:
            self._mark()

    def _mark(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(perf_counter())
        self.cpu_marks.append(process_time())


class _Bar:
    """What a pipeline shows its progress with: `with bar: ...; bar.update()`."""

    def __init__(self, clock: StepClock, iterable: Any = None, total: int | None = None) -> None:
        self.clock, self.iterable, self.steps = clock, iterable, 0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            yield item
            self.update()

    def update(self, steps: int = 1) -> None:
        """A step has ended."""
        self.steps += steps
        self.clock.step_end(self.clock.pipe, self.steps - 1, None, {})
