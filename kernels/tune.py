"""Which tiling of the sparse forward is fastest on this GPU, per head dim and dtype.

    python kernels/tune.py                          bfloat16, D 64 and 128
    python kernels/tune.py --dtype float32 --head-dim 128
    python kernels/tune.py --dry-run                the script itself, on a CPU in the interpreter

Tries the tilings that compile without spills and fit (no search: nothing is tuned at first use), at
32,760 tokens, at density 0.2 and 1 ("plain": exact blocks alone) and at 0.2 with centroids and the
share for the first-order term ("rest": what the presets run). Prints a table and the lines for the
tilings of `vidsparse/kernels/triton_forward*.py`; rows go to kernels/results/gpu_tune.csv.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

Numbers = tuple[int, int, int, int, int | None]

if TYPE_CHECKING:
    import torch
    from gpu_cases import Operands, Shape
    from gpu_results import Machine, Result

    from vidsparse.kernels.triton_operands import Tiling

HALF: dict[int, dict[str, tuple[Numbers, ...]]] = {
    128: {
        "pointer": ((128, 64, 8, 3, None), (128, 64, 8, 2, None), (64, 64, 4, 3, None)),
        "tma": (
            (128, 64, 8, 2, 128),
            (128, 64, 8, 3, None),
            (128, 128, 8, 2, None),
            (128, 32, 8, 3, None),
            (64, 64, 4, 2, None),
            (64, 64, 4, 1, None),
        ),
        "ws": ((128, 64, 4, 3, None), (128, 64, 4, 2, None), (128, 64, 4, 4, None)),
    },
    64: {
        "pointer": ((128, 64, 8, 3, None), (128, 128, 8, 2, None), (64, 64, 4, 3, None)),
        "tma": ((128, 64, 8, 3, None), (128, 128, 8, 2, None), (64, 64, 4, 3, None)),
        "ws": ((128, 64, 4, 3, None), (128, 64, 4, 2, None), (128, 64, 4, 4, None)),
    },
}
"""Head dim -> form -> block_m, block_n, warps, stages, registers, for bfloat16 and float16.

