"""Worker: makes tasks one after the other, the same in every engine and process."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from vidsparse.batch.claims import begin, claimed, end
from vidsparse.batch.failures import forget_failure, read_failure, write_failure
from vidsparse.batch.summary import figures
from vidsparse.batch.task import Outcome, Resources, Task, Unfit
from vidsparse.generate.clock import Listener
from vidsparse.generate.model_files import first_line
from vidsparse.jobs.layout import read_finished


class Maker(Protocol):
    """What makes a task: `making.Pipeline`."""

    def __call__(self, task: Task, device: str, listener: Listener) -> dict[str, Any]:
        """Write the folder of a task; returns its sidecar."""

    def relieve(self) -> None:
        """Called after a failure."""


@dataclass
class Worker:
    """Of a run in a folder.

    make: kept by the worker. home: folder of the batch. run: id of the run. retries: how often a
    task that failed is tried again. waits: for tasks that another run is making. listener: is told
    of steps, in the process of the command alone.
    """

    make: Maker
    home: Path
    run: str
    resources: Resources
    retries: int = 1
    waits: bool = False
    listener: Listener = field(default_factory=Listener)
    unfit: str = ""

    @property
    def device(self) -> str:
        """On which it works."""
        return self.resources.device

    def on(self, device: str) -> Worker:
        """A copy for a device, without a listener: what an engine sends to another process."""
        resources = replace(self.resources, device=device)
        return replace(self, resources=resources, listener=Listener())

    def __call__(self, task: Task) -> Outcome:
        """Make a task, unless it is there or another run has it. Interrupts come through."""
        start, name = perf_counter(), f"{socket.gethostname()}:{os.getpid()}"
        if self.unfit:
            return Outcome(task.id, "unfit", self.unfit, worker=name)
        try:
            with claimed(self.home, task.id, waits=self.waits) as ours:
                if not ours:
                    return Outcome(task.id, "busy", worker=name)
                found = self._owned(task, name)
        except Unfit as error:
            self.unfit = str(error)
            return Outcome(task.id, "unfit", self.unfit, worker=name)
        except OSError as error:  # of the claims
            found = Outcome(task.id, "failed", f"cannot be claimed: {first_line(error)}")
        return replace(found, seconds=perf_counter() - start, worker=name)

    def look(self, task: Task) -> Outcome | None:
        """What the disk says of a task, however it was made; None: nothing yet in this run."""
        sidecar = read_finished(task.folder, task.id)
        if sidecar is not None:
            return Outcome(task.id, "made", figures=figures(sidecar))
        failure = read_failure(self.home, task)
        if failure is None or failure["run"] != self.run:
            return None
        return Outcome(
            task.id, "failed", failure["error"], {}, failure["tries"], 0.0, failure["worker"]
        )

    def _owned(self, task: Task, name: str) -> Outcome:
        """Of a task that is claimed. Raises Unfit, OSError of the claims."""
        sidecar = read_finished(task.folder, task.id)
        if sidecar is not None:
            self._done(task)
            return Outcome(task.id, "there", figures=figures(sidecar))
        while True:
            tries = begin(self.home, task.id, self.run)
            if tries > self.retries + 1:  # not one of the tries came to an end
                tries, again, trace = tries - 1, False, ""
                why = "the process that made it died, as often as it was begun"
            else:
                try:
                    content = self.make(task, self.device, self.listener)
                    self._done(task)
                    return Outcome(task.id, "made", figures=figures(content), tries=tries)
                except Unfit:
                    raise
                except Exception as error:  # not kept: its frames hold the memory of the try
                    why, trace = _why(error), "".join(traceback.format_exception(error))
                    again = tries <= self.retries and not _of_the_disk(error)
            self.make.relieve()
            if again:
                continue
            with suppress(OSError):  # a disk that is full takes no notes; the outcome says it
                write_failure(self.home, task, why, trace, self.run, tries, name)
            end(self.home, task.id, done=False)
            return Outcome(task.id, "failed", why, tries=tries)

    def _done(self, task: Task) -> None:
        forget_failure(self.home, task)
        end(self.home, task.id, done=True)


def work(tasks: Sequence[Task], worker: Worker) -> Iterator[Outcome]:
    """One worker on tasks of its own: first those that no other run has, then it waits."""
    busy = []
    for task in tasks:
        outcome = worker(task)
        if outcome.status == "busy":
            busy.append(task)
        else:
            yield outcome
    worker.waits = True
    yield from map(worker, busy)


def _why(error: Exception) -> str:
    """One line; of a user's mistake its text, of another error its kind too."""
    return (
        str(error)
        if isinstance(error, ValueError) and "\n" not in str(error)
        else first_line(error)
    )


def _of_the_disk(error: BaseException) -> bool:
    """After such a failure computing it anew makes no room."""
    return isinstance(error, OSError) or isinstance(error.__cause__, OSError)
