"""Whether `impl: auto` on this CPU goes dense where dense is faster, and only there.

Every cell is timed as in `cpu.py`, dense and sparse in turn, whole calls; beside it stands what
auto decides. Auto is wrong in a cell if it is slower there than dense by more than `TOLERANCE` and
twice the noise, and misses one if it goes dense where sparse is that surely `WORTH` times as fast.
Short calls are timed in more rounds.
"""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from vidsparse import SparseConfig, TokenGrid, sparse_attention
from vidsparse.attention import decision_for
from vidsparse.kernels.cpu import crossover as cpu_crossover

TOLERANCE, WORTH = 0.03, 1.1
FULL_ROUNDS = 4096
"""Tokens from which on the number of rounds is as asked for; in inverse proportion below."""

CSV = Path(__file__).resolve().parents[1] / "results" / "cpu_crossover.csv"


@dataclass
class Cell:
    """A line of the CSV. ratio: median of dense time / sparse time, whatever auto decides.

    noise: standard error of the ratio. environment: variables that restrict the instructions.
    crossover: density above which auto is dense; auto: "sparse" or the reason.
    """

    commit: str
    date: str
    cpu: str
    capability: str
    torch: str
    environment: str
    threads: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    density: float
    dense_ms: float
    sparse_ms: float
    ratio: float
    noise: float
    crossover: float
    auto: str

    @property
    def wrong(self) -> bool:
        """Auto is slower than dense, and not by chance."""
        return self.auto == "sparse" and self.ratio + 2 * self.noise < 1 - TOLERANCE

    @property
    def missed(self) -> bool:
        """Sparse would have been faster, and not by chance."""
        return self.auto != "sparse" and self.ratio - 2 * self.noise >= WORTH

    def key(self) -> tuple[str, ...]:
        """Same key: the newer measurement replaces the older one."""
        names = ("cpu", "capability", "environment", "threads", "tokens", "heads", "head_dim")
        return tuple(str(getattr(self, name)) for name in (*names, "dtype", "density"))


def check(
    shapes: Iterable[tuple[int, int, str]],
    grids: Mapping[int, TokenGrid],
    densities: list[float],
    heads: int,
    rounds: int,
    clock: Callable[[], float],
    facts: dict[str, str],
    console: Console,
) -> int:
    """Time and judge all cells of (tokens, head dim, dtype); exit code 1 if auto is wrong."""
    cells: list[Cell] = []
    with torch.no_grad():
        for tokens, head_dim, dtype in shapes:
            shape = (1, tokens, heads, head_dim)
            found = _cells(shape, dtype, grids[tokens], densities, rounds, clock)
            for values in found:
                cells.append(
                    Cell(**facts, threads=torch.get_num_threads(), tokens=tokens, heads=heads,
                         head_dim=head_dim, dtype=dtype, **values)
                )  # fmt: skip
            save(CSV, cells)
            console.print(f"{tokens} tokens, D {head_dim}, {dtype}", highlight=False)
    show(console, cells)
    wrong, missed = sum(c.wrong for c in cells), sum(c.missed for c in cells)
    console.print(
        f"{len(cells)} cells: auto slower than dense by more than {TOLERANCE:.0%} in {wrong}; "
        f"dense where sparse is {WORTH}x or more in {missed}",
        highlight=False,
    )
    return 1 if wrong else 0


def _config(density: float, impl: str) -> SparseConfig:
    """The default method at a constant density."""
    schedule = {"name": "constant", "density": density}
    return SparseConfig.from_dict({"schedule": schedule, "kernel": {"impl": impl}})


def _cells(
    shape: tuple[int, int, int, int],
    dtype: str,
    grid: TokenGrid,
    densities: list[float],
    rounds: int,
    clock: Callable[[], float],
) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(shape[1] + shape[3])
    q, k, v = (torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for _ in range(3))
    inner = [x.transpose(1, 2) for x in (q, k, v)]

    def seconds(act: Callable[[], object]) -> float:
        start = clock()
        act()
        return clock() - start

    def dense() -> object:
        return F.scaled_dot_product_attention(*inner)

    configs = {d: _config(d, "cpu") for d in densities}

    def sparse(density: float) -> object:
        return sparse_attention(q, k, v, grid=grid, config=configs[density])

    for density in densities:
        sparse(density)
    times: dict[float, list[float]] = {d: [] for d in densities}
    ratios: dict[float, list[float]] = {d: [] for d in densities}
    dense()
    dense_times = [seconds(dense)]
    for _ in range(rounds * max(1, FULL_ROUNDS // shape[1])):
        for d in densities:
            times[d].append(seconds(lambda d=d: sparse(d)))
            dense_times.append(seconds(dense))
            ratios[d].append(sum(dense_times[-2:]) / 2 / times[d][-1])
    found = []
    for d in densities:
        decision = decision_for(q, grid=grid, config=_config(d, "auto"))
        found.append({
            "density": d,
            "dense_ms": round(1e3 * statistics.median(dense_times), 3),
            "sparse_ms": round(1e3 * statistics.median(times[d]), 3),
            "ratio": round(statistics.median(ratios[d]), 3),
            "noise": round(cpu_crossover.standard_error(ratios[d]), 3),
            "crossover": round(decision.choice.crossover, 3),
            "auto": decision.reason or "sparse",
        })  # fmt: skip
    return found


def save(path: Path, cells: list[Cell]) -> None:
    """Add the cells to the CSV in place of older ones of the same key, all or nothing."""
    lines: dict[tuple[str, ...], dict[str, object]] = {}
    if path.is_file():
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                lines[Cell(**line).key()] = dict(line)  # type: ignore[arg-type]
    for cell in cells:
        lines[cell.key()] = asdict(cell)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Cell)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines.values())
    os.replace(part, path)


def show(console: Console, cells: list[Cell]) -> None:
    """Ratios of all cells, a line a shape; what auto runs dense is in brackets."""
    densities = sorted({cell.density for cell in cells})
    table = Table(title=f"x dense, whole call, {cells[0].cpu}; (dense by auto); !: auto is wrong")
    for name in ("N", "D", "dtype", *map(str, densities), "crossover"):
        table.add_column(name, justify="right", no_wrap=True)
    shapes = dict.fromkeys((c.tokens, c.head_dim, c.dtype) for c in cells)
    for shape in shapes:
        of_shape = [c for c in cells if (c.tokens, c.head_dim, c.dtype) == shape]
        marks = [
            f"{c.ratio:.2f}{'!' * c.wrong}" if c.auto == "sparse" else f"({c.ratio:.2f})"
            for c in of_shape
        ]
        table.add_row(*map(str, shape), *marks, f"{of_shape[0].crossover:.2f}")
    console.print(table)
