"""The runs of a calibration: each is done once, and what it gave stays on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from vidsparse.accelerate import accelerate_pipeline, observing, restore_pipeline
from vidsparse.calibrating.meter import Meter
from vidsparse.capturing.run import DENSE
from vidsparse.config import SparseConfig
from vidsparse.generate.clock import Listener
from vidsparse.generate.job import Job
from vidsparse.generate.model_files import InputError
from vidsparse.generate.results import Arm
from vidsparse.generate.run import load, run_arm
from vidsparse.interrupts import held, interruptible
from vidsparse.jobs.identity import job_id
from vidsparse.quality.frames import atomic_output, open_clip, write_clip
from vidsparse.quality.metrics import compare_clips

CURE = "delete {}, and the same command makes it again"
NEEDED = {
    "measured": {"table", "costs", "forwards", "step_seconds", "tokens"},
    "dense": {"step_seconds"},
    "sparse": {"mse", "seconds", "density"},
}
"""What the file of a run holds."""


@dataclass
class Runs:
    """Of jobs that differ in the prompt alone. folder: where results stay; home: of the pipeline,
    loaded for the first run that is not there yet."""

    jobs: Sequence[Job]
    folder: Path
    listener: Listener
    pipe: Any = None
    made: int = 0
    _kept: dict[str, dict[str, Any]] = field(default_factory=dict)

    def measured(
        self, number: int, config: SparseConfig, levels: Sequence[float], steps: Sequence[int]
    ) -> dict[str, Any]:
        """A dense run of a job under a `Meter`: its "table", "costs", "forwards", "tokens", and the
        "step_seconds" of steps that were not measured. The video stays too."""
        method = {"levels": [*levels], "steps": [*steps], "method": config.method}
        key = job_id({**method, "holds": sorted(NEEDED["measured"])})[:12]

        def make() -> dict[str, Any]:
            meter = Meter(config, tuple(levels), tuple(steps))
            arm = self._run(number, DENSE, "measuring", meter)
            self._keep(number, arm)
            plain = [s for n, s in enumerate(arm.step_seconds) if n not in steps]
            return {
                "table": meter.table().tolist(),
                "costs": meter.costs(),
                "forwards": meter.forwards,
                "tokens": meter.tokens,
                "step_seconds": median(plain or arm.step_seconds),
            }

        return self._once(f"measured-{self._key(number)}-{key}", make, self._clip(number))

    def dense(self, number: int) -> dict[str, Any]:
        """A dense run of a job: "step_seconds". The video stays too."""

        def make() -> dict[str, Any]:
            arm = self._run(number, DENSE, "dense")
            self._keep(number, arm)
            return {"step_seconds": median(arm.step_seconds)}

        return self._once(f"dense-{self._key(number)}", make, self._clip(number))

    def sparse(self, number: int, config: SparseConfig) -> dict[str, Any]:
        """A sparse run of a job, whose dense video is there: "mse", "seconds", "density".

        Calls that are no faster here are sparse, too: a video without them says nothing of the
        densities that it is to judge, and elsewhere they may be.
        """
        config = config.override("kernel.crossover=1")

        def make() -> dict[str, Any]:
            arm = self._run(number, config, "sparse")
            try:
                found = compare_clips(open_clip(self._clip(number)), arm.frames)
            except ValueError as error:
                raise InputError(f"{error}; {CURE.format(self._clip(number))}") from error
            assert arm.report is not None
            density = arm.report.attention_density
            return {"mse": found.mse, "seconds": arm.denoise_seconds, "density": density}

        return self._once(f"sparse-{self._key(number)}-{job_id(config.method)[:12]}", make)

    def home(self) -> Any:
        """The pipeline."""
        if self.pipe is None:
            self.pipe = load(self.jobs[0], self.listener)
        return self.pipe

    def _once(self, name: str, make: Callable[[], dict[str, Any]], *also: Path) -> dict[str, Any]:
        """What is on disk under a name, else what is made now. also: files that must be there."""
        file = self.folder / f"{name}.json"
        if name not in self._kept:
            if file.exists() and all(path.exists() for path in also):
                self._kept[name] = _read(file)
            else:
                content = make()
                with atomic_output(file) as part:
                    part.write_text(json.dumps(content))
                self._kept[name] = content
                self.made += 1
        return self._kept[name]

    def _key(self, number: int) -> str:
        """Of a job's prompt: what was done for it serves calibrations on other prompts, too."""
        return job_id({"prompt": self.jobs[number].prompt})[:12]

    def _clip(self, number: int) -> Path:
        return self.folder / f"dense-{self._key(number)}.mkv"

    def _keep(self, number: int, arm: Arm) -> None:
        write_clip(self._clip(number), arm.frames, self.jobs[number].fps)

    def _run(self, number: int, config: SparseConfig, arm: str, meter: Meter | None = None) -> Arm:
        job = self.jobs[number]
        pipe = self.home()
        self.listener.say(f'{arm}: "{job.prompt}"')
        name = "dense" if config == DENSE else "sparse"
        with _accelerated(pipe, config):
            if meter is None:
                return run_arm(pipe, job, name, self.listener, accelerated=True)
            with observing(pipe, meter):
                return run_arm(pipe, job, name, self.listener, accelerated=True)


def _read(file: Path) -> dict[str, Any]:
    """What a run gave. Raises InputError if the file is not what was written."""
    try:
        content = json.loads(file.read_text())
        if content.keys() != NEEDED[file.name.partition("-")[0]]:
            raise ValueError(f"it holds {[*content]}")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{file} is damaged: {CURE.format(file)}") from error
    return dict(content)


@contextmanager
def _accelerated(pipe: Any, config: SparseConfig) -> Iterator[None]:
    """The pipeline is afterwards what it was before."""
    with held():
        try:
            with interruptible():
                try:
                    accelerate_pipeline(pipe, config)
                except (ValueError, TypeError) as error:
                    raise InputError(str(error)) from error
                yield
        finally:
            restore_pipeline(pipe)
