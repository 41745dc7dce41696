"""Tasks that failed: a file each in failures/, beside the arms; gone when the task is made."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vidsparse.batch.task import Task

SCHEMA = "vidsparse.failure/1"
PLACE = "failures"


def write_failure(
    home: Path, task: Task, why: str, trace: str, run: str, tries: int, worker: str
) -> None:
    """Write down why a task failed, in a line and with a traceback. Raises OSError, as on a full
    disk."""
    asked = task.request
    content = {
        "schema": SCHEMA,
        "id": task.id,
        "error": why,
        "tries": tries,
        "prompt": asked.prompt,
        "seed": asked.seed,
        "preset": task.preset,
        "overrides": list(asked.overrides or ()),
        "size": list(task.size),
        "steps": task.steps,
        "run": run,
        "worker": worker,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "traceback": trace,
    }
    file = _file(home, task)
    file.parent.mkdir(exist_ok=True)
    part = file.with_name(f".{task.id}.part")
    text = json.dumps(content, indent=2, ensure_ascii=False)
    try:
        part.write_bytes(text.encode(errors="backslashreplace") + b"\n")
        os.replace(part, file)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def read_failure(home: Path, task: Task) -> dict[str, Any] | None:
    """What was written down of a task that failed; None if nothing was."""
    try:
        content = json.loads(_file(home, task).read_text(encoding="utf-8"))
        known = content["schema"] == SCHEMA and content["id"] == task.id
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if known else None


def forget_failure(home: Path, task: Task) -> None:
    """The task is made."""
    with suppress(OSError):
        _file(home, task).unlink()
        (home / PLACE).rmdir()  # if it is the last


def _file(home: Path, task: Task) -> Path:
    return home / PLACE / f"{task.folder.name}.json"
