"""Rows of the GPU scripts' results, and their CSV files, which a killed run leaves whole.

A row is added the moment it is there. Imports nothing heavy.
"""

from __future__ import annotations

import csv
import io
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints


@dataclass
class Facts:
    """What stands in every row. source: hash of the package's files, whatever git says."""

    commit: str
    source: str
    date: str
    gpu: str
    torch: str
    cuda: str
    triton: str


@dataclass
class Result(Facts):
    """One timing. Times in ms; tflops: of kept work per second; message: why there is no time.

    blocks: tokens of a query and of a key block, such as "128x64"; empty where there are none.
    """

    shape: str
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    density: float
    impl: str
    stage: str
    blocks: str = ""
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    tflops: float | None = None
    dense_impl: str | None = None
    speedup_vs_dense: float | None = None
    rel_l2: float | None = None
    message: str = ""


@dataclass
class Check(Facts):
    """One comparison with an oracle. error <= limit is right; message: why it did not run.

    verdict: right | wrong | failed | absent: what is to be checked does not run there.
    """

    check: str
    shape: str
    dtype: str
    impl: str
    density: float | None = None
    error: float | None = None
    limit: float | None = None
    verdict: str = "failed"
    message: str = ""


@dataclass
class Tried(Facts):
    """What became of a unit of work: done | wrong | failed | died | hung | skipped.

    family: what it shares its fate with: a form, a dense backend. run: the run that tried it.
    """

    run: str
    unit: str
    family: str
    outcome: str
    seconds: float
    message: str = ""


LIMITS = {"float32": 3e-6, "float16": 6e-4, "bfloat16": 5e-3}
"""Dtype -> relative L2 of an output of ours."""

INT8_LIMIT = 3e-2
"""With queries and keys in int8."""

YARDSTICKS = ("sdpa", "sdpa-cudnn", "sdpa-flash", "fa3", "fa4-dense", "flex")
"""Implementations that are not ours: their errors are shown, not judged."""

HERE = ("gpu", "torch", "triton")
KEYS: dict[type, tuple[str, ...]] = {
    Result: (
        *HERE,
        "shape",
        "heads",
        "head_dim",
        "dtype",
        "density",
        "impl",
        "stage",
        "blocks",
    ),
    Check: (*HERE, "check", "shape", "dtype", "impl"),
    Tried: (*HERE, "source", "unit"),
}
"""Same key: the newer row replaces the older one."""

Row = Result | Check | Tried


def add(path: Path, row: Row) -> None:
    """Add a row at the end of a CSV in one write; a file with other columns is rewritten first."""
    names = [f.name for f in fields(row)]
    if header(path) != names:
        rewrite(path, type(row), load(path, type(row)))
    with path.open("a", newline="") as file:
        file.write(lines(names, [row]))


def header(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def lines(names: list[str], rows: list[Any]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writerows({k: "" if v is None else v for k, v in asdict(row).items()} for row in rows)
    return text.getvalue()


def rewrite(path: Path, kind: type, rows: list[Any]) -> None:
    """A CSV of these rows alone, all or nothing."""
    names = [f.name for f in fields(kind)]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(",".join(names) + "\n" + lines(names, rows), newline="")
    os.replace(part, path)


def tidy(path: Path, kind: type) -> str:
    """Drop rows that newer ones replace, and half a line that a killed run left.

    A file that cannot be read is put aside; says so, else nothing.
    """
    try:
        if path.is_file():
            rewrite(path, kind, load(path, kind))
    except (ValueError, csv.Error) as error:
        aside = path.with_suffix(".unreadable")
        os.replace(path, aside)
        return f"{path} cannot be read ({error}): it is {aside.name} now"
    return ""


def load(path: Path, kind: type) -> list[Any]:
    """Rows of a CSV, of every key the newest; none if there is no such file.

    A line with too few cells, cut off by the end of a process, is left out. Raises ValueError if a
    cell is no number where there should be one.
    """
    if not path.is_file():
        return []
    hints = get_type_hints(kind)
    newest: dict[tuple[str, ...], Any] = {}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            if None in line or None in line.values():
                continue
            row = kind(**{name: typed(hints[name], line.get(name, "")) for name in hints})
            key = tuple(str(getattr(row, name)) for name in KEYS[kind])
            newest.pop(key, None)
            newest[key] = row
    return list(newest.values())


def typed(hint: Any, text: str) -> Any:
    """The value that a cell stands for."""
    if not text and NoneType in get_args(hint):
        return None
    if hint is str or str in get_args(hint):
        return text
    number = float(text or "nan")
    return int(number) if hint is int else number


def figures(row: Any) -> str:
    """What a row found, in a few words."""
    if isinstance(row, Check):
        return "" if row.error is None else f"error {row.error:g} of {row.limit:g}"
    ms = "" if row.ms_p50 is None else f"{row.ms_p50:.4g} ms"
    speed = f"{row.speedup_vs_dense}x {row.dense_impl}" if row.speedup_vs_dense else ""
    error = "" if row.rel_l2 is None else f"error {row.rel_l2:.1e}"
    return ", ".join(filter(None, (ms, speed, error)))


def fault(row: Any) -> str:
    """What is wrong with a row, in words; empty if nothing."""
    if isinstance(row, Check) and row.verdict == "absent":
        return ""
    if row.message:
        return str(row.message)
    if isinstance(row, Check):
        return "" if row.verdict == "right" else f"error {row.error}, allowed is {row.limit}"
    limit = INT8_LIMIT if row.impl.endswith("-int8") else LIMITS[row.dtype]
    judged = row.rel_l2 is not None and row.impl not in YARDSTICKS
    if judged and not row.rel_l2 <= limit:
        return f"error {row.rel_l2}, allowed is {limit}"
    return ""
