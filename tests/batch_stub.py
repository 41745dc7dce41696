"""Tasks of a batch, and what makes their folders without a pipeline."""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from vidsparse.batch.plan import Plan
from vidsparse.batch.task import Task
from vidsparse.generate.request import Request
from vidsparse.jobs.identity import job_id
from vidsparse.jobs.layout import METRICS, SCHEMA
from vidsparse.jobs.publish import publishing

SIZE = (32, 32, 5)


def task(home: Path, number: int, preset: str = "balanced", compare_dense: bool = False) -> Task:
    """One of a batch in a folder."""
    id = job_id({"number": number, "preset": preset})
    request = Request(
        prompt=f"prompt {number}",
        seed=number,
        device="cpu",
        preset=preset,
        compare_dense=compare_dense,
        out=str(home / preset / f"job{number}-{id[:10]}"),
    )
    return Task(id, request, preset, SIZE, steps=3, tokens=192)


def plan(home: Path, count: int, **options) -> Plan:
    """So many tasks, of which none is looked for."""
    return Plan(home, [task(home, number, **options) for number in range(count)])


@dataclass
class Stub:
    """Writes the sidecar of a task, and a line into a log for each time it was begun.

    seconds: that a task takes. fails: seed -> error, or how often it fails before it works. kills:
    seeds whose process dies in the middle, the first time if a file of that name is not there.
    """

    log: Path
    seconds: float = 0.0
    fails: dict[int, Exception | int] = field(default_factory=dict)
    kills: tuple[int, ...] = ()
    always: bool = False

    def __call__(self, task, device, listener):
        seed = task.request.seed
        begun = sum(line.split()[0] == task.id for line in self.lines())
        with self.log.open("a") as file:  # one write: O_APPEND keeps lines of processes whole
            file.write(f"{task.id} {seed} {os.getpid()}\n")
        time.sleep(self.seconds)
        error = self.fails.get(seed, 0)
        if isinstance(error, Exception):
            raise error
        if begun < error:
            raise RuntimeError(f"try {begun + 1} of seed {seed}")
        with publishing(task.folder, task.id) as stage:
            if seed in self.kills and (self.always or not begun):
                os.kill(os.getpid(), 9)
            arm = {"denoise_seconds": 2.0, "total_seconds": 3.0}
            content = {
                "schema": SCHEMA,
                "id": task.id,
                "prompt": task.request.prompt,
                "seed": seed,
                "device": device,
                "threads": 1,
                "gpu": None,
                "density": 0.25,
                "arms": {
                    "sparse": arm,
                    "dense": {"denoise_seconds": 3.0} if task.request.compare_dense else None,
                },
                "files": [METRICS],
            }
            (stage.folder / METRICS).write_text(json.dumps(content))
        return content

    def relieve(self):
        pass

    def lines(self):
        return self.log.read_text().splitlines() if self.log.exists() else []

    def begun(self) -> list[int]:
        """Seeds in the order in which they were begun."""
        return [int(line.split()[1]) for line in self.lines()]

    def workers(self) -> dict[str, int]:
        """Process -> how many tasks it has begun."""
        pids = [line.split()[2] for line in self.lines()]
        return {pid: pids.count(pid) for pid in set(pids)}
