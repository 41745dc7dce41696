"""Many jobs on one loaded pipeline; a job whose folder is complete is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vidsparse.generate.clock import Listener
from vidsparse.generate.job import Job, placed, prepare
from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import Request, check_numbers, check_texts
from vidsparse.generate.run import execute, load
from vidsparse.jobs.layout import read_finished, slug

KINDS = 64
"""Of requests that are kept, each with the files that it starts from."""


class Preparing:
    """`prepare` for many requests: all that does not depend on prompt and seed is done once."""

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self._say = say
        self._kept: dict[Request, Job] = {}

    def __call__(self, request: Request) -> Job:
        """As `prepare`; overrides must be a tuple. Raises InputError."""
        check_texts(request)
        check_numbers(request)
        if request.prompt is None:
            return prepare(request, self._say)
        kind = replace(request, prompt=None, seed=0, out=None)
        kept = self._kept.pop(kind, None) or prepare(request, self._say)
        self._kept[kind] = kept  # the last one again
        if len(self._kept) > KINDS:
            del self._kept[next(iter(self._kept))]
        return placed(replace(kept, prompt=request.prompt, seed=int(request.seed)), request.out)


def arm_folders(presets: Sequence[str]) -> list[str]:
    """What the folders of presets are called, each another name. Raises InputError."""
    folders = [slug(Path(preset).stem) or "preset" for preset in presets]
    if not presets or len(set(folders)) < len(folders):
        raise InputError(f"--presets {','.join(presets)}: expected presets of different names")
    return folders


def arms(requests: Sequence[Request], presets: Sequence[str], out: Path) -> dict[str, list[Job]]:
    """Preset -> a job per request, in folders of their own below `out`/<preset>.

    The jobs of the first preset run dense attention too. Raises InputError.
    """
    found: dict[str, list[Job]] = {}
    for preset, folder in zip(presets, arm_folders(presets), strict=True):
        found[preset] = []
        for request in requests:
            dense = preset == presets[0]
            job = prepare(replace(request, preset=preset, compare_dense=dense, out=None))
            found[preset].append(replace(job, out=out / folder / job.out.name))
    return found


def finished(job: Job) -> dict[str, Any] | None:
    """What `execute` returned when it did this very job; None if its folder is not complete."""
    sidecar = read_finished(job.out, job.id)
    return None if sidecar is None else {**sidecar, "out": str(job.out.resolve())}


def execute_all(
    jobs: Sequence[Job], listener: Listener | None = None
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Do jobs of one model, dtype and device one by one; yields each with what it wrote.

    Finished ones come from their folders; the model is loaded for the first other. Raises
    ValueError for jobs that differ in the model, InputError as `execute`.
    """
    listener = listener or Listener()
    if len({(job.fingerprint, job.dtype, job.device) for job in jobs}) > 1:
        raise ValueError("expected jobs of one model, dtype and device")
    pipe = None
    for job in jobs:
        content = finished(job)
        if content is None:
            pipe = load(job, listener) if pipe is None else pipe
            content = execute(job, listener, pipe)
        yield job, content
