"""What the GPU scripts share: result rows, their CSV, the clock, the time budget of a process."""

from __future__ import annotations

import csv
import datetime
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

FOLDER = Path(__file__).resolve().parent / "results"
Name = TypeVar("Name")
SAVE_EVERY = 3.0
"""Seconds."""

FLUSH_BYTES = 256 * 2**20
"""Written before every timed run, so that none starts with its data in the L2."""


@dataclass
class Result:
    """One timing. Times in ms; tflops: of kept work per second; None where there is none."""

    commit: str
    date: str
    gpu: str
    torch: str
    triton: str
    shape: str
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    density: float
    impl: str
    stage: str
    ms_p20: float
    ms_p50: float
    ms_p80: float
    tflops: float | None = None
    dense_impl: str | None = None
    speedup_vs_dense: float | None = None
    rel_l2: float | None = None


@dataclass
class Check:
    """One comparison with an oracle. error <= limit is right; message: why it did not run."""

    commit: str
    date: str
    gpu: str
    torch: str
    triton: str
    check: str
    shape: str
    dtype: str
    impl: str
    error: float
    limit: float
    verdict: str
    message: str = ""


KEYS: dict[type, tuple[str, ...]] = {
    Result: ("gpu", "torch", "triton", "shape", "heads", "head_dim", "dtype", "density", "impl",
             "stage"),
    Check: ("gpu", "torch", "triton", "check", "shape", "dtype", "impl"),
}  # fmt: skip
"""Same key: the newer row replaces the older one."""


@dataclass(frozen=True)
class Machine:
    """What a process measures on, and for how long. device: cuda, or cpu in a dry run."""

    device: torch.device
    folder: Path
    deadline: float
    forms: tuple[str, ...]

    @property
    def dry(self) -> bool:
        return self.device.type == "cpu"

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Job:
    """A piece of a part. seconds: what it takes at most, compilation included.

    act returns the rows to save. `file`: name of their CSV without suffix.
    """

    name: str
    seconds: float
    act: Callable[[], Iterable[Any]]
    file: str


@dataclass
class Outcome:
    """dropped: jobs without time left; failed: job -> error; rows: all that were saved."""

    dropped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    rows: list[Any] = field(default_factory=list)


def run_jobs(jobs: list[Job], machine: Machine, console: Console) -> Outcome:
    """Run the jobs in order, save as they go; those that don't fit into the time are dropped.

    A job that fails does not stop the others.
    """
    outcome = Outcome()
    said = TextColumn("{task.description}")
    columns = said, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(jobs))
        for job in jobs:
            progress.update(task, description=f"{job.name:<40}")
            if job.seconds > machine.left and not machine.dry:
                outcome.dropped.append(job.name)
            else:
                start = time.monotonic()
                error = _run(job, machine, outcome)
                took = f"{time.monotonic() - start:5.1f} s{peak(machine.device)}"
                console.print(f"{took}  {job.name}" + (f": {error}" if error else ""), markup=False)
            progress.advance(task)
    for name in outcome.dropped:
        console.print(f"dropped for lack of time: {name}", markup=False)
    return outcome


def _run(job: Job, machine: Machine, outcome: Outcome) -> str:
    """Run and save; the error, empty if none."""
    path = machine.folder / f"{job.file}.csv"
    fresh: list[Any] = []
    error, saved = "", time.monotonic()
    try:
        for row in job.act():
            outcome.rows.append(row)
            fresh.append(row)
            if time.monotonic() - saved > SAVE_EVERY:
                save(path, fresh)
                fresh, saved = [], time.monotonic()
    except Exception as caught:
        error = in_words(caught)
        outcome.failed[job.name] = error
    save(path, fresh)
    release(machine.device)
    return error


def in_words(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def release(device: torch.device) -> None:
    """Give unused memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak(device: torch.device) -> str:
    """The most memory that tensors took since the last call, in words; empty on a CPU."""
    if device.type != "cuda":
        return ""
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return f" {most / 2**30:5.1f} GiB"


@lru_cache(maxsize=1)
def facts() -> dict[str, Any]:
    """What stands in every row: commit, date, gpu, torch, triton.

    Where there is no git, the commit is VIDSPARSE_COMMIT.
    """
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = os.environ.get("VIDSPARSE_COMMIT", "unknown")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"commit": commit, "date": date, "gpu": gpu, **versions}


def save(path: Path, rows: list[Any]) -> None:
    """Add rows of one kind to a CSV in place of older ones of the same key, all or nothing."""
    if not rows:
        return
    kind = type(rows[0])
    names = [f.name for f in fields(kind)]
    kept = {_key(kind, line): line for line in load(path)}
    for row in rows:
        line = {k: "" if v is None else v for k, v in asdict(row).items()}
        kept[_key(kind, line)] = line
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())
    os.replace(part, path)


def load(path: Path) -> list[dict[str, Any]]:
    """Lines of a CSV as text by column; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _key(kind: type, line: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(line[name]) for name in KEYS[kind])


def interleaved(
    acts: Mapping[Name, Callable[[], object]], machine: Machine, seconds: float, most: int = 50
) -> dict[Name, list[float]]:
    """Times in ms of acts that run in turn, one of each per round, 3 .. `most` rounds.

    As `triton.testing.do_bench` does it: events around a run, the L2 overwritten in front of it.
    seconds: for all rounds together. A dry run makes one round.
    """
    if machine.dry:
        return {name: [1e3 * _wall(act)] for name, act in acts.items()}
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=machine.device)
    for act in acts.values():
        act()
    rounds = [_round(acts, flush)]
    torch.cuda.synchronize()
    once = sum(start.elapsed_time(end) for start, end in rounds[0].values()) / 1e3
    count = max(3, min(most, int(seconds / max(once, 1e-6))))
    rounds += [_round(acts, flush) for _ in range(count - 1)]
    torch.cuda.synchronize()
    return {
        name: [pairs[name][0].elapsed_time(pairs[name][1]) for pairs in rounds] for name in acts
    }


def _round(
    acts: Mapping[Name, Callable[[], object]], flush: torch.Tensor
) -> dict[Name, tuple[torch.cuda.Event, torch.cuda.Event]]:
    """Run every act once; events at start and end of each."""
    events = {}
    for name, act in acts.items():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        act()
        end.record()
        events[name] = start, end
    return events


def _wall(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def spread(times: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile, ms."""
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, middle, high = torch.tensor(times, dtype=torch.float64).quantile(points).tolist()
    return round(low, 4), round(middle, 4), round(high, 4)


def speedup(dense: list[float], times: list[float]) -> float:
    """Median over the rounds of dense time / time."""
    return round(statistics.median(d / t for d, t in zip(dense, times, strict=True)), 3)


def console() -> Console:
    """Standard output, wide enough for a table where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 160)
