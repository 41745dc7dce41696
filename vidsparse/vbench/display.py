"""What a person sees of it: a bar over the clips, a table of the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from vidsparse.terminal import printable
from vidsparse.vbench.export import Listener
from vidsparse.vbench.importing import tabular


class Display(Listener):
    """A live bar on a terminal, a line per clip elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None
        self.task = TaskID(0)
        self.clips = self.done = 0

    def say(self, text: str) -> None:
        self.console.print(printable(text, 2000), markup=False, highlight=False, soft_wrap=True)

    def begin(self, clips: int) -> None:
        self.clips = clips
        if not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("{task.completed}/{task.total} clips"),
            BarColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.console,
            refresh_per_second=4,
        )
        self.task = self.progress.add_task("", total=clips, note="")
        self.progress.start()

    def clip(self, arm: str, name: str) -> None:
        self.done += 1
        note = printable(f"{arm}: {name}", 60)
        if self.progress is not None:
            self.progress.update(self.task, completed=self.done - 1, note=note)
        else:
            self.say(f"{self.done}/{self.clips} {note}")

    def end(self) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=self.done, note="")
            self.progress.stop()
            self.progress = None


def table(added: Mapping[str, Any]) -> Table:
    """A line per dimension and score, a column per arm. added: what `importing.merge` returned."""
    header, rows = tabular(added)
    found = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    found.add_column("")
    for cells in rows:
        found.add_column(cells[0], justify="right")
    for n, title in enumerate(header[1:], 1):
        found.add_row(title, *(cells[n] for cells in rows))
    return found
