"""A task becomes a job's folder, on a pipeline that a worker loads once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vidsparse.batch.task import Task, Unfit
from vidsparse.generate.clock import Listener
from vidsparse.generate.display import hide_bars
from vidsparse.generate.many import Preparing
from vidsparse.generate.model_files import InputError
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
        job = self.preparing(replace(task.request, device=device))
        if job.id != task.id:
            raise Unfit(
                f"job {job.id[:10]} here is {task.id[:10]} where the batch was planned: the "
                "model's files, the inputs or the kind of GPU differ between the machines"
            )
        if self.pipe is None:
            try:
                self.pipe = load(job, listener)
            except InputError as error:
                raise Unfit(str(error)) from error
        return execute(job, listener, self.pipe)

    def relieve(self) -> None:
        """Give back the memory that a task which failed has left."""
        import gc

        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
