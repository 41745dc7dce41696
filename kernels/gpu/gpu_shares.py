"""Checks side by side: several processes of the suite at once, each with a share of the units.

Most of a check is compiling, which takes a core of the host, and nothing is timed in one. Imports
nothing heavy.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from gpu_drive import bring
from gpu_units import LEDGER

PARTS = ("check", "select")
"""Those in which nothing is timed."""

LINE = re.compile(r" *\d+ s +\d+/")
"""Of a unit that is over."""


def side_by_side(
    script: Path,
    options: argparse.Namespace,
    parts: Sequence[str],
    folder: Path,
    say: Callable[[str], None],
) -> None:
    """Do these parts in `options.jobs` processes; their rows are in the folder afterwards.

    What failed, or there was no time for, is left to the process that comes after. The time that
    it took is taken off `options.budget_s`.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / str(n + 1) for n in range(options.jobs)]
        running = [
            subprocess.Popen(
                command(script, options, parts, f"{n + 1}/{options.jobs}", own),
                stdout=subprocess.PIPE,
                text=True,
            )
            for n, own in enumerate(folders)
        ]
        readers = [threading.Thread(target=tell, args=(one.stdout, say)) for one in running]
        try:
            for reader in readers:
                reader.start()
            for one in running:
                one.wait()
        finally:  # SIGTERM ends them too, and they the processes that work for them
            for one in running:
                one.terminate()
            for reader in readers:
                reader.join()
        for own in folders:
            if (own / LEDGER).is_file():
                bring(own, folder)
    options.budget_s -= time.monotonic() - start


def command(
    script: Path, options: argparse.Namespace, parts: Sequence[str], share: str, out: Path
) -> list[str]:
    """A share of these parts as a call of the suite."""
    parted = [sys.executable, str(script), "--only", *parts, "--share", share, "--out", str(out)]
    parted += ["--budget-s", str(options.budget_s), "--engines", *options.engines]
    parted += ["--dry-run"] * options.dry_run
    return parted + (["--units", options.units] if options.units else [])


def tell(lines: IO[str] | None, say: Callable[[str], None]) -> None:
    """Say the lines of units; the rest, a report of a share, is said of all at the end."""
    assert lines is not None
    for line in lines:
        if LINE.match(line):
            say(line.rstrip("\n"))
