"""How a GPU script runs: it watches, and calls itself as the process that does the work.

Imports nothing heavy.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_rows import Check, Result, Tried, load, rewrite, tidy
from gpu_start import folder_for, machine_for, ways
from gpu_units import LEDGER, Hand, in_words, to_pipe, work
from gpu_watch import Watch, Watched

if TYPE_CHECKING:
    from gpu_results import Machine
    from gpu_units import Unit

FILES = {"gpu_checks": Check, "gpu_bench": Result, "gpu_model": Result, "gpu_forms": Result,
         "gpu_presets": Result, "gpu_tune": Result}  # fmt: skip
"""Name of a CSV -> its rows."""


def add_options(parser: argparse.ArgumentParser, budget: float) -> None:
    """Those that all GPU scripts share."""
    parser.add_argument("--budget-s", type=float, default=budget, help="seconds for everything")
    parser.add_argument("--out", type=Path, help="folder of the results; it is gone on with")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on from the CSVs there")
    parser.add_argument("--engines", nargs="+", choices=ways(), default=list(ways()))
    parser.add_argument("--dry-run", action="store_true", help="tiny, in Triton's CPU interpreter")
    hidden: Any = {"help": argparse.SUPPRESS}
    parser.add_argument("--worker", action="store_true", **hidden)
    parser.add_argument("--events", type=int, **hidden)
    parser.add_argument("--left", type=float, default=1e9, **hidden)
    parser.add_argument("--run", default="", **hidden)


def command(script: Path, options: argparse.Namespace, *extra: str) -> list[str]:
    """A script of this folder as a process that works."""
    parts = [sys.executable, str(script.resolve()), "--worker", *extra]
    parts += ["--engines", *options.engines, *["--dry-run"] * options.dry_run]
    fresh = options.again or (options.dry_run and not options.out and not options.resume)
    parts += ["--again"] * fresh
    return parts + (["--out", str(options.out)] if options.out else [])


def watch(script: Path, options: argparse.Namespace, *extra: str) -> Watched:
    """Have the work done in processes of their own, in the time that there is."""
    start = time.monotonic()
    folder = folder_for(options.dry_run, options.out)
    folder.mkdir(parents=True, exist_ok=True)
    if options.resume:
        bring(options.resume, folder)
    for name, kind in {**FILES, LEDGER.removesuffix(".csv"): Tried}.items():
        if trouble := tidy(folder / f"{name}.csv", kind):
            say(trouble)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM"))  # ends the process too
    run = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    seconds = 1e9 if options.dry_run else options.budget_s
    this = Watch(command(script, options, *extra), folder, run, start + seconds, say)
    try:
        return this.until_done()
    except (SystemExit, KeyboardInterrupt) as ended:
        this.seen.trouble.append(f"ended from outside: {in_words(ended)}")
        return this.seen


def bring(source: Path, folder: Path) -> None:
    """Add the rows of the CSVs of another run to those of a folder, in front of them.

    Raises SystemExit if there is nothing to go on from.
    """
    if not (source / LEDGER).is_file():
        sys.exit(f"--resume {source}: there is no {LEDGER}, expected the --out of an earlier call")
    if source.resolve() == folder.resolve():
        return
    for name, kind in {**FILES, LEDGER.removesuffix(".csv"): Tried}.items():
        rows = [*load(source / f"{name}.csv", kind), *load(folder / f"{name}.csv", kind)]
        if rows:
            rewrite(folder / f"{name}.csv", kind, rows)


def say(line: str) -> None:
    print(line, flush=True)


def serve(
    options: argparse.Namespace,
    parser: argparse.ArgumentParser,
    sources: Callable[[Machine], Iterator[tuple[str, Callable[[], list[Unit]]]]],
) -> int:
    """Do the work. sources: name -> what lists its units; one that fails is told, not fatal."""
    folder = folder_for(options.dry_run, options.out)
    wanted = tuple(options.engines)
    machine = machine_for(options.dry_run, folder, options.left, wanted, parser.error)
    from dataclasses import replace

    from gpu_results import facts
    from gpu_rows import Facts

    emit = to_pipe(options.events) if options.events else lambda event: None
    hand = Hand(folder, Facts(**facts()), options.run, emit, lambda: machine.left, machine.settle,
                machine.healthy, machine.forget)  # fmt: skip
    lost = [t for t in hand.past() if t.outcome in ("died", "hung")]
    counts = [t for t in lost if t.run == options.run or not options.again]
    machine = replace(machine, broken=frozenset(t.family for t in counts))
    units: list[Unit] = []
    for name, listed in sources(machine):
        try:
            units += listed()
        except Exception as error:
            emit({"trouble": f"{name} is not run: {in_words(error)}"})
    return work(units, hand, options.again)
