"""Watches the process that does the units of GPU work, and starts another where one is lost.

A process that crashes, hangs or spoils its GPU context loses the unit it was at, which is written
down as such, and nothing else. Imports nothing heavy: no GPU error reaches it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_rows import add
from gpu_units import RESTART, blank_row, tried

START_LIMIT = 180.0
"""Seconds in which a process begins its first unit: imports, and the GPU answering at all."""

FALSE_STARTS = 2
"""So many processes in a row that end before they begin a unit: no more are started."""


@dataclass
class Watched:
    """What was seen. late: units for which no time was left; facts: of the machine."""

    facts: dict[str, Any] = field(default_factory=dict)
    outcomes: dict[str, tuple[str, str]] = field(default_factory=dict)
    late: list[str] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)
    units: int = 0
    todo: int = 0


@dataclass
class Watch:
    """deadline: monotonic time at which all must be over. say: prints a line."""

    command: list[str]
    folder: Path
    run: str
    deadline: float
    say: Callable[[str], None] = print
    seen: Watched = field(default_factory=Watched)
    begun: dict[str, Any] | None = None
    figures: str = ""
    since: float = 0.0
    start: float = field(default_factory=time.monotonic)

    def until_done(self) -> Watched:
        """Start processes until one has nothing left to do, or the time is over."""
        false_starts = 0
        while time.monotonic() < self.deadline:
            before = len(self.seen.outcomes)
            status = self.one_process()
            if status == 0:
                break
            worked = len(self.seen.outcomes) > before
            false_starts = 0 if worked else false_starts + 1
            if not worked and status != RESTART and time.monotonic() < self.deadline:
                self.seen.trouble.append(f"a process {how(status)} before it began a unit")
            if false_starts >= FALSE_STARTS:
                break
        return self.seen

    def one_process(self) -> int:
        """Start one, follow what it says; its exit status, negative for a signal."""
        reading, writing = os.pipe()
        left = f"{self.deadline - time.monotonic():.1f}"
        process = subprocess.Popen(
            [*self.command, "--events", str(writing), "--left", left, "--run", self.run],
            pass_fds=[writing],
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        os.close(writing)
        said: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=listen, args=(reading, process, said), daemon=True).start()
        self.begun, self.since = None, time.monotonic()
        try:
            while True:
                ends = self.since + (self.begun["limit"] if self.begun else START_LIMIT)
                wait = min(ends, self.deadline) - time.monotonic()
                try:
                    line = said.get(timeout=max(0.0, wait))
                except queue.Empty:
                    return self.stop(process, late=self.deadline <= ends)
                if line is None:
                    status = process.wait()
                    if self.begun:
                        self.lost("died", f"the process {how(status)}")
                    return status
                self.heard(json.loads(line))
        finally:
            end(process)

    def heard(self, event: dict[str, Any]) -> None:
        seen = self.seen
        if "facts" in event:
            if not seen.facts:
                self.say(", ".join(f"{name} {text}" for name, text in event["facts"].items()))
            seen.facts, seen.units = event["facts"], event["units"]
            seen.todo = max(seen.todo, event["todo"])
        elif "begin" in event:
            self.begun, self.figures = event, ""
        elif "row" in event:
            self.figures = event["row"]
        elif "late" in event:
            seen.late = list(dict.fromkeys([*seen.late, event["late"]]))
        elif "trouble" in event:
            seen.trouble.append(event["trouble"])
            self.say(event["trouble"])
        elif "end" in event:
            self.over(event["end"], event["outcome"], event["message"], event["seconds"])
            self.begun = None
        self.since = time.monotonic()

    def over(self, unit: str, outcome: str, message: str, seconds: float) -> None:
        seen = self.seen
        seen.outcomes[unit] = outcome, message
        took = time.monotonic() - self.start
        count = f"{len(seen.outcomes)}/{seen.todo}"
        note = "".join(f": {text}" for text in (self.figures, message) if text)
        self.say(f"{took:5.0f} s  {count:>9}  {outcome:7} {seconds:5.1f} s  {unit}{note}")

    def stop(self, process: subprocess.Popen[bytes], late: bool) -> int:
        """End a process that takes too long, or is at work when the time is over."""
        end(process)
        if late and self.begun:
            self.seen.late.append(f"{self.begun['begin']} (stopped at the end of the time)")
        elif self.begun:
            self.lost("hung", f"no end in {self.begun['limit']:.0f} s")
        elif not late:
            self.seen.trouble.append(f"a process said nothing for {START_LIMIT:.0f} s")
        return 1

    def lost(self, outcome: str, message: str) -> None:
        """Write down the unit that a process was lost at."""
        assert self.begun is not None
        name, seconds = self.begun["begin"], time.monotonic() - self.since
        add(self.folder / f"{self.begun['file']}.csv", blank_row(self.begun["blank"], message))
        facts = self.seen.facts
        tried(self.folder, facts, self.run, name, self.begun["family"], outcome, seconds, message)
        self.over(name, outcome, message, seconds)
        self.begun = None


def listen(number: int, process: subprocess.Popen[bytes], said: queue.Queue[str | None]) -> None:
    """Lines of a pipe; None at the end of the process, though a child of it may hold the pipe."""

    def read() -> None:
        with os.fdopen(number) as pipe:
            for line in pipe:
                if line.endswith("\n"):  # else cut off by the end of the process
                    said.put(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    process.wait()
    reader.join(timeout=1.0)
    said.put(None)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it made."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def how(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended with exit status {status}"
    return f"was killed by {signal.Signals(-status).name}"
