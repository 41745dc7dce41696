"""Units of GPU work, done one after another in a process that may die at any of them.

A unit is the smallest thing that may fail alone: a comparison, a timing of one form. What became of
it stands in gpu_units.csv before the next begins, so another process can go on behind it; the
process that watches (`gpu_watch`) is told what begins, by JSON lines. Imports nothing heavy.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gpu_rows import Check, Facts, Result, Row, Tried, add, fault, figures, load

LEDGER = "gpu_units.csv"
RESTART = 75
"""Exit status of a process that asks for a fresh one in its place."""

DEATHS = 3
"""So many units of a family that killed their process, or one that hung: the rest is skipped."""

REPEATED = ("failed", "died", "hung", "skipped", "wrong")


@dataclass(frozen=True)
class Unit:
    """seconds: what it takes about, not begun with less time left. limit: then it hangs.

    process: units of one name follow each other in a process of their own; "": shared by all others
    beside it.
    blank: its row as far as it is known before: what is saved, with the reason, if it fails.
    act: gives the rows to save. file: name of their CSV without suffix.
    """

    name: str
    blank: Result | Check
    act: Callable[[], Iterable[Result | Check]]
    file: str
    family: str = ""
    seconds: float = 5.0
    limit: float = 60.0
    process: str = ""


@dataclass
class Hand:
    """What a process works with.

    emit: tells the watcher. left: seconds left. settle: waits for the device; raises what failed
    there. healthy: whether the process can go on after an exception. forget: gives memory back.
    """

    folder: Path
    facts: Facts
    run: str
    emit: Callable[[dict[str, Any]], None]
    left: Callable[[], float]
    settle: Callable[[], None] = lambda: None
    healthy: Callable[[BaseException], bool] = lambda error: True
    forget: Callable[[], None] = lambda: None

    def past(self) -> list[Tried]:
        """What was tried on such a machine with the same sources."""
        same = [asdict(self.facts)[name] for name in ("source", "gpu", "torch", "triton")]
        return [t for t in load(self.folder / LEDGER, Tried)
                if [t.source, t.gpu, t.torch, t.triton] == same]  # fmt: skip


def work(units: list[Unit], hand: Hand, again: bool = False) -> int:
    """Do what is left to do, in the order of the units; the exit status of the process.

    Units that are done are skipped unless `again`; those that failed in an earlier run come last.
    """
    tried = {row.unit: row for row in hand.past()}
    todo = [unit for unit in units if waits(tried.get(unit.name), hand.run, again)]
    todo.sort(key=lambda unit: unit.name in tried and not again)
    hand.emit({"facts": asdict(hand.facts), "todo": len(todo), "units": len(units)})
    past = [t for t in tried.values() if t.run == hand.run or not again]
    process = None
    for unit in todo:
        if why := doomed(unit, past):
            note(hand, unit, "skipped", 0.0, why)
        elif hand.left() < unit.seconds:
            hand.emit({"late": unit.name})
        elif process not in (None, unit.process):
            return RESTART
        else:
            process = unit.process
            if not run(unit, hand):
                return RESTART
    return 0


def waits(tried: Tried | None, run: str, again: bool) -> bool:
    """Whether a unit is to be done in this run."""
    if tried is None:
        return True
    return tried.run != run and (again or tried.outcome in REPEATED)


def doomed(unit: Unit, past: list[Tried]) -> str:
    """Why a unit is not even tried: its family hangs, or kills process after process."""
    own = [t for t in past if unit.family and t.family == unit.family and t.unit != unit.name]
    hung = [t for t in own if t.outcome == "hung"]
    died = [t for t in own if t.outcome == "died"]
    if hung:
        return f"{unit.family} hung: {hung[0].unit}"
    return f"{unit.family} died {len(died)} times" if len(died) >= DEATHS else ""


def run(unit: Unit, hand: Hand) -> bool:
    """Do a unit and save what comes of it; whether the process can go on."""
    blank = {**asdict(unit.blank), "kind": type(unit.blank).__name__}
    hand.emit({"begin": unit.name, "family": unit.family, "limit": unit.limit,
               "file": unit.file, "blank": blank})  # fmt: skip
    start = time.monotonic()
    outcome, message, sound = "done", "", True
    try:
        for row in unit.act():
            hand.settle()
            add(hand.folder / f"{unit.file}.csv", row)
            hand.emit({"row": figures(row) or row.message})
            if why := fault(row):
                outcome, message = "wrong", why
        hand.settle()
    except (Exception, SystemExit) as caught:
        outcome, message = "failed", in_words(caught)
        add(hand.folder / f"{unit.file}.csv", replace(unit.blank, message=message))
        sound = hand.healthy(caught)
    note(hand, unit, outcome, time.monotonic() - start, message)
    hand.forget()
    return sound


def note(hand: Hand, unit: Unit, outcome: str, seconds: float, message: str) -> None:
    """Write down what became of a unit, and tell."""
    tried(hand.folder, asdict(hand.facts), hand.run, unit.name, unit.family, outcome, seconds,
          message)  # fmt: skip
    hand.emit({"end": unit.name, "outcome": outcome, "seconds": seconds, "message": message})


def tried(
    folder: Path,
    facts: dict[str, Any],
    run: str,
    unit: str,
    family: str,
    outcome: str,
    seconds: float,
    message: str,
) -> None:
    """A line of the ledger."""
    row = Tried(**facts, run=run, unit=unit, family=family, outcome=outcome,
                seconds=round(seconds, 2), message=message)  # fmt: skip
    add(folder / LEDGER, row)


def blank_row(blank: dict[str, Any], message: str) -> Row:
    """The row of a unit whose process is gone."""
    given = dict(blank)
    kind = {"Result": Result, "Check": Check}[given.pop("kind")]
    row: Row = kind(**given | {"message": message})
    return row


def to_pipe(number: int) -> Callable[[dict[str, Any]], None]:
    """Events as JSON lines to a file descriptor that no process made from here inherits.

    Where nobody reads any more, the process ends.
    """
    os.set_inheritable(number, False)

    def emit(event: dict[str, Any]) -> None:
        try:
            os.write(number, json.dumps(event).encode() + b"\n")
        except BrokenPipeError:
            os._exit(1)

    return emit


def in_words(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
