"""The progress of work on clips: a live bar on a terminal, a line per clip elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vidsparse.terminal import printable

LONGEST = 2000
"""Characters of one line that are shown."""


class ClipBar:
    """Says what is done on a console. `begin`, then `next` for every clip, then `end`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None
        self.task = TaskID(0)
        self.total = self.begun = 0
        self.note = ""

    def say(self, text: str) -> None:
        """A line for the user."""
        self.console.print(printable(text, LONGEST), markup=False, highlight=False, soft_wrap=True)

    def begin(self, clips: int) -> None:
        """So many clips are to be worked on."""
        self.total, self.begun = clips, 0
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

    def next(self, arm: str, name: str) -> None:
        """A clip begins, so those before it are done."""
        self.begun += 1
        self.note = printable(f"{arm}: {name}", 100)
        if self.progress is not None:
            self.progress.update(self.task, completed=self.begun - 1, note=self.note)
        else:
            self.say(f"{self.begun}/{self.total} {self.note}")

    def detail(self, text: str) -> None:
        """How far the clip is; only a live bar shows it."""
        if self.progress is not None:
            self.progress.update(self.task, note=f"{self.note}, {text}")

    def end(self) -> None:
        """All clips are done, or it was broken off."""
        if self.progress is not None:
            self.progress.update(self.task, completed=self.begun, note="")
            self.progress.stop()
            self.progress = None
