"""What goes between a batch, its engine and its workers; all of it can be pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vidsparse.generate.request import Request

Status = Literal["made", "there", "failed", "busy", "unfit"]


class Broken(RuntimeError):
    """Workers are gone, and with them what they were making; why, in one line."""


class Unfit(ValueError):
    """A worker cannot make any task, as its pipeline cannot be loaded; why, in one line."""


@dataclass(frozen=True)
class Task:
    """A job, light: a worker prepares it again.

    id: of the job, as planned. request: what is asked for; its `out` is the folder. size: height,
    width, frames. model: its name. compares: the dense pipeline runs too.
    """

    id: str
    request: Request
    preset: str
    size: tuple[int, int, int]
    steps: int
    tokens: int

    @property
    def folder(self) -> Path:
        """Of the job."""
        return Path(str(self.request.out))

    @property
    def name(self) -> str:
        """<preset>/<job>, as a person sees it."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def scene(self) -> tuple[Any, ...]:
        """All but the method: tasks of one scene are compared with one dense video."""
        asked = self.request
        return asked.prompt, asked.seed, self.size, self.steps, asked.image, asked.last_image


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    status: made; there: it was complete; failed; busy: another run is making it; unfit: the worker
    can make none. figures: as `summary.figures`, of a task that is done. error: one line. tries:
    how often it was begun. seconds: of the worker. worker: host:process.
    """

    id: str
    status: Status
    error: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    tries: int = 0
    seconds: float = 0.0
    worker: str = ""


@dataclass(frozen=True)
class Resources:
    """What workers run on; None leaves the choice to the engine.

    workers: how many processes. gpus: share of a GPU for each, > 0. device: cpu or cuda.
    address: of a running cluster.
    """

    device: str
    workers: int | None = None
    gpus: float | None = None
    address: str | None = None
