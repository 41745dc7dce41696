"""The CPU engine beside torch's compiled FlexAttention, which is given the same blocks.

    python kernels/bench/cpu_flex.py        needs a C++ compiler, which FlexAttention's code is for

Dense, FlexAttention, the engine's kernel and the whole sparse call run in turn in one process, on
one thread; a speed-up is the ratio of medians. FlexAttention is handed the listed blocks of the
engine's plan as a finished mask and leaves out the rest, for which it would need a table; so its
time is that of less: without estimate, selection and centroids. The error of both is that of the
execution of their own plan, against the reference in float64.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import needs

needs.demand(needs.BENCH)

import torch
import torch.nn.functional as F
from cpu import DTYPES, GRIDS, MAX_ERROR, method
from cpu_rows import CSV, machine
from rich.console import Console
from rich.table import Table
from sampled import sampled_error
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vidsparse import sparse_attention
from vidsparse.geometry import token_order
from vidsparse.kernels.cpu.executor import EXECUTOR
from vidsparse.plan import SKIP, BlockPlan

TOKENS, HEADS, DENSITY = 8192, 2, 0.2
BLOCKS = ("128/64", "128/128")
OUT = CSV.with_name("cpu_flex.csv")


def mask_of(plan: BlockPlan) -> BlockMask:
    """The listed blocks of a plan, all of them whole and equally many in every row."""
    listed = plan.levels == 0
    count = listed.sum(-1, dtype=torch.int32)
    order = listed.int().argsort(dim=-1, descending=True, stable=True).int()
    nothing = torch.zeros_like(count), torch.zeros_like(order)
    sizes = plan.q_blocks.size, plan.k_blocks.size
    return BlockMask.from_kv_blocks(*nothing, count, order, BLOCK_SIZE=sizes)


def measure(head_dim: int, dtype: str, blocks: str, rounds: int) -> dict[str, Any]:
    """Milliseconds and errors of one case."""
    generator = torch.Generator().manual_seed(head_dim)
    shape = (1, TOKENS, HEADS, head_dim)
    qkv = [torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(3)]
    config, grid = method(DENSITY, blocks, "auto"), GRIDS[TOKENS]
    order, _ = token_order(grid, config.layout)
    q, k, v = (x[:, order].transpose(1, 2).contiguous() for x in qkv)
    _, plan = sparse_attention(*qkv, grid=grid, config=config, return_plan=True)
    alone, flex = replace(plan, rest=SKIP), torch.compile(flex_attention, dynamic=False)
    mask = mask_of(plan)
    acts = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v),
        "flex": lambda: flex(q, k, v, block_mask=mask),
        "kernel": lambda: EXECUTOR.execute(q, k, v, plan, kernel=config.kernel)[0],
        "whole": lambda: sparse_attention(*qkv, grid=grid, config=config),
    }
    start = time.perf_counter()
    outs: dict[str, Tensor] = {"flex": acts["flex"]()}
    compile_s = time.perf_counter() - start
    outs["kernel"] = acts["kernel"]()
    wide = [x.double() for x in (q, k, v)]
    errors = {
        name: sampled_error(*wide, outs[name].double(), one)
        for name, one in (("flex", alone), ("kernel", plan))
    }
    times: dict[str, list[float]] = {name: [] for name in acts}
    for turn in range(rounds + 1):
        for name, act in acts.items():
            start = time.process_time()
            act()
            if turn > 0:  # the first warms up
                times[name].append(1e3 * (time.process_time() - start))
    ms = {name: statistics.median(found) for name, found in times.items()}
    return {
        "head_dim": head_dim, "dtype": dtype, "blocks": blocks, "density": DENSITY,
        **{f"{name}_ms": round(x, 2) for name, x in ms.items()},
        **{f"{name}_x": round(ms["dense"] / ms[name], 2) for name in ("flex", "kernel", "whole")},
        "flex_error": f"{errors['flex']:.2e}", "kernel_error": f"{errors['kernel']:.2e}",
        "compile_s": round(compile_s, 1),
    }  # fmt: skip


def main() -> int:
    """Exit status 1 if an error is too large for its figures to count."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"],
                        default=["float32", "bfloat16"])  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path, default=OUT)
    options = parser.parse_args()
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        print("FlexAttention on a CPU needs a C++ compiler: install g++", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    facts, rows, good = machine(), [], True
    table = Table(title=f"{facts['cpu']}, {TOKENS:,} tokens, density {DENSITY}; x dense, 1 thread")
    for name in ("D", "dtype", "blocks", "dense ms", "flex kernel", "our kernel", "our whole call"):
        table.add_column(name, justify="right")
    with torch.no_grad():
        for case in product(options.head_dim, options.dtype, BLOCKS):
            found = measure(*case, options.rounds)
            fine = max(float(found[f"{n}_error"]) for n in ("flex", "kernel")) <= MAX_ERROR[case[1]]
            good &= fine
            rows.append({**facts, "tokens": TOKENS, "heads": HEADS, **found})
            speeds = (f"{found[f'{name}_x']}x" for name in ("flex", "kernel", "whole"))
            shown = speeds if fine else ["error!"] * 3
            table.add_row(*map(str, case), str(found["dense_ms"]), *shown)
    part = options.csv.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, options.csv)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
