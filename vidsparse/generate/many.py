"""Many jobs on one loaded pipeline; a job whose folder is complete is not computed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vidsparse.generate.clock import Listener
from vidsparse.generate.job import Job, prepare
from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import Request
from vidsparse.generate.run import execute, load
from vidsparse.jobs.layout import read_sidecar, slug


def arms(requests: Sequence[Request], presets: Sequence[str], out: Path) -> dict[str, list[Job]]:
    """Preset -> a job per request, in folders of their own below `out`/<preset>.

    The jobs of the first preset run dense attention too. Raises InputError.
    """
    folders = [slug(Path(preset).stem) or "preset" for preset in presets]
    if not presets or len(set(folders)) < len(folders):
        raise InputError(f"--presets {','.join(presets)}: expected presets of different names")
    found: dict[str, list[Job]] = {}
    for preset, folder in zip(presets, folders, strict=True):
        found[preset] = []
        for request in requests:
            dense = preset == presets[0]
            job = prepare(replace(request, preset=preset, compare_dense=dense, out=None))
            found[preset].append(replace(job, out=out / folder / job.out.name))
    return found


def finished(job: Job) -> dict[str, Any] | None:
    """What `execute` returned when it did this very job; None if its folder is not complete."""
    sidecar = read_sidecar(job.out)
    if sidecar is None or sidecar.get("id") != job.id:
        return None
    if not all((job.out / name).is_file() for name in sidecar["files"]):
        return None
    return {**sidecar, "out": str(job.out.resolve())}


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
