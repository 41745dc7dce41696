"""compute-sanitizer over the first checks, in processes of their own."""

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

from gpu_results import Machine, facts
from gpu_rows import Check
from gpu_units import Unit

LIMIT = 150.0
FAULTY = 9
"""Exit status that stands for errors found."""


def units(machine: Machine) -> list[Unit]:
    """One per form; none in a dry run, or where the tool is not installed."""
    tool = shutil.which("compute-sanitizer")
    if machine.dry or tool is None:
        return []
    found = []
    for form in machine.forms:
        blank = Check(**facts(), check="memcheck", shape="ragged", dtype="bfloat16", impl=form,
                      limit=0.0)  # fmt: skip
        act = partial(memcheck, tool, form, blank)
        name = f"sanitize: memcheck, {form}"
        found.append(Unit(name, blank, act, "gpu_checks", f"memcheck {form}", 8, 60.0, LIMIT))
    return found


def memcheck(tool: str, form: str, blank: Check) -> Iterator[Check]:
    """Errors that the tool counts; 0 is right."""
    suite = Path(__file__).resolve().parent / "suite.py"
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [tool, "--tool", "memcheck", "--error-exitcode", str(FAULTY), sys.executable,
                   str(suite), "--worker", "--only", "check", "--forms", form, "--out", folder,
                   "--units", "check: form: exact, rest skip; ragged, B 2, D 128"]  # fmt: skip
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    said = [line for line in done.stdout.splitlines() if line.startswith("=====")]
    errors = [line for line in said if "ERROR SUMMARY" in line]
    if not errors or done.returncode not in (0, FAULTY):
        raise RuntimeError(
            f"exit status {done.returncode}: {' '.join((said or [done.stderr])[-3:])}"
        )
    count = int(errors[-1].split("ERROR SUMMARY:")[1].split()[0])
    message = "" if count == 0 else " ".join(said[:6])[:400]
    yield replace(blank, error=float(count), verdict="wrong" if count else "right", message=message)
