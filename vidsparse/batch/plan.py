"""Prompts x seeds x presets -> the tasks of a batch, all checked, and which of them are done."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from vidsparse.batch import failures
from vidsparse.batch.claims import PLACE
from vidsparse.batch.failures import read_failure
from vidsparse.batch.summary import figures
from vidsparse.batch.task import Outcome, Task
from vidsparse.generate.job import Job
from vidsparse.generate.many import Preparing, arm_folders
from vidsparse.generate.model_files import InputError
from vidsparse.generate.prompts import STDIN, Prompt
from vidsparse.generate.request import Request
from vidsparse.jobs.layout import folder_name, read_finished, slug
from vidsparse.plain_values import override_list

MOST_SEEDS = 100_000
LONGEST_OVERRIDES = 40  # bytes of them in the name of an arm
RESERVED = (failures.PLACE, PLACE)


@dataclass(frozen=True)
class Batch:
    """What a user asks for.

    base: what all tasks share. prompts: of `file`; what a line says goes before `base`. presets:
    for lines that name none; empty: the model's. seeds: for lines that have none. out: the folder.
    compare_dense: the first preset of each line runs dense attention too.
    """

    base: Request
    prompts: Sequence[Prompt]
    presets: Sequence[str]
    seeds: Sequence[int]
    out: Path
    file: Path
    compare_dense: bool = False


@dataclass(frozen=True)
class Plan:
    """tasks: in the order in which they are made. done: of those that are complete, by id. failed:
    how many failed earlier. twice: how many were asked for again. notes: of the model."""

    home: Path
    tasks: Sequence[Task]
    done: dict[str, Outcome] = field(default_factory=dict)
    failed: int = 0
    twice: int = 0
    notes: tuple[str, ...] = ()

    @property
    def missing(self) -> list[Task]:
        """What is to be made."""
        return [task for task in self.tasks if task.id not in self.done]


def make_plan(batch: Batch, say: Callable[[str], None] = lambda text: None) -> Plan:
    """All tasks of a batch, checked. Raises InputError, for a line of the file with its number."""
    preparing = Preparing(say)
    base = _absolute(batch.base, Path.cwd())
    presets = tuple(_preset(preset, Path.cwd()) for preset in batch.presets)
    arm_folders(presets or ("model",))
    home = Path(os.path.abspath(os.path.expanduser(batch.out)))
    beside = Path.cwd() if batch.file == STDIN else batch.file.expanduser().absolute().parent
    tasks: dict[str, Task] = {}
    notes: dict[str, None] = {}
    twice = 0
    for prompt in batch.prompts:
        try:
            for request in _requests(base, prompt, presets, batch, beside):
                job = preparing(replace(request, out=str(home)))  # named below, by one id
                task = _task(job, request, home, prompt)
                twice += task.id in tasks
                tasks.setdefault(task.id, task)
                notes |= dict.fromkeys(job.notes)
        except InputError as error:
            if not _own(prompt):
                raise
            raise InputError(f"PROMPTS {batch.file}, line {prompt.line}: {error}") from error
    plan = Plan(home, list(tasks.values()), {}, 0, twice, tuple(notes))
    return looked_at(plan)


def read_seeds(text: str) -> tuple[int, ...]:
    """Of "0-3" or "0,5,9-12", in that order. Raises InputError."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,19})(?:\s*-\s*(\d{1,19}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= 2**63 or last - first >= MOST_SEEDS:
            raise InputError(
                f"--seeds {text}: expected whole numbers 0 .. 2^63 - 1 and ranges of them, up to "
                f"{MOST_SEEDS:,}, as 0-3 or 0,5,9-12"
            )
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise InputError(f"--seeds {text}: a seed comes twice; name each once")
    return tuple(found)


def _requests(
    base: Request, prompt: Prompt, presets: Sequence[str], batch: Batch, beside: Path
) -> Iterator[Request]:
    """Those of a line."""
    own = {name: getattr(prompt, name) for name in ("height", "width", "frames")}
    given = {name: value for name, value in own.items() if value is not None}
    for name in ("image", "last_image"):
        if getattr(prompt, name) is not None:
            given[name] = _path(getattr(prompt, name), beside)
    given["overrides"] = (*override_list(base.overrides), *prompt.overrides)
    methods = presets if prompt.preset is None else (_preset(prompt.preset, beside),)
    for seed in batch.seeds if prompt.seed is None else (prompt.seed,):
        for place, preset in enumerate(methods or (None,)):
            yield replace(
                base,
                prompt=prompt.prompt,
                seed=seed,
                preset=preset,
                compare_dense=batch.compare_dense and not place,
                **given,
            )


def _task(job: Job, request: Request, home: Path, prompt: Prompt) -> Task:
    """A job in its place below the folder of the batch."""
    id = job.id
    arm = slug(Path(job.preset).stem) or "preset"
    if prompt.overrides:  # else two methods would stand for one arm
        changes = " ".join(prompt.overrides)
        mark = sha256(changes.encode()).hexdigest()[:6]
        arm = "-".join(filter(None, (arm, slug(changes, LONGEST_OVERRIDES), mark)))
    if arm in RESERVED:
        raise InputError(
            f"--preset {job.preset}: the folder {arm} of a batch is for other files; call the "
            "preset otherwise"
        )
    name = folder_name(job.prompt, job.preset, job.size, job.seed, id)
    placed_there = replace(request, out=str(home / arm / name))
    return Task(id, placed_there, job.preset, job.size, job.steps, job.tokens)


def looked_at(plan: Plan) -> Plan:
    """The plan with what is done now."""
    done, failed = {}, 0
    for task in plan.tasks:
        sidecar = read_finished(task.folder, task.id)
        if sidecar is not None:
            done[task.id] = Outcome(task.id, "there", figures=figures(sidecar))
        else:
            failed += read_failure(plan.home, task) is not None
    return replace(plan, done=done, failed=failed)


def _own(prompt: Prompt) -> bool:
    """Whether a line says more than its prompt, so may be to blame."""
    return prompt != Prompt(prompt.prompt)


def _absolute(request: Request, beside: Path) -> Request:
    """With paths that hold in another process, whose folder is another one."""
    changes: dict[str, Any] = {}
    if request.model is not None and Path(os.path.expanduser(request.model)).is_dir():
        changes["model"] = _path(str(request.model), beside)
    for name in ("image", "last_image", "video"):
        if getattr(request, name) is not None:
            changes[name] = _path(str(getattr(request, name)), beside)
    return replace(request, **changes) if changes else request


def _preset(preset: str, beside: Path) -> str:
    """A name, or the whole path of a file."""
    return _path(preset, beside) if preset.endswith((".yaml", ".yml")) else preset


def _path(text: str, beside: Path) -> str:
    return os.path.abspath(beside / os.path.expanduser(text)) if text.strip() else text
