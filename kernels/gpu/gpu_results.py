"""What measures on a GPU: the machine of a process, the facts of every row, the clock."""

from __future__ import annotations

import datetime
import gc
import hashlib
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from gpu_rows import Facts
from needs import ROOT

FOLDER = ROOT / "kernels" / "results"
Name = TypeVar("Name")

FLUSH_BYTES = 256 * 2**20
"""Written before every timed run, so that none starts with its data in the L2."""


@dataclass(frozen=True)
class Machine:
    """What a process measures on, and for how long. device: cuda, or cpu in a dry run.

    ways: names of `gpu_start.ways` that were asked for. broken: families of units that killed a
    process or hung.
    """

    device: torch.device
    folder: Path
    deadline: float
    ways: tuple[str, ...]
    broken: frozenset[str] = frozenset()

    @property
    def dry(self) -> bool:
        return self.device.type == "cpu"

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.deadline - time.monotonic()

    def settle(self) -> None:
        """Wait for the device; raises what went wrong on it."""
        if not self.dry:
            torch.cuda.synchronize()

    def healthy(self, error: BaseException) -> bool:
        """Whether the process can go on after an exception: the GPU still computes, has memory.

        An illegal access leaves a context in which every later call fails.
        """
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return False
        try:
            self.settle()
            return float(torch.ones(2, device=self.device).sum()) == 2.0
        except Exception:
            return False

    def forget(self) -> None:
        """Give unused memory back."""
        gc.collect()
        if not self.dry and self.healthy(RuntimeError()):
            torch.cuda.empty_cache()


def seed(name: str) -> None:
    """The same random numbers for a unit whatever ran before it."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))


@lru_cache(maxsize=1)
def facts() -> dict[str, Any]:
    """What stands in every row, as keywords of it. No git: the commit is VIDSPARSE_COMMIT."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = os.environ.get("VIDSPARSE_COMMIT", "unknown")
    gpu = device_name() if torch.cuda.is_available() else "interpreter"
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    here = Facts(commit, sources(), date, gpu, torch.__version__, torch.version.cuda or "none",
                 triton.__version__)  # fmt: skip
    return asdict(here)


def device_name() -> str:
    """Such as "NVIDIA H100 80GB HBM3, sm_90"."""
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}"


def sources() -> str:
    """Hash of what is measured: the package and its presets."""
    digest = hashlib.sha256()
    for folder, pattern in ((ROOT / "vidsparse", "*.py"), (ROOT / "configs", "*.yaml")):
        for path in sorted(folder.rglob(pattern)):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


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
