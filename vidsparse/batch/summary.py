"""The figures of the tasks of a batch: summary.csv, a row each, and a table of its arms."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, median
from typing import Any

from vidsparse.batch.task import Outcome, Task
from vidsparse.quality.frames import atomic_output

FILE = "summary.csv"
COLUMNS = (
    "job", "status", "prompt", "seed", "preset", "overrides", "height", "width", "frames", "steps",
    "tokens", "density", "attention_density", "seconds", "total_seconds", "dense_seconds",
    "speedup", "psnr_pool", "ssim", "device", "threads", "tries", "worker", "id", "error",
)  # fmt: skip
STATES = {"made": "done", "there": "done", "failed": "failed"}
"""Status of an outcome -> that of a row; of a task without an outcome it is "missing"."""


def figures(sidecar: Mapping[str, Any]) -> dict[str, Any]:
    """What a row takes from a job's metrics.json. Seconds: of the denoising loop, but the total."""
    arms = sidecar.get("arms") or {}
    sparse, dense = arms.get("sparse") or {}, arms.get("dense") or {}
    quality = sidecar.get("quality") or {}
    return {
        "density": sidecar.get("density"),
        "attention_density": sidecar.get("attention_density"),
        "seconds": sparse.get("denoise_seconds"),
        "total_seconds": sparse.get("total_seconds"),
        "dense_seconds": dense.get("denoise_seconds"),
        "psnr_pool": quality.get("psnr_pool"),
        "ssim": quality.get("ssim"),
        "device": sidecar.get("gpu") or sidecar.get("device"),
        "threads": sidecar.get("threads"),
    }


def rows(tasks: Sequence[Task], outcomes: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """A row a task, in the order of the plan; None: nobody has measured it.

    The dense seconds of a task are those of its scene on the same device and threads, as the dense
    video is made once.
    """
    dense = {}
    for task in tasks:
        found = _figures(task, outcomes)
        if found.get("dense_seconds"):
            dense[task.scene, found["device"], found["threads"]] = found["dense_seconds"]
    made = []
    for task in tasks:
        outcome, found = outcomes.get(task.id), dict(_figures(task, outcomes))
        if found:
            found["dense_seconds"] = dense.get((task.scene, found["device"], found["threads"]))
        height, width, frames = task.size
        facts: dict[str, Any] = {
            "job": task.name,
            "status": STATES.get(outcome.status, "missing") if outcome else "missing",
            "prompt": task.request.prompt,
            "seed": task.request.seed,
            "preset": Path(task.preset).stem,
            "overrides": " ".join(task.request.overrides or ()),
            "height": height,
            "width": width,
            "frames": frames,
            "steps": task.steps,
            "tokens": task.tokens,
            "id": task.id,
            **found,
        }
        if facts.get("dense_seconds") and facts.get("seconds"):
            facts["speedup"] = facts["dense_seconds"] / facts["seconds"]
        if outcome:
            facts |= {"tries": outcome.tries or None, "worker": outcome.worker or None}
            facts["error"] = outcome.error or None
        made.append({name: facts.get(name) for name in COLUMNS})
    return made


def write(home: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """summary.csv, whole or not at all. Raises OSError."""
    path = home / FILE
    with (
        atomic_output(path) as part,
        part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def arms(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line per folder of jobs: counts; medians of seconds and speed-up, means of the rest."""
    made = []
    for arm in dict.fromkeys(_arm(row) for row in rows):
        own = [row for row in rows if _arm(row) == arm]
        states = [row["status"] for row in own]
        line: dict[str, Any] = {"arm": arm, "jobs": len(own)}
        line |= {state: states.count(state) for state in ("done", "failed", "missing")}
        for name, mean in (
            ("seconds", median),
            ("speedup", median),
            ("density", fmean),
            ("psnr_pool", fmean),
            ("ssim", fmean),
        ):
            values = [row[name] for row in own if row[name] is not None]
            line[name] = mean(values) if values else None
        made.append(line)
    return made


def _arm(row: Mapping[str, Any]) -> str:
    return str(row["job"]).partition("/")[0]


def _figures(task: Task, outcomes: Mapping[str, Outcome]) -> Mapping[str, Any]:
    with suppress(KeyError):
        return outcomes[task.id].figures
    return {}
