"""What the GPU suite has measured, in the place of what the table assumes.

`kernels/gpu/suite.py` writes `gpu_bench.csv`; committed below `kernels/results`, its rows of a GPU
give three constants, each a median with the spread of its rows as error:

    dense    best of scaled_dot_product_attention, TFLOP/s of the longest shape
    sparse   the forward over listed tiles, TFLOP/s of kept work, at all densities below 1
    around   (whole call - the forward) / what `stages` says of all that is not listed tiles; where
             there are no whole calls, what the table has of it

Of linear layers and elementwise operations the suite has no rows: those constants stay.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median, pstdev

from vidsparse import forms
from vidsparse.costs import clock, stages
from vidsparse.costs.forward import Forward
from vidsparse.costs.machine import Constant, Machine
from vidsparse.costs.stage import AROUND, Method
from vidsparse.grid import TokenGrid
from vidsparse.shipped import folder

FILE = "gpu_bench.csv"
DENSE = ("sdpa-cudnn", "sdpa-flash")
BLOCKS = "128x64"
"""Tokens of a query and of a key block in the presets."""


LEAST = 0.05
"""Standard error of a measured constant at least, relative: of another run, another board."""

Row = Mapping[str, str]


def measured(machine: Machine, names: Iterable[str], path: Path | None = None) -> Machine:
    """A machine with what was measured on a GPU that torch calls by one of these names; without
    such rows what the table says of it. path: of the CSV, None for the shipped one."""
    rows = [row for row in _read(path) if any(name in row["gpu"] for name in names)]
    constants = dict(machine.constants)
    dense = {row["tokens"]: float(row["tflops"]) for row in _of(rows, "whole", DENSE, dense=True)}
    if dense:
        longest = max(dense, key=int)
        best = max(
            float(row["tflops"])
            for row in _of(rows, "whole", DENSE, dense=True)
            if row["tokens"] == longest
        )
        constants["dense"] = _constant([best], rows, 1e12)
    sparse = [float(row["tflops"]) for row in _own(rows, "sparse")]
    if sparse:
        constants["sparse"] = _constant(sparse, rows, 1e12)
    found = replace(machine, constants=constants)
    ratios = [ratio for ratio in _around(rows, found) if ratio > 0]
    around = _constant(ratios, rows) if ratios else machine.around
    if around is None:
        return found
    return replace(found, slower=dict.fromkeys(AROUND, around))


def _around(rows: list[Row], machine: Machine) -> list[float]:
    """Time around the listed tiles / as modelled, of each shape and density."""
    alone = {_key(row): float(row["ms_p50"]) for row in _own(rows, "sparse")}
    ratios = []
    for row in _own(rows, "whole"):
        if _key(row) not in alone:
            continue
        tokens, heads, depth = (int(row[name]) for name in ("tokens", "heads", "head_dim"))
        grid = TokenGrid(1, 1, tokens)
        forward = Forward(grid, 1, heads, depth, (), 0.0, 0, row["dtype"], True)
        method = Method(128, 64, first_order=True)  # of the suite: tiles
        work = stages.sparse_layer(forward, method, float(row["density"]))
        around = clock.timed([one for one in work if one.name in AROUND], machine)
        seconds = (float(row["ms_p50"]) - alone[_key(row)]) / 1e3
        ratios.append(seconds / around.seconds)
    return ratios


def own_way(gpu: str) -> str:
    """The form of the Triton engine on a GPU of NVIDIA, such as "NVIDIA H100 80GB HBM3, sm_90"."""
    capability = re.search(r"sm_(\d+)\d$", gpu)
    return forms.way(forms.auto(int(capability[1]) if capability else 0)[0])


def _own(rows: list[Row], stage: str) -> list[Row]:
    """Of our own kernels in blocks of the presets."""
    return [
        row for row in rows if row["blocks"] == BLOCKS and _of([row], stage, (own_way(row["gpu"]),))
    ]


def _of(rows: list[Row], stage: str, impls: tuple[str, ...], dense: bool = False) -> list[Row]:
    """Rows with a time. dense: of density 1, else of less."""
    return [
        row
        for row in rows
        if row["stage"] == stage
        and row["impl"] in impls
        and (float(row["density"]) == 1) == dense
        and row["ms_p50"]
        and row["tflops"]
        and not row["message"]
    ]


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("shape", "dtype", "density"))


def _constant(values: list[float], rows: list[Row], unit: float = 1.0) -> Constant:
    middle = median(values)
    spread = pstdev(values) / middle if len(values) > 1 else 0.0
    newest = max(rows, key=lambda row: row["date"])
    origin = f"{FILE}, {newest['date']}, commit {newest['commit']}"
    return Constant(middle * unit, max(LEAST, spread), "measured", origin)


def _read(path: Path | None) -> list[Row]:
    """Rows of the CSV; none where there is no such file."""
    try:
        path = path or folder("kernels/results") / FILE
        with path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]
    except FileNotFoundError:
        return []
