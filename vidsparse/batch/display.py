"""What a person sees of a batch: the plan, one bar over all workers, failures, a table."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from vidsparse.batch import failures, summary
from vidsparse.batch.plan import Plan
from vidsparse.batch.run import Report, Watcher
from vidsparse.batch.task import Outcome, Task
from vidsparse.generate.job import Job
from vidsparse.terminal import printable

LINES = 100
"""Lines about tasks that a run writes where there is no terminal; failures have lines beside."""
SHOWN = 10
"""Of notes about a plan, and of failures at the end."""
LONGEST = 300
"""Characters of an error that are shown."""


class Display(Watcher):
    """On a console: a live bar on a terminal, lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None
        self.bar = TaskID(0)
        self.todo = self.ended = self.failed = 0
        self.arm, self.steps, self.now = "", 0, ""
        self.said: set[str] = set()

    def line(self, text: str, style: str = "") -> None:
        self.console.print(
            printable(text), markup=False, highlight=False, soft_wrap=True, style=style or None
        )

    def say(self, text: str) -> None:
        """What the worker of this process says: each text once, and not what every task does."""
        if text.startswith(("note:", "loading", "looking")) and text not in self.said:
            self.said.add(text)
            self.line(text)

    def job(self, job: Job) -> None:
        self.now = printable(f"{Path(job.preset).stem}: {job.prompt}", 60)
        self._note(self.now)

    def begin(self, arm: str, steps: int) -> None:
        self.arm, self.steps = arm, steps

    def step(self, done: int, density: float) -> None:
        self._note(f"{self.now}, {self.arm} {done}/{self.steps}")

    def start(self, todo: int) -> None:
        self.todo = todo
        if not todo or not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("{task.completed}/{task.total} jobs"),
            BarColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.console,
            refresh_per_second=4,
        )
        self.bar = self.progress.add_task("", total=todo, note="")
        self.progress.start()

    def outcome(self, task: Task, outcome: Outcome) -> None:
        self.ended += 1
        failed = outcome.status == "failed"
        self.failed += failed
        if failed:
            self.line(f"failed: {task.name}: {printable(outcome.error, LONGEST)}", "red")
        if self.progress is not None:
            failures = f"{self.failed} failed" if self.failed else ""
            self.progress.update(self.bar, completed=self.ended, note=failures)
        elif not failed and self._due():
            took = f", {outcome.seconds:.1f} s" if outcome.seconds else ""
            self.line(f"{self.ended}/{self.todo} {outcome.status}: {task.name}{took}")

    def waiting(self, tasks: int) -> None:
        self.line(f"note: {_jobs(tasks)} left are being made by another run; waiting for it")

    def stop(self) -> None:
        if self.progress is not None:
            self.progress.update(self.bar, note=f"{self.failed} failed" if self.failed else "")
            self.progress.stop()
            self.progress = None

    def plan(self, plan: Plan) -> None:
        """What there is to do."""
        for note in plan.notes[:SHOWN]:
            self.say(note)
        if len(plan.notes) > SHOWN:
            self.line(f"note: {len(plan.notes) - SHOWN:,} more of such notes")
        if plan.twice:
            self.line(f"note: {_jobs(plan.twice)} asked for more than once, each is made once")
        self.line(f"{plan_line(plan)}, in {_near(plan.home)}/")

    def finish(self, report: Report) -> None:
        """The table, failures, where things are and what to do next."""
        self.console.print(table(report.rows))
        made, failed = report.count("made"), report.count("failed")
        missing = len(report.plan.tasks) - report.count("made", "there", "failed")
        parts = [f"{made} made", f"{report.count('there')} were there", f"{failed} failed"]
        if missing:
            parts.append(f"{missing} missing")
        self.line(f"{_jobs(len(report.plan.tasks))}: {', '.join(parts)}; {_time(report.seconds)}")
        lost = [row for row in report.rows if row["status"] == "failed"]
        for row in lost[:SHOWN]:
            self.line(f"  {row['job']}: {printable(str(row['error']), LONGEST)}")
        if len(lost) > SHOWN:
            self.line(f"  and {len(lost) - SHOWN} more")
        if report.broken:
            self.line(report.broken, "red")
        if report.unwritten:
            self.line(report.unwritten, "red")
        home = _near(report.plan.home)
        if lost:
            self.line(f"{home}/{failures.PLACE}/ has what happened; the same command tries again")
        elif missing:
            self.line("the same command makes what is missing")
        if not report.unwritten:
            self.line(f"{home}/{summary.FILE}")
        if command := compare_command(report):
            self.line(command)

    def _note(self, text: str) -> None:
        if self.progress is not None:
            failed = f"{self.failed} failed, " if self.failed else ""
            self.progress.update(self.bar, note=f"{failed}{text}")

    def _due(self) -> bool:
        """Whether a task has a line of its own: all of few, every so many of many."""
        return (
            self.todo <= LINES or self.ended == self.todo or self.ended % (self.todo // LINES) == 0
        )


def plan_line(plan: Plan) -> str:
    """A plan in a sentence."""
    done, todo = len(plan.done), len(plan.missing)
    failed = f", of which {plan.failed} failed earlier" if plan.failed else ""
    return f"{_jobs(len(plan.tasks))}: {done:,} done, {todo:,} to make{failed}"


def plan_table(plan: Plan) -> Table:
    """Of a dry run: a row per arm and size."""
    found: dict[tuple[str, str, int, int], list[Task]] = {}
    for task in plan.tasks:
        height, width, frames = task.size
        key = (task.folder.parent.name, f"{width}x{height}x{frames}", task.steps, task.tokens)
        found.setdefault(key, []).append(task)
    table = _table(("arm", "size", "steps", "tokens", "jobs", "dense too", "done", "to make"))
    for (arm, size, steps, tokens), tasks in found.items():
        done = sum(task.id in plan.done for task in tasks)
        dense = sum(task.request.compare_dense for task in tasks)
        numbers = (steps, tokens, len(tasks), dense, done, len(tasks) - done)
        table.add_row(arm, size, *(f"{number:,}" for number in numbers))
    return table


def table(rows: Any) -> Table:
    """The arms of a run."""
    made = summary.arms(rows)
    states = ["done", *(name for name in ("failed", "missing") if any(one[name] for one in made))]
    columns = ["arm", "jobs", *states, "seconds", "speed-up", "density"]
    compared = any(line["psnr_pool"] is not None or line["ssim"] is not None for line in made)
    columns += ["PSNR", "SSIM"] if compared else []
    found = _table(columns)
    for line in made:
        cells = [f"{line[name]:,}" for name in ("jobs", *states)]
        cells += [
            _number(line["seconds"], ".1f"),
            _number(line["speedup"], ".2f", "x"),
            _number(line["density"], ".2f"),
        ]
        if compared:
            cells += [_number(line["psnr_pool"], ".2f", " dB"), _number(line["ssim"], ".4f")]
        found.add_row(line["arm"], *cells)
    return found


def compare_command(report: Report) -> str:
    """What measures every arm against the dense videos; empty if a batch has none."""
    tasks = [t for t in report.plan.tasks if report.outcomes.get(t.id, None) is not None]
    reference = [task for task in tasks if task.request.compare_dense]
    if not reference:
        return ""
    arms = dict.fromkeys(task.folder.parent for task in tasks)
    tests = [word for arm in arms for word in ("--test", str(_near(arm)))]
    home = _near(report.plan.home)
    return shlex.join(
        ["vidsparse", "compare", "--ref", str(_near(reference[0].folder.parent)), *tests, "--out",
         str(home / "compare")]
    )  # fmt: skip


def _table(columns: Any) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        side: Any = "left" if name in ("arm", "size") else "right"
        table.add_column(name, justify=side, no_wrap=name != "arm", overflow="fold")
    return table


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _jobs(count: int) -> str:
    return f"{count:,} job{'' if count == 1 else 's'}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _near(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path != here and path.is_relative_to(here) else path
