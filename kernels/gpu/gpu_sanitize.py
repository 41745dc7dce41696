"""compute-sanitizer over the first checks of every engine, in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from gpu_compare import RAW_MEMORY, Absent
from gpu_results import Machine, facts
from gpu_rows import Check
from gpu_units import Unit
from gpu_ways import here

TOOLS = ("memcheck", "racecheck", "initcheck")
LIMIT = 150.0
FAULTY = 9
"""Exit status that stands for errors found."""


def units(machine: Machine) -> Iterator[Unit]:
    """One per tool and engine."""
    ways = here(machine)[:1] if machine.dry else here(machine)
    for tool in TOOLS:
        for one in ways:
            blank = Check(**facts(), check=tool, shape="ragged", dtype="bfloat16", impl=one.name,
                          limit=0.0)  # fmt: skip
            act = partial(sanitize, machine, tool, one.name, blank)
            seconds = 0.0 if machine.dry else 12.0
            yield Unit(f"sanitize: {tool}, {one.name}", blank, act, "gpu_checks",
                       f"{tool} {one.name}", seconds, LIMIT)  # fmt: skip


def sanitize(machine: Machine, tool: str, name: str, blank: Check) -> Iterator[Check]:
    """Errors that the tool counts; 0 is right."""
    try:
        program = sanitizer(machine)
    except Absent as absent:
        yield replace(blank, verdict="absent", message=str(absent))
        return
    suite = Path(__file__).resolve().parent / "suite.py"
    # memory that torch keeps would hide what is out of bounds, or was never written
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if tool == "initcheck":
        environment[RAW_MEMORY] = "1"
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "--tool", tool, "--error-exitcode", str(FAULTY), sys.executable,
                   str(suite), "--worker", "--only", "first", "--engines", name, "--out", folder,
                   "--units", "check: "]  # fmt: skip
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    yield verdict(done, blank)


def sanitizer(machine: Machine) -> str:
    """The program; raises `Absent`."""
    found = shutil.which("compute-sanitizer")
    if machine.dry:
        raise Absent("a dry run has no GPU to look at")
    if found is None:
        raise Absent("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    return found


def verdict(done: subprocess.CompletedProcess[str], blank: Check) -> Check:
    """The row for what the tool said; raises RuntimeError if it did not get to its end."""
    said = [line for line in done.stdout.splitlines() if line.startswith("=====")]
    counts = [line for line in said if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
    if not counts or done.returncode not in (0, FAULTY):
        raise RuntimeError(
            f"exit status {done.returncode}: {' '.join((said or [done.stderr])[-3:])}"
        )
    count = next(int(word) for word in counts[-1].split("SUMMARY:")[1].split() if word.isdigit())
    message = "" if count == 0 else " ".join(said[:6])[:400]
    outcome = "wrong" if count else "right"
    return replace(blank, error=float(count), verdict=outcome, message=message)
