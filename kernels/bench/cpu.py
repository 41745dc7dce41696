"""Speed of sparse attention on this CPU against scaled_dot_product_attention, its error beside it.

    python kernels/bench/cpu.py                  8,192 tokens at density 0.2: about two minutes
    python kernels/bench/cpu.py --full           the whole table
    python kernels/bench/cpu.py --threads 2      wall time on two threads
    python kernels/bench/cpu.py --route sdpa     another route than the one that auto takes
    python kernels/bench/cpu.py --crossover      does auto go dense where dense is faster?

They run in turn in one process: dense, sparse, dense, ...; a speed-up is the median over rounds of
(mean of the dense times before and after) / (sparse time), in CPU time for one thread, in wall time
for more. "whole" is `vidsparse.sparse_attention`: permutation, estimate, selection, gather,
centroids, attention and the way back; "kernel" is the execution of the finished plan. The error is
that of the execution, against the reference in float64 on the same plan and inputs, on a sample of
query blocks. No speed is shown if it is too large. Beside each size of blocks stands what it costs:
the error of the method itself on the demo model's q, k and v (`block_quality.py`), times that of
64/64. ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY and MKL_ENABLE_INSTRUCTIONS imitate lesser
processors; such rows name them, and have no target.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import needs

needs.demand(needs.BENCH)

import cpu_decisions
import torch
import torch.nn.functional as F
from cpu_rows import CSV, Result, machine, quality, save, targets
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sampled import sampled_error
from torch import Tensor

from vidsparse import SparseConfig, TokenGrid, sparse_attention
from vidsparse.config import CPU_ROUTES
from vidsparse.geometry import token_order
from vidsparse.kernels.cpu import contest
from vidsparse.kernels.cpu.executor import EXECUTOR
from vidsparse.plan import BlockPlan

GRIDS = {
    1024: TokenGrid(4, 16, 16),
    2048: TokenGrid(8, 16, 16),
    4096: TokenGrid(16, 16, 16),
    8192: TokenGrid(8, 32, 32),
    16384: TokenGrid(16, 32, 32),
}
CROSSOVER_TOKENS = (1024, 2048, 4096, 8192)
CROSSOVER_DENSITIES = (0.1, 0.2, 0.3, 0.5, 0.7)
DENSITIES = (0.1, 0.2, 0.3, 0.5)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_ERROR = {"float32": 1e-5, "bfloat16": 3e-3, "float16": 1e-3}
BLOCKS = ("64/64", "128/64", "256/64", "128/128")
STAGES = ("whole", "kernel")
TARGET_AT = (8192, 0.2, "128/64")
SAMPLED_BLOCKS = 3


@dataclass(frozen=True)
class Case:
    """One shape and dtype."""

    tokens: int
    heads: int
    head_dim: int
    dtype: str


def method(density: float, blocks: str, route: str) -> SparseConfig:
    """Top-k and centroids at a constant density, for every size."""
    schedule = {"name": "constant", "density": density, "min_tokens": 0}
    block_q, block_k = map(int, blocks.split("/"))
    kernel = {"impl": "cpu", "block_q": block_q, "block_k": block_k, "cpu_route": route}
    return SparseConfig.from_dict({"schedule": schedule, "kernel": kernel})


def execution_error(qkv: list[Tensor], out: Tensor, plan: BlockPlan, config: SparseConfig) -> float:
    """Relative L2 error on sampled query blocks. qkv, out: [1, S, H, D] in raster order."""
    grid = GRIDS[out.shape[1]]
    order, _ = token_order(grid, config.layout)
    q, k, v, o = (x[:, order].transpose(1, 2).double() for x in (*qkv, out))
    return sampled_error(q, k, v, o, plan, SAMPLED_BLOCKS)


def run_case(
    case: Case,
    densities: list[float],
    sizes: list[str],
    route: str,
    rounds: int,
    clock: Callable[[], float],
) -> Iterator:
    """Times of one case: yields (density, blocks, impl, stage, times, ratios, error)."""
    grid, dtype = GRIDS[case.tokens], DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(case.tokens + case.head_dim)
    shape = (1, case.tokens, case.heads, case.head_dim)
    qkv = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    inner = [x.transpose(1, 2) for x in qkv]

    def seconds(act: Callable[[], object]) -> float:
        start = clock()
        act()
        return clock() - start

    dense = lambda: F.scaled_dot_product_attention(*inner)  # noqa: E731
    points = list(product(densities, sizes))
    acts: dict[tuple[float, str, str], Callable[[], object]] = {}
    errors = {}
    for point in points:
        config = method(*point, route)
        out, plan = sparse_attention(*qkv, grid=grid, config=config, return_plan=True)
        errors[point] = execution_error(qkv, out, plan, config)
        acts[*point, "whole"] = lambda c=config: sparse_attention(*qkv, grid=grid, config=c)
        acts[*point, "kernel"] = lambda p=plan, c=config: EXECUTOR.execute(
            *inner, p, kernel=c.kernel
        )
    for act in (dense, *acts.values()):
        act()
    times: dict[tuple[float, str, str], list[float]] = {key: [] for key in acts}
    ratios: dict[tuple[float, str, str], list[float]] = {key: [] for key in acts}
    dense_times = []
    for _ in range(rounds):
        before = seconds(dense)
        for point in points:
            keys = [(*point, stage) for stage in STAGES]
            for key in keys:
                times[key].append(seconds(acts[key]))
            after = seconds(dense)
            for key in keys:
                ratios[key].append((before + after) / 2 / times[key][-1])
            dense_times.append(after)
            before = after
    yield 1.0, "", "sdpa", "whole", dense_times, [1.0], 0.0
    for (density, blocks, stage), values in times.items():
        figures = values, ratios[density, blocks, stage], errors[density, blocks]
        yield density, blocks, "cpu", stage, *figures


def show(console: Console, results: list[Result], threads: int) -> bool:
    """Print the table; True if all errors are small and all targets at hand are met."""
    kind = "CPU time, 1 thread" if threads == 1 else f"wall time, {threads} threads"
    table = Table(title=f"sparse attention, {results[0].cpu}, {kind}; x = times dense")
    names = (
        "N",
        "D",
        "dtype",
        "d",
        "blocks",
        "method",
        "dense ms",
        "ms",
        "whole",
        "kernel",
        "rel L2",
    )
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    by_key = {(r.tokens, r.head_dim, r.dtype, r.density, r.blocks, r.stage): r for r in results}
    good, costs, wanted = True, quality(), targets()
    notes = []
    for r in results:
        if r.impl == "sdpa" or r.stage != "whole":
            continue
        case = (r.tokens, r.head_dim, r.dtype)
        dense = by_key[(*case, 1.0, "", "whole")]
        kernel = by_key[(*case, r.density, r.blocks, "kernel")]
        fine = r.rel_l2 <= MAX_ERROR[r.dtype]
        speeds = [f"{x.speedup_vs_dense:.2f}x" if fine else "error!" for x in (r, kernel)]
        table.add_row(
            str(r.tokens), str(r.head_dim), r.dtype, str(r.density), r.blocks,
            costs.get(r.blocks, "?"), f"{dense.ms_p50:.1f}",
            f"{r.ms_p50:.1f}" if fine else "error!", *speeds, f"{r.rel_l2:.1e}",
        )  # fmt: skip
        good &= fine
        target = wanted.get((r.dtype, r.head_dim)) if threads == 1 else None
        if (r.tokens, r.density, r.blocks) == TARGET_AT and fine and target:
            met = r.speedup_vs_dense >= target
            good &= met
            notes.append(
                f"target {'met' if met else 'MISSED'}: {r.dtype} D={r.head_dim} "
                f"{r.speedup_vs_dense:.2f}x of {target}x, "
                f"error {r.rel_l2:.1e} of {MAX_ERROR[r.dtype]:.0e}"
            )
    console.print(table)
    for note in notes or ["no target for this processor and these settings"]:
        console.print(note)
    return good


def main() -> int:
    """Run the bench; exit code 1 if an error is too large or a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="8,192 tokens, density 0.2 (the default)"
    )
    size.add_argument("--full", action="store_true", help="1k .. 16k tokens, density 0.1 .. 0.5")
    parser.add_argument("--tokens", type=int, nargs="+", choices=list(GRIDS))
    parser.add_argument("--density", type=float, nargs="+")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--route", choices=CPU_ROUTES, default="auto")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--crossover", action="store_true", help="check what auto decides")
    options = parser.parse_args()
    tokens = options.tokens or (list(GRIDS) if options.full else [TARGET_AT[0]])
    densities = options.density or (list(DENSITIES) if options.full else [TARGET_AT[1]])
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    width = None if sys.stdout.isatty() else 120
    facts, console, results = machine(), Console(width=width), []
    if options.crossover:
        shapes = list(product(options.tokens or CROSSOVER_TOKENS, options.head_dim, options.dtype))
        grids = {n: GRIDS[n] for n, _, _ in shapes}
        densities = options.density or list(CROSSOVER_DENSITIES)
        return cpu_decisions.check(
            shapes, grids, densities, options.heads, options.rounds, clock, facts, console
        )
    cases = [
        Case(n, options.heads, depth, dtype)
        for n, depth, dtype in product(tokens, options.head_dim, options.dtype)
    ]
    for dtype, depth in product(options.dtype, options.head_dim):
        said = contest.described(DTYPES[dtype], depth, given=options.route)
        console.print(f"{dtype}, D {depth}: {said}", highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress, torch.no_grad():
        task = progress.add_task("", total=len(cases))
        for case in cases:
            about = f"{case.tokens} tokens, D {case.head_dim}, {case.dtype}"
            progress.update(task, description=about)
            found = run_case(case, densities, options.blocks, options.route, options.rounds, clock)
            for density, blocks, impl, stage, times, ratios, error in found:
                low, mid, high = (round(1e3 * t, 3) for t in spread(times))
                shape = f"1x{case.tokens}x{case.heads}x{case.head_dim}"
                speedup = round(statistics.median(ratios), 3)
                results.append(
                    Result(
                        facts["commit"], facts["date"], facts["cpu"], options.threads,
                        facts["torch"], shape, *astuple(case), density, impl, stage,
                        low, mid, high, speedup, float(f"{error:.2e}"), facts["capability"],
                        facts["environment"], blocks, route_of(case, options.route, impl),
                    )
                )  # fmt: skip
            save(options.csv, results)
            progress.advance(task)
    return 0 if show(console, results, options.threads) else 1


def route_of(case: Case, given: str, impl: str) -> str:
    """The name of the route that a row was computed on; "" for a dense one."""
    if impl == "sdpa":
        return ""
    return contest.choose(DTYPES[case.dtype], case.head_dim, given=given).name


def spread(times: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    low, mid, high = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return float(low), float(mid), float(high)


if __name__ == "__main__":
    sys.exit(main())
