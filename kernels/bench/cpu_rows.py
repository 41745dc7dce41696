"""Lines of the CPU bench: what stands in one, on which machine, and what is aimed at there."""

from __future__ import annotations

import csv
import datetime
import os
import subprocess
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from vidsparse.kernels.cpu import machine as cpu_machine

TARGETS = {
    "amx_bf16": {("float32", 64): 3.3, ("float32", 128): 3.5, ("bfloat16", 64): 3.2,
                 ("bfloat16", 128): 3.8},
    "avx512_bf16": {("float32", 64): 5.7, ("float32", 128): 7.0, ("bfloat16", 64): 7.5,
                    ("bfloat16", 128): 8.8},
}  # fmt: skip
"""Flag of the processor -> dtype and head dim -> times dense, with query blocks of 128. The first
flag that it has counts; others have no target."""

CSV = Path(__file__).resolve().parents[1] / "results" / "cpu.csv"
QUALITY = CSV.with_name("block_quality.csv")


@dataclass
class Result:
    """One line of the CSV; times in ms."""

    commit: str
    date: str
    cpu: str
    threads: int
    torch: str
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
    speedup_vs_dense: float
    rel_l2: float
    capability: str = ""
    environment: str = ""
    blocks: str = "128/64"
    route: str = ""

    def key(self) -> tuple[str, ...]:
        """Same key: the newer measurement replaces the older one."""
        names = (
            "cpu",
            "capability",
            "threads",
            "tokens",
            "heads",
            "head_dim",
            "dtype",
            "density",
            "impl",
            "stage",
            "environment",
            "blocks",
            "route",
        )
        return tuple(str(getattr(self, name)) for name in names)


def machine() -> dict[str, str]:
    """Facts for every line."""
    try:
        git = ["git", "-C", str(CSV.parent.parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return {
        "commit": commit,
        "date": date,
        "cpu": cpu_machine.name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "environment": " ".join(f"{key}={value}" for key, value in imitated().items()),
    }


def imitated() -> dict[str, str]:
    """The environment variables that forbid instructions."""
    restricting = cpu_machine.fingerprint()["environment"]
    return {key: x for key, x in restricting.items() if not key.startswith(("OMP_", "KMP_"))}


def targets() -> dict[tuple[str, int], float]:
    """Of the processor at hand; none for one that is imitated."""
    flags = cpu_machine.flags()
    known = [found for flag, found in TARGETS.items() if flag in flags]
    return known[0] if known and not imitated() else {}


def quality() -> dict[str, str]:
    """Blocks -> the error of the method, times that with blocks of 64/64; as far as it is known."""
    if not QUALITY.is_file():
        return {}
    with QUALITY.open(newline="") as file:
        return {f"{x['block_q']}/{x['block_k']}": x["of_64_64"] for x in csv.DictReader(file)}


def save(path: Path, results: list[Result]) -> None:
    """Add the results to the CSV in place of older ones of the same key, all or nothing."""
    names = [f.name for f in fields(Result)]
    lines: dict[tuple[str, ...], dict[str, object]] = {}
    if path.is_file():
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                kept = Result(**line)  # type: ignore[arg-type]
                lines[kept.key()] = asdict(kept)
    for result in results:
        lines[result.key()] = asdict(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines.values())
    os.replace(part, path)
