"""A task becomes a job's folder, on a pipeline that a worker loads once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vidsparse.batch.task import Task, Unfit
from vidsparse.generate import ranks, run
from vidsparse.generate.clock import Listener
from vidsparse.generate.display import hide_bars
from vidsparse.generate.job import Job
from vidsparse.generate.many import Preparing
from vidsparse.generate.model_files import InputError, first_line
from vidsparse.generate.run import execute, load
from vidsparse.terminal import quiet_libraries


@dataclass
class Pipeline:
    """What makes the tasks of one model, dtype and device; can be pickled until it is loaded."""

    preparing: Preparing | None = None
    pipe: Any = None

    def __call__(self, task: Task, device: str, listener: Listener) -> dict[str, Any]:
        """Make a task; returns the content of metrics.json.

        Raises Unfit if the model cannot be loaded, or is another one here than where the batch was
        planned; whatever else is raised is about this task.
        """
        if self.preparing is None:
            quiet_libraries()
            hide_bars()
            self.preparing = Preparing()
        job: Job = self.preparing(replace(task.request, device=device))
        if job.id != task.id:
            raise Unfit(
                f"job {job.id[:10]} here is {task.id[:10]} where the batch was planned: the "
                "model's files, the inputs or the kind of GPU differ between the machines"
            )
        return self.made(job, task, listener)

    def made(self, job: Job, task: Task, listener: Listener) -> dict[str, Any]:
        """Do a job."""
        return execute(job, listener, self.loaded(job, listener))

    def loaded(self, job: Job, listener: Listener) -> Any:
        """The pipeline. Raises Unfit."""
        if self.pipe is None:
            try:
                self.pipe = load(job, listener)
            except InputError as error:
                raise Unfit(str(error)) from error
        return self.pipe

    def relieve(self) -> None:
        """Give back the memory that a task which failed has left."""
        import gc

        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass
class Shared(Pipeline):
    """What makes tasks in the first of the processes that share each video; the others `follow`.

    A task that fails when they have begun leaves them out of step, so it ends the run.
    """

    ulysses: int = 1

    def made(self, job: Job, task: Task, listener: Listener) -> dict[str, Any]:
        """Do a job, with the others. Raises Unfit for whatever fails when they have begun."""
        begun = False

        def loading(job: Job, listener: Listener) -> Any:
            nonlocal begun
            begun = True
            ranks.tell(self.ulysses, task.request)
            return self.loaded(job, listener)

        try:
            return execute(job, listener, loading=loading)
        except Unfit:
            raise
        except Exception as error:
            if not begun:
                raise
            raise Unfit(
                f"{task.name}: {first_line(error)}; processes that share a video end together, the "
                "same command goes on with what is missing"
            ) from error


def follow(ulysses: int, device: str) -> None:
    """The share of every task, in a process that does not speak, until there are no more."""
    quiet_libraries()
    hide_bars()
    preparing, pipe = Preparing(), None
    with ranks.joined(ulysses, device), ranks.following():
        while (request := ranks.tell(ulysses)) is not None:
            pipe = run.follow(preparing(request), pipe)
