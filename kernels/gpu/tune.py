"""Which tiling of the sparse forward is fastest on this GPU, per head dim and dtype.

    python kernels/gpu/tune.py                          bfloat16, D 64 and 128
    python kernels/gpu/tune.py --dtype float32 --head-dim 128
    python kernels/gpu/tune.py --dry-run              the script itself, on a CPU in the interpreter

Tries the tilings of `gpu_tilings` (no search: nothing is tuned at first use), at 32,760 tokens, at
density 0.2 and 1 ("plain": exact blocks alone) and at 0.2 with centroids and the share for the
first-order term ("rest": what the presets run). Prints a table and the lines for the tilings of
`vidsparse/kernels/gpu/forward*.py`; rows go to kernels/results/gpu_tune.csv. A tiling that does
not compile, crashes or hangs is a line with the reason, and the next one runs; what is done already
is not done again. Exit status 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import needs
from gpu_drive import add_options, serve, watch
from gpu_report import listed, table
from gpu_rows import Result, fault, load
from gpu_start import folder_for

if TYPE_CHECKING:
    from gpu_results import Machine
    from gpu_units import Unit

PATTERNS = (("random", "plain", 0.2), ("random", "plain", 1.0), ("random", "rest", 0.2))


def main() -> int:
    """Run the search; exit code 1 if a result was wrong."""
    options, parser = arguments()
    needs.demand(needs.METHODS)
    if options.worker:
        return serve(options, parser, partial(sources, options))
    depths = map(str, options.head_dim)
    seen = watch(Path(__file__), options, "--dtype", options.dtype, "--head-dim", *depths)
    rows = [row for row in load(folder_for(options.dry_run, options.out) / "gpu_tune.csv", Result)
            if row.source == seen.facts.get("source")]  # fmt: skip
    right = [row for row in rows if not fault(row)]
    if right:
        names = ("impl", "head_dim", "dtype", "density", "stage", "ms_p50", "tflops", "rel_l2")
        lines = [{name: getattr(row, name) for name in names} for row in right]
        print("", *table(lines), "", "fastest of every form:", *verdict(right), sep="\n")
    bad = [f"{unit}: {why}" for unit, (done, why) in seen.outcomes.items() if done != "done"]
    for line in (*listed("Wrong, failed or lost", bad), *listed("Trouble", seen.trouble),
                 *listed("Not run for lack of time", seen.late)):  # fmt: skip
        print(line)
    wrong = [one for one in seen.outcomes.values() if one[0] == "wrong"]
    return int(bool(wrong or seen.trouble or not right))


def arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--head-dim", type=int, nargs="+", choices=(64, 128), default=[64, 128])
    add_options(parser, 540.0)
    return parser.parse_args(), parser


def sources(
    options: argparse.Namespace, machine: Machine
) -> Iterator[tuple[str, Callable[[], list[Unit]]]]:
    """One: all candidates."""
    yield "tune", partial(units, options, machine)


def units(options: argparse.Namespace, machine: Machine) -> list[Unit]:
    """Every candidate for every pattern."""
    import torch
    from gpu_cases import SHAPES, TINY
    from gpu_tilings import tiling_units

    dtype = getattr(torch, options.dtype)
    wan = SHAPES["wan2.1-1.3b-480p"]
    names = {128: wan, 64: replace(wan, name="wan2.1-1.3b-480p, D 64", head_dim=64)}
    shapes = [TINY] if machine.dry else [names[depth] for depth in options.head_dim]
    patterns = PATTERNS[::2] if machine.dry else PATTERNS
    return [
        unit
        for shape in shapes
        for pattern in patterns
        for unit in tiling_units(machine, shape, dtype, pattern, "tune", 5)
    ]


def verdict(rows: list[Result]) -> list[str]:
    """Lines to paste: per head dim, dtype and content the fastest tiling of every form."""
    lines = []
    best: dict[tuple[Any, ...], Result] = {}
    for row in rows:
        content, tiling = row.stage.removesuffix(", random").split(" ", 1)
        key = row.head_dim, row.dtype, content, row.density, row.impl
        if row.ms_p50 is not None and (key not in best or row.ms_p50 < (best[key].ms_p50 or 0)):
            best[key] = replace(row, stage=tiling)
    for (depth, dtype, content, density, form), row in best.items():
        sizes, *others = row.stage.split(" ")
        numbers = [*sizes.split("x"), *(text[1:] for text in others)]
        lines.append(
            f"Tiling({', '.join(numbers)})  # {form}, {dtype}, D {depth}, {content} at density "
            f"{density}: {row.tflops} TFLOP/s, {row.ms_p50} ms"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
