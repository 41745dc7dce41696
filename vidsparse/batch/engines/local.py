"""This process, a task after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vidsparse.batch.task import Outcome, Task
from vidsparse.batch.worker import Worker
from vidsparse.generate.model_files import InputError


def run(tasks: Sequence[Task], worker: Worker) -> Iterator[Outcome]:
    """As `vidsparse.batch` says."""
    asked = worker.resources
    if asked.workers not in (None, 1):
        raise InputError(
            f"--workers {asked.workers}: --engine local is this process alone; take --engine ray, "
            "or torchrun"
        )
    yield from map(worker, tasks)
