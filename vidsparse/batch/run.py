"""A plan and an engine -> everything made that can be made, and a report of it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from vidsparse.batch import summary
from vidsparse.batch.claims import prepare_home
from vidsparse.batch.plan import Plan
from vidsparse.batch.task import Broken, Outcome, Resources, Task
from vidsparse.batch.worker import Maker, Worker
from vidsparse.generate.clock import Listener
from vidsparse.generate.model_files import InputError


class Watcher(Listener):
    """Is told what a batch does; this one ignores it."""

    def start(self, todo: int) -> None:
        """So many tasks are to be made."""

    def outcome(self, task: Task, outcome: Outcome) -> None:
        """A task has come to an end."""

    def waiting(self, tasks: int) -> None:
        """Other runs are making so many."""

    def stop(self) -> None:
        """No more comes."""


@dataclass
class Report:
    """What became of a plan. outcomes: by id. broken: why an engine ended early. seconds: of the
    run. file: summary.csv, or why it could not be written."""

    plan: Plan
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    broken: str = ""
    seconds: float = 0.0
    rows: Sequence[dict[str, Any]] = ()
    unwritten: str = ""

    def count(self, *states: str) -> int:
        """Tasks whose outcome is one of these."""
        return sum(outcome.status in states for outcome in self.outcomes.values())

    @property
    def complete(self) -> bool:
        """Whether every task is done."""
        return self.count("made", "there") == len(self.plan.tasks)


def run(
    plan: Plan,
    make: Maker,
    engine: Any,
    resources: Resources,
    display: Watcher,
    *,
    retries: int = 1,
) -> Report:
    """Make what is missing of a plan. engine: a module of `registry.batch_engine`.

    Raises InputError for what no task can be made with.
    """
    start = perf_counter()
    report = Report(plan, dict(plan.done))
    try:
        prepare_home(plan.home)
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"--out {plan.home}: cannot write there, or lock files: {why}") from error
    worker = Worker(make, plan.home, secrets.token_hex(8), resources, retries, listener=display)
    pending = plan.missing
    display.start(len(pending))
    try:
        for waits in (False, True):
            if waits and pending:
                display.waiting(len(pending))
            if pending or (not waits and hasattr(engine, "follows")):  # others wait for this one
                pending = _round(pending, replace(worker, waits=waits), engine.run, report, display)
    except Broken as broken:
        report.broken = str(broken)
    finally:
        display.stop()
    report.seconds = perf_counter() - start
    report.rows = summary.rows(plan.tasks, report.outcomes)
    try:
        summary.write(plan.home, report.rows)
    except OSError as error:
        report.unwritten = f"{summary.FILE} cannot be written: {error.strerror or error}"
    return report


def _round(
    tasks: list[Task], worker: Worker, engine_run: Any, report: Report, display: Watcher
) -> list[Task]:
    """Every task once; returns those that other runs are making."""
    by_id = {task.id: task for task in tasks}
    busy = []
    with closing(engine_run(tasks, worker)) as outcomes:
        for outcome in outcomes:
            if outcome.status == "unfit":
                raise InputError(outcome.error)
            if outcome.status == "busy":
                busy.append(by_id[outcome.id])
                continue
            report.outcomes[outcome.id] = outcome
            display.outcome(by_id[outcome.id], outcome)
    return busy
