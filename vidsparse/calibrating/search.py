"""The search for the cheapest table of densities that reaches a goal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import log10
from statistics import fmean
from typing import Any

import numpy as np

from vidsparse.calibrating.goal import Array, Goal, Table, cheapest, chosen, most_exact
from vidsparse.calibrating.promise import Seen, exactness, margin, needed
from vidsparse.calibrating.runs import Runs
from vidsparse.config import SparseConfig
from vidsparse.generate.model_files import InputError

LEVELS = (0.05, 0.1, 0.16, 0.25, 0.4, 1.0)
GROUPS = 3
METERED = 2  # prompts on which heads are measured where only videos are judged
FIRST = 0.1, 30.0  # error of attention and mean PSNR of one preset on the demo model: a first guess
NEAR = 2.0  # dB between the table that a video was made with and one that is judged by it
ROUNDS = 2  # of runs with a better table, of prompts that were run with one that is not near
PEAK = 255.0**2


@dataclass(frozen=True)
class Found:
    """config: with its table. psnr: of the video of each prompt with it, dB; empty if none was
    made. moved: by so many dB at most, from runs with tables that are nearly it."""

    config: SparseConfig
    table: Table
    psnr: tuple[float, ...] = ()
    moved: float = 0.0


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
            table = most_exact(self.costs, self.error, self._budget())
            config = self._config(table)
            return Found(config, table, tuple(self._psnr(n, config) for n in range(self.jobs)))
        return self._for_psnr()

    def content(self, found: Found, held_out: Sequence[int]) -> dict[str, Any]:
        """What is known of a result. held_out: runs to check it on."""
        return {
            "goal": self.goal.words,
            "error": float(np.sqrt(chosen(self.error, found.table).sum(2).mean())),
            "density": float(np.asarray(LEVELS)[found.table].mean()),
            "speedup": self._speedup(found.table),
            "psnr": fmean(found.psnr) if found.psnr else None,
            "prompt_psnr": list(found.psnr),
            "margin": margin(found.psnr),
            "moved": found.moved,
            "held_out_psnr": [self._psnr(number, found.config) for number in held_out],
        }

    @cached_property
    def measured(self) -> list[dict[str, Any]]:
        """Of the prompts, from dense runs."""
        firsts = [self._steps_of(group) for group in range(self.groups)]
        steps = [of[len(of) // 2] for of in firsts]
        jobs = min(METERED, self.jobs) if self.goal.kind == "psnr" else self.jobs
        found = [self.runs.measured(number, self.config, LEVELS, steps) for number in range(jobs)]
        tokens, least = max(one["tokens"] for one in found), self.config.schedule.min_tokens
        if tokens < least:
            raise InputError(
                f"calls have {tokens} tokens, fewer than schedule.min_tokens={least}: all of them "
                f"stay dense; make larger videos, or --set schedule.min_tokens={tokens}"
            )
        return found

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

    def _for_psnr(self) -> Found:
        """Prompt after prompt is run with the table that those before it ask for; those whose table
        is not near the one that all of them ask for are run again."""
        seen: dict[int, Seen] = {}
        error, mean = FIRST
        exact = exactness(error**2 * self.error[..., 0, 0].size) - mean
        exact += self.goal.value + margin((), self.jobs)
        for number in range(self.jobs):
            seen[number] = self._seen(number, self._table(exact))
            exact = self._needed(seen)
        for _ in range(ROUNDS):
            table = self._table(exact)
            for number in self._far(seen, table):
                seen[number] = self._seen(number, table)
            exact = self._needed(seen)
        table = self._table(exact)
        at = self._exactness(table)
        figures = [min(one.at(at), psnr(0.0)) for one in seen.values()]
        moved = max(
            abs(figure - one.psnr) for figure, one in zip(figures, seen.values(), strict=True)
        )
        return Found(self._config(table), table, tuple(figures), moved)

    def _far(self, seen: dict[int, Seen], table: Table) -> list[int]:
        """The prompts that were run with tables not near this one."""
        at = self._exactness(table)
        return [n for n, one in seen.items() if abs(one.at(at) - one.psnr) > NEAR]

    def _needed(self, seen: dict[int, Seen]) -> float:
        return needed(self.goal.value, list(seen.values()), self.jobs)

    def _table(self, exact: float) -> Table:
        """The cheapest of an exactness."""
        return cheapest(self.costs, self.error, 10 ** (-exact / 10))

    def _exactness(self, table: Table) -> float:
        return exactness(float(chosen(self.error, table).sum()))

    def _seen(self, number: int, table: Table) -> Seen:
        return Seen(self._exactness(table), self._psnr(number, self._config(table)))

    def _psnr(self, number: int, config: SparseConfig) -> float:
        """Of the video of a prompt against its dense one, dB."""
        if number >= len(self.measured):
            self.runs.dense(number)
        return psnr(self.runs.sparse(number, config)["mse"])

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