"ws" of 128 keys does not compile: the bias of a key is in the way of its passes.
"""

FLOAT32 = ((32, 32, 8, 1, None), (32, 32, 4, 1, None), (64, 32, 8, 1, None))
MOST_BLOCKS = 64
"""Key blocks that may share a tile, one bit each."""

CONTENTS = (("plain", 0.2), ("plain", 1.0), ("rest", 0.2))


def candidates(depth: int, dtype: torch.dtype, forms: tuple[str, ...]) -> list[tuple[str, Tiling]]:
    """Form and tiling of everything that is tried. depth: head dim."""
    from vidsparse.kernels.triton_operands import Tiling

    if dtype.itemsize == 4:
        return [("pointer", Tiling(*numbers)) for numbers in FLOAT32]
    table = HALF[64 if depth <= 64 else 128]
    return [(form, Tiling(*numbers)) for form in forms for numbers in table[form]]


def label(shape: Tiling) -> str:
    """Such as "128x64 w8 s2 r128"."""
    limit = f" r{shape.registers}" if shape.registers else ""
    return f"{shape.block_m}x{shape.block_n} w{shape.warps} s{shape.stages}{limit}"


def try_all(
    machine: Machine, shape: Shape, dtype: torch.dtype, content: str, density: float, coherent: bool
) -> tuple[dict[tuple[str, Tiling], tuple[Operands, float]], dict[tuple[str, Tiling], str]]:
    """Operands of every candidate with the error of its output, and why others did not run.

    Blocks are as wide as a tile of keys, 64 at least, so that density means the same for all.
    """
    from gpu_cases import exact_plan, prepare, random_qkv, sampled_error
    from gpu_results import in_words, release

    qkv = random_qkv(shape, machine.device, dtype)
    ready: dict[Any, Any] = {}
    failed: dict[Any, str] = {}
    for form, tiling in candidates(shape.head_dim, dtype, machine.forms):
        if content == "rest" and tiling.block_n > MOST_BLOCKS:
            failed[form, tiling] = "a list has no bits for so many centroids in a tile"
            continue
        sizes = 128, max(64, tiling.block_n)
        plan = exact_plan(shape, density, sizes, machine.device, coherent)
        if content == "rest":
            plan = plan.with_rest(plan.k_blocks.levels, "global")
        try:
            operands = prepare(*qkv, plan, form, tiling)
            part = plan.with_rest(plan.rest)  # the term of first order is added by another kernel
            error = sampled_error(*qkv, operands.forward(), part, blocks=2)
        except Exception as caught:
            failed[form, tiling] = in_words(caught)
            release(machine.device)
        else:
            ready[form, tiling] = operands, error
    return ready, failed


def tune(machine: Machine, shape: Shape, dtype: torch.dtype) -> Iterator[Result]:
    """Rows of all candidates; `density` is that of the exact blocks."""
    from gpu_bench import Bench
    from gpu_cases import exact_plan, random_qkv, work
    from gpu_results import interleaved

    for content, density in CONTENTS[::2] if machine.dry else CONTENTS:
        ready, failed = try_all(machine, shape, dtype, content, density, coherent=False)
        acts: dict[Any, Callable[[], Any]] = {key: pair[0].forward for key, pair in ready.items()}
        times = interleaved(acts, machine, 1.0)
        this = Bench(machine, shape, random_qkv(shape, machine.device, dtype))
        plan = exact_plan(shape, density, (128, 64), machine.device, coherent=False)
        tflop = work(plan, shape.head_dim)
        for (form, tiling), (_, error) in ready.items():
            stage = f"{content} {label(tiling)}"
            yield this.row(density, form, stage, times[form, tiling], tflop, None, error)
        for (form, tiling), why in failed.items():
            print(f"{content} {form} {label(tiling)}: {why}")


def verdict(rows: list[Result], limit: float) -> list[str]:
    """Lines to paste: per head dim, dtype and content the fastest tiling of every form."""
    lines = []
    best: dict[tuple[Any, ...], Result] = {}
    for row in rows:
        content, tiling = row.stage.split(" ", 1)
        key = row.head_dim, row.dtype, content, row.density, row.impl
        right = row.rel_l2 is not None and row.rel_l2 <= limit
        if right and (key not in best or row.ms_p50 < best[key].ms_p50):
            best[key] = replace(row, stage=tiling)
    for (depth, dtype, content, density, form), row in best.items():
        sizes, *others = row.stage.split(" ")
        numbers = [*sizes.split("x"), *(text[1:] for text in others)]
        lines.append(
            f"Tiling({', '.join(numbers)})  # {form}, {dtype}, D {depth}, {content} at density "
            f"{density}: {row.tflops} TFLOP/s, {row.ms_p50} ms"
        )
    return lines


def main() -> int:
    """Run the search; exit code 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--head-dim", type=int, nargs="+", choices=(64, 128), default=[64, 128])
    parser.add_argument("--forms", nargs="+", default=["pointer", "tma", "ws"])
    parser.add_argument("--out", type=Path, help="folder of gpu_tune.csv")
    parser.add_argument("--dry-run", action="store_true", help="tiny, in Triton's CPU interpreter")
    options = parser.parse_args()
    from gpu_start import machine_for

    machine = machine_for(options.dry_run, options.out, 1e9, tuple(options.forms), parser.error)
    import torch
    from gpu_cases import SHAPES, TINY
    from gpu_compare import LIMITS
    from gpu_results import Job, console, run_jobs

    dtype = getattr(torch, options.dtype)
    if options.dry_run:
        shapes = [TINY]
    else:
        wan = SHAPES["wan2.1-1.3b-480p"]
        names = {128: wan, 64: replace(wan, name="wan2.1-1.3b-480p, D 64", head_dim=64)}
        shapes = [names[depth] for depth in options.head_dim]
    jobs = [
        Job(f"tune: {s.name}, {options.dtype}", 0.0, partial(tune, machine, s, dtype), "gpu_tune")
        for s in shapes
    ]
    out = console()
    start = time.monotonic()
    outcome = run_jobs(jobs, machine, out)
    for row in outcome.rows:
        out.print(f"{row.impl:8} D {row.head_dim:<4} {row.density:<4} {row.stage:28} "
                  f"{row.ms_p50:9.3f} ms {row.tflops:7.1f} TFLOP/s  error {row.rel_l2:.1e}",
                  highlight=False)  # fmt: skip
    out.print("\nfastest of every form:")
    for line in verdict(outcome.rows, LIMITS[dtype]):
        out.print(line, highlight=False)
    out.print(f"{time.monotonic() - start:.0f} s")
    wrong = [row for row in outcome.rows if not (row.rel_l2 or 0.0) <= LIMITS[dtype]]
    return int(bool(wrong or outcome.failed))


if __name__ == "__main__":
    sys.exit(main())
