"""Pipelines, schedulers and reports without a model, as `Runs` meets them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from vidsparse.memory import Memory
from vidsparse.pipelines.steps import Runs


class Report:
    """Stands in for a report and its guard."""

    def __init__(self) -> None:
        self.guard, self.acts, self.memory = self, [], Memory()

    def look(self) -> None:
        self.acts.append("look")

    def tell(self, lost: bool = False) -> None:
        self.acts.append("lost" if lost else "tell")

    def settle(self) -> None:
        """Nothing is shared with other processes."""


class Scheduler:
    def __init__(self, steps: int = 4) -> None:
        self.step_index: Any = None
        self.begin_index: Any = None
        self.set_timesteps(steps)

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = torch.arange(float(steps))

    def step(self) -> None:
        pass


class Pipeline:
    """Its forwards ask `runs`, as those of an accelerated transformer do."""

    def __init__(self, steps: int = 4, transformer: nn.Module | None = None) -> None:
        self.transformer = transformer or nn.Identity()
        self.scheduler = Scheduler(steps)

    def forward(self, runs: Runs, context: Any = None) -> Any:
        return asked(runs, self.transformer, context)

    def end(self, runs: Runs) -> None:
        runs.end(self.transformer)


def asked(runs: Runs, transformer: nn.Module, context: Any = None) -> Any:
    """(step, steps, branch, number in the step) of a forward."""
    report, at = runs.before_forward(transformer, context)
    assert isinstance(report, Report)
    return at.step, at.steps, at.branch, at.forward


def made(steps: int = 4) -> tuple[Pipeline, Runs]:
    pipe = Pipeline(steps)
    return pipe, Runs(pipe, lambda pipe: Report(), {})  # type: ignore[arg-type, return-value]


def told(index: int, total: int, name: str = "cond") -> Any:
    return SimpleNamespace(name=name, step_index=index, num_inference_steps=total)
