"""A calibration: errors of heads from dense runs, a table that reaches the goal, a preset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import exp, log, log10
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from vidsparse.calibrating.goal import Array, Goal, Table, cheapest, chosen, most_exact
from vidsparse.calibrating.runs import Runs
from vidsparse.config import Calibrated, SparseConfig
from vidsparse.generate.clock import Listener
from vidsparse.generate.job import Job, prepare
from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import Request
from vidsparse.generate.run import threads
from vidsparse.generate.sizes import read_grid
from vidsparse.jobs.identity import job_id
from vidsparse.jobs.layout import slug
from vidsparse.pipelines.provenance import identity
from vidsparse.quality.frames import atomic_output
from vidsparse.versions import versions

LEVELS = (0.05, 0.1, 0.16, 0.25, 0.4, 1.0)
PROBE = 1  # of LEVELS: where the weight of a group is measured
GROUPS = 3
TRIALS = 3
NEAR = 0.25  # dB from the goal at which no more is tried
FOLDER = Path("presets")
PEAK = 255.0**2


@dataclass(frozen=True)
class Asked:
    """request: model, size, seed and the method to fill in. prompts, held_out: to measure on, and
    to check the result on; None: the first two and the third of the model's list. out: the preset's
    file; None: one in presets/."""

    request: Request
    goal: Goal
    prompts: tuple[str, ...] | None = None
    held_out: tuple[str, ...] | None = None
    out: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Found:
    """config: with its table. mse: per prompt, of the videos; empty if none was made."""

    config: SparseConfig
    table: Table
    mse: tuple[float, ...] = ()

    @property
    def psnr(self) -> float:
        """Mean over prompts, dB."""
        return fmean(psnr(one) for one in self.mse)


def calibrate(asked: Asked, listener: Listener | None = None) -> dict[str, Any]:
    """Do what is asked; the same again makes only what is missing. Raises InputError."""
    listener = listener or Listener()
    first = prepare(asked.request, listener.say)
    calibration, held_out = _jobs(asked, first)
    out = asked.out or FOLDER / f"{slug(first.model.name) or 'model'}-{asked.goal}.yaml"
    id = job_id({"job": first.id, "goal": str(asked.goal), "prompts": [j.id for j in calibration]})
    if out.exists() and not asked.overwrite and _made_of(out) != id:
        raise InputError(f"--out {out} is another preset: choose another name, or --overwrite")
    shared = [replace(job, config=SparseConfig.from_dict({}), preset="") for job in calibration]
    folder = out.parent / f".calibration-{job_id({'jobs': [job.id for job in shared]})[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0), threads(first):
            runs = Runs([*calibration, *held_out], folder, listener)
            search = Search(runs, first.config, asked.goal, len(calibration), first.steps)
            found = search.find()
            content = search.content(found, range(len(calibration), len(runs.jobs)))
            content |= {"runs": runs.made, "reached": _reached(content)}
            config = replace(found.config, calibrated=_origin(id, asked, first, runs, content))
            config = replace(config, about=_about(first, asked.goal, content))
            with atomic_output(out) as part:
                part.write_text(config.to_yaml())
    except Timeout as error:
        raise InputError(f"{folder}: another calibration of this is running") from error
    except ImportError as error:
        raise InputError(str(error)) from error
    return {**content, "preset": str(out)}


@dataclass
class Search:
    """For the config that reaches a goal. jobs: the first so many of the runs are measured on."""

    runs: Runs
    config: SparseConfig
    goal: Goal
    jobs: int
    steps: int

    def __post_init__(self) -> None:
        dense = self.config.dense_steps(self.steps)
        self.sparse_steps = [n for n in range(self.steps) if n not in dense]
        if not self.sparse_steps:
            raise InputError(
                f"all {self.steps} steps of preset {self.runs.jobs[0].preset} are dense: take more "
                "--steps, or a preset with fewer dense ones"
            )
        self.groups = min(GROUPS, len(self.sparse_steps))

    def find(self) -> Found:
        """The table that reaches the goal at least cost, or comes nearest."""
        if self.goal.kind == "error":
            cells = self.groups * self.error.shape[1]
            table = cheapest(self.costs, self.error, self.goal.value**2 * cells)
            return Found(self._config(table), table)
        if self.goal.kind == "speedup":
            table = most_exact(self.costs, self.weighted, self._budget())
            return self._tried(table)
        return self._for_psnr()

    def content(self, found: Found, held_out: Sequence[int]) -> dict[str, Any]:
        """What is known of a result. held_out: runs to check it on."""
        for number in held_out:
            self.runs.dense(number)
        checked = [self.runs.sparse(number, found.config) for number in held_out]
        return {
            "goal": self.goal.words,
            "error": float(np.sqrt(chosen(self.error, found.table).sum(2).mean())),
            "density": float(np.asarray(LEVELS)[found.table].mean()),
            "speedup": self._speedup(found.table),
            "psnr": found.psnr if found.mse else None,
            "held_out_psnr": [psnr(one["mse"]) for one in checked],
        }

    @cached_property
    def measured(self) -> list[dict[str, Any]]:
        """Of the prompts, from dense runs."""
        firsts = [self._steps_of(group) for group in range(self.groups)]
        steps = [of[len(of) // 2] for of in firsts]
        return [
            self.runs.measured(number, self.config, LEVELS, steps) for number in range(self.jobs)
        ]

    @cached_property
    def error(self) -> Array:
        """Squared relative errors [groups, layers, heads, levels], mean over the prompts."""
        found: Array = np.mean([one["table"] for one in self.measured], 0)
        return found

    @cached_property
    def costs(self) -> Array:
        """Seconds of a run [groups, layers, heads, levels], of one forward a step."""
        one = np.mean([one["costs"] for one in self.measured], 0)
        counts = np.array([len(self._steps_of(group)) for group in range(self.groups)])
        costs: Array = np.broadcast_to(counts[:, None, None, None] * one, self.error.shape)
        return costs

    @cached_property
    def weighted(self) -> Array:
        """`error` times what an error in a group does to the video, as squared 8-bit steps: each
        group is run at one density while all else is dense."""
        weights = []
        for group in range(self.groups):
            table = np.full(self.error.shape[:3], len(LEVELS) - 1)
            table[group] = PROBE
            found = self.runs.sparse(0, self._config(table))
            lost = np.asarray(self.measured[0]["table"])[group, ..., PROBE].sum()
            weights.append(max(found["mse"], 1e-3) / max(float(lost), 1e-12))
        weighted: Array = self.error * np.array(weights)[:, None, None, None]
        return weighted

    def _for_psnr(self) -> Found:
        """Errors of heads add up to that of the video but for a factor, which trials settle."""
        target = PEAK * 10 ** (-self.goal.value / 10)
        factor, tried = 1.0, list[Found]()
        for _ in range(TRIALS):
            table = cheapest(self.costs, self.weighted, target / factor)
            if any(np.array_equal(table, one.table) for one in tried):
                break
            tried.append(self._tried(table))
            mean = exp(fmean(log(max(one, 1e-3)) for one in tried[-1].mse))
            if abs(10 * log10(mean / target)) <= NEAR:
                return tried[-1]
            factor = mean / max(float(chosen(self.weighted, table).sum()), 1e-12)
        good = [one for one in tried if one.psnr >= self.goal.value - NEAR]
        if good:
            return min(good, key=lambda one: float(chosen(self.costs, one.table).sum()))
        return max(tried, key=lambda one: one.psnr)

    def _tried(self, table: Table) -> Found:
        """A table, and what it does to the videos of the prompts."""
        config = self._config(table)
        mse = tuple(self.runs.sparse(number, config)["mse"] for number in range(self.jobs))
        return Found(config, table, mse)

    def _config(self, table: Table) -> SparseConfig:
        """The method with densities of a table."""
        groups = [" ".join("".join(map(str, layer)) for layer in group) for group in table.tolist()]
        given = asdict(self.config.schedule)
        kept = ("dense_steps", "last_dense_steps", "dense_layers", "min_tokens")
        schedule = {key: given[key] for key in kept if key in given} or {"dense_steps": 0}
        schedule |= {"dense_layers": list(given.get("dense_layers", ()))}
        schedule |= {"name": "table", "levels": [*LEVELS], "groups": groups}
        schedule["density"] = round(float(np.asarray(LEVELS)[table].mean()), 4)
        return SparseConfig.from_dict({**self.config.to_dict(), "schedule": schedule})

    def _steps_of(self, group: int) -> list[int]:
        """The steps of a group, as `vidsparse.schedule.table` has it."""
        n = len(self.sparse_steps)
        return [s for u, s in enumerate(self.sparse_steps) if self.groups * u // n == group]

    def _budget(self) -> float:
        """What the calls of one forward a step may cost for the speed that is asked for."""
        dense, full, least = self._loop(), self.costs[..., -1].sum(), self.costs.min(-1).sum()
        budget = dense / self.goal.value - (dense - full)
        if budget < least:
            most = dense / (dense - full + least)
            raise InputError(
                f"--speedup {self.goal.value:g}: at most {most:.2f} can be reached with this "
                "preset here; ask for less, or take a preset with fewer dense steps"
            )
        return float(budget)

    def _loop(self) -> float:
        """Seconds of a dense loop, a forward a step."""
        rows: int = max(one["forwards"] for one in self.measured)
        return fmean(one["step_seconds"] for one in self.measured) * self.steps / rows

    def _speedup(self, table: Table) -> float:
        """Of the loop, from the costs of calls."""
        dense, full = self._loop(), self.costs[..., -1].sum()
        return float(dense / (dense - full + chosen(self.costs, table).sum()))


def psnr(mse: float) -> float:
    """dB, of 8-bit videos; of identical ones that of an error of one step in a thousand."""
    return 10 * log10(PEAK / max(mse, 1e-3))


def _jobs(asked: Asked, first: Job) -> tuple[list[Job], list[Job]]:
    """To measure on, and to check on. Raises InputError."""
    listed = [one for one in first.model.prompts if one.strip()] if asked.prompts is None else []
    prompts = asked.prompts if asked.prompts is not None else tuple(listed[:2])
    held_out = asked.held_out if asked.held_out is not None else tuple(listed[2:3])
    if not prompts:
        raise InputError(f"{first.model.name} has no list of prompts: give some with --prompt")
    both = [one for one in held_out if one in prompts]
    if both:
        raise InputError(f"--held-out {both[0]!r} is among the prompts to calibrate on")

    def make(text: str) -> Job:
        return prepare(replace(asked.request, prompt=text))

    return [make(text) for text in prompts], [make(text) for text in held_out]


def _origin(id: str, asked: Asked, job: Job, runs: Runs, content: dict[str, Any]) -> Calibrated:
    """Where a preset comes from, for its file."""
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
        prompts=tuple(one.prompt for one in runs.jobs),
        seed=job.seed,
        versions=tuple(f"{name} {version}" for name, version in versions().items()),
    )


def _reached(content: dict[str, Any]) -> str:
    """The figures of a result, in words."""
    parts = [f"density {content['density']:.3f}", f"error {content['error']:.3f}"]
    parts.append(f"{content['speedup']:.2f}x as fast by the costs of calls")
    if content["psnr"] is not None:
        parts.append(f"{content['psnr']:.1f} dB")
    if content["held_out_psnr"]:
        shown = ", ".join(f"{one:.1f}" for one in content["held_out_psnr"])
        parts.append(f"held-out prompts {shown} dB")
    return ", ".join(parts)


def _about(job: Job, goal: Goal, content: dict[str, Any]) -> str:
    height, width, frames = job.size
    return (
        f"Calibrated on {job.model.name}, {width}x{height}, {frames} frames, {job.steps} steps, "
        f"for {goal.words}: {content['reached']}."
    )


def _made_of(file: Path) -> str:
    """The id of the calibration that a preset comes from; empty if it is none."""
    try:
        return SparseConfig.load(file).calibrated.id
    except (OSError, ValueError):
        return ""
