"""A calibration: errors of heads from dense runs, a table that reaches the goal, a preset."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vidsparse.calibrating import words
from vidsparse.calibrating.goal import Goal, Kind
from vidsparse.calibrating.runs import Runs
from vidsparse.calibrating.search import Search
from vidsparse.config import Calibrated, SparseConfig
from vidsparse.generate.clock import Listener
from vidsparse.generate.job import Job, prepare
from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import Request
from vidsparse.generate.run import threads
from vidsparse.generate.sizes import read_grid
from vidsparse.jobs.identity import job_id
from vidsparse.jobs.layout import slug
from vidsparse.options import made
from vidsparse.pipelines.provenance import identity
from vidsparse.quality.frames import atomic_output
from vidsparse.versions import versions

PROMPTS: dict[Kind, int] = {"psnr": 4, "error": 2, "speedup": 2}
"""Of the model's list, where none are given. Errors of heads are alike over prompts (correlation
0.93 on the demo model), videos are not."""
FOLDER = Path("presets")


@dataclass(frozen=True)
class Asked:
    """request: model, size, seed and the method to fill in. prompts, held_out: to measure on, and
    to check the result on; None: the first `PROMPTS` and the next of the model's list. out: the
    preset's file; None: one in presets/."""

    request: Request
    goal: Goal
    prompts: tuple[str, ...] | None = None
    held_out: tuple[str, ...] | None = None
    out: Path | None = None
    overwrite: bool = False


def calibrate(asked: Asked, listener: Listener | None = None) -> dict[str, Any]:
    """Do what is asked; the same again makes only what is missing. Raises InputError."""
    listener = listener or Listener()
    first = prepare(asked.request, listener.say)
    calibration, held_out = _jobs(asked, first)
    out = asked.out or FOLDER / f"{slug(first.model.name) or 'model'}-{asked.goal}.yaml"
    id = job_id({"job": first.id, "goal": str(asked.goal), "prompts": [j.id for j in calibration]})
    if out.is_dir():
        raise InputError(f"--out {out} is a folder: name a .yaml file, as {out / 'mine.yaml'}")
    if out.exists() and not asked.overwrite and _made_of(out) != id:
        raise InputError(f"--out {out} is another preset: choose another name, or --overwrite")
    shared = replace(first, config=SparseConfig.from_dict({}), preset="", prompt="")
    folder = out.parent / f".calibration-{shared.id[:12]}"
    try:
        made("--out", folder)
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        with FileLock(folder / "lock", timeout=0), threads(first):
            runs = Runs([*calibration, *held_out], folder, listener)
            search = Search(runs, first.config, asked.goal, len(calibration), first.steps)
            found = search.find()
            content = search.content(found, range(len(calibration), len(runs.jobs)))
            content |= {"runs": runs.made, "reached": words.reached(content)}
            config = replace(found.config, calibrated=_origin(id, asked, first, runs, content))
            config = replace(config, about=words.about(first, asked.goal, content))
            with atomic_output(out) as part:
                part.write_text(config.to_yaml())
    except Timeout as error:
        raise InputError(f"{folder}: another calibration of this is running") from error
    except ImportError as error:
        raise InputError(str(error)) from error
    return {**content, "preset": str(out)}


def _jobs(asked: Asked, first: Job) -> tuple[list[Job], list[Job]]:
    """To measure on, and to check on. Raises InputError."""
    listed = [one for one in first.model.prompts if one.strip()] if asked.prompts is None else []
    count = PROMPTS[asked.goal.kind]
    prompts = asked.prompts if asked.prompts is not None else tuple(listed[:count])
    held_out = asked.held_out if asked.held_out is not None else tuple(listed[count : count + 1])
    if not prompts:
        raise InputError(f"{first.model.name} has no list of prompts: give some with --prompt")
    both = [one for one in held_out if one in prompts]
    if both:
        raise InputError(f"--held-out {both[0]!r} is among the prompts to calibrate on")

    for option, texts in (("--prompt", prompts), ("--held-out", held_out)):
        if twice := [one for n, one in enumerate(texts) if one in texts[:n]]:
            raise InputError(
                f"{option} {twice[0]!r} is given twice, and says nothing more the second time: "
                "leave it out, or take another"
            )

    def make(text: str) -> Job:
        return prepare(replace(asked.request, prompt=text))

    return [make(text) for text in prompts], [make(text) for text in held_out]


def _origin(id: str, asked: Asked, job: Job, runs: Runs, content: dict[str, Any]) -> Calibrated:
    """Where a preset comes from, for its file. runs: the last of them are held out."""
    prompts = tuple(one.prompt for one in runs.jobs)
    judged = len(prompts) - len(content["held_out_psnr"])
    grid = read_grid(job.model)
    height, width, frames = job.size
    return Calibrated(
        id=id,
        model=job.model.name,
        fingerprint=job.fingerprint,
        transformer=identity(runs.home()),
        tokens=tuple(grid.tokens(frames, height, width)),
        steps=job.steps,
        target=str(asked.goal),
        goal=asked.goal.words,
        reached=content["reached"],
        prompts=prompts[:judged],
        psnr=tuple(round(one, 2) for one in content["prompt_psnr"]),
        margin=round(content["margin"], 2),
        held_out=prompts[judged:],
        held_out_psnr=tuple(round(one, 2) for one in content["held_out_psnr"]),
        seed=job.seed,
        versions=tuple(f"{name} {version}" for name, version in versions().items()),
    )


def _made_of(file: Path) -> str:
    """The id of the calibration that a preset comes from; empty if it is none."""
    try:
        return SparseConfig.load(file).calibrated.id
    except (OSError, ValueError):
        return ""
