"""Compiles the Triton kernels for GPUs that are not here and looks at the machine code.

    python kernels/aot/gate.py                    sm_80, sm_90, sm_100
    python kernels/aot/gate.py --extra            beside them sm_89, sm_120 and gfx942, not counted
    python kernels/aot/gate.py --full             every dtype, head dim, block size and content
    python kernels/aot/gate.py --arch 90 --only sparse_forward

The launchers run as they would on the GPU, so every kernel is compiled as it is shipped; one row
per kernel, specialisation and architecture. Exit status 1 if a bound is broken: no spills (a few
for float32), shared memory within a block's limit or, where the tiling counts on it, within half of
a multiprocessor, tensor cores in use, K and V really pipelined (`ring`: buffers of each), warps
specialised, no kernel compiled anew for other lengths, budgets or densities. It shows neither that
results are right nor how fast they come. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import needs

needs.demand(needs.GATE)

import triton
from aot_cases import launches
from aot_inspect import Found, inspect
from aot_launches import Launch
from aot_targets import ARCHITECTURES, REQUIRED
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vidsparse.kernels.gpu.forward import interpreted

COLUMNS = ("kernel", "form", "arch", "warps", "regs", "spills", "shared KB", "tensor cores", "ring",
           "verdict")  # fmt: skip
pending: list[Launch] = []
"""What is to be compiled; processes made after it is filled find it by position."""


def main() -> int:
    options, parser = arguments()
    if interpreted():
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    named = options.arch.split(",")
    if unknown := set(named) - set(ARCHITECTURES):
        parser.error(f"--arch {', '.join(sorted(unknown))}: allowed are {', '.join(ARCHITECTURES)}")
    extra = [name for name in ARCHITECTURES if name not in named] if options.extra else []
    anew: list[Launch] = []
    for name in (*named, *extra):
        found, more = launches(ARCHITECTURES[name], options.full)
        pending.extend(one for one in found if options.only in f"{one.kernel} {one.form}")
        anew += more
    if not pending:
        parser.error(f"--only {options.only!r} names no kernel and no form")
    table = Table(*COLUMNS, title=f"triton {triton.__version__}")
    verdicts: dict[str, list[bool]] = {name: [] for name in (*named, *extra)}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("fork")) as pool:
        outcomes = pool.map(attempt, range(len(pending)))
        outcomes = track(outcomes, "compiling", len(pending), console=Console(stderr=True))
        for launch, outcome in zip(pending, outcomes, strict=True):
            name = str(launch.arch.target.arch)
            cells, good = table_row(launch, outcome, launch in anew, name in named)
            table.add_row(*cells)
            verdicts[name].append(good)
    table.caption = ", ".join(
        f"{ARCHITECTURES[name].name} {sum(good)} of {len(good)} ok"
        for name, good in verdicts.items()
    )
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return int(not all(all(verdicts[name]) for name in named))


def arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=",".join(REQUIRED), help=f"of {','.join(ARCHITECTURES)}")
    parser.add_argument(
        "--extra", action="store_true", help="all others too, without a say in the exit status"
    )
    parser.add_argument(
        "--only", default="", help="a piece of a row's kernel and form, such as 'sparse_forward bf'"
    )
    parser.add_argument("--full", action="store_true", help="the rarer combinations too")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    return parser.parse_args(), parser


def attempt(position: int) -> Found | str:
    """What a launch gives, or why it does not compile."""
    try:
        return inspect(pending[position])
    except Exception as error:
        return f"does not compile: {type(error).__name__} {str(error).strip()[-100:]}"


def table_row(
    launch: Launch, found: Found | str, anew: bool, counted: bool
) -> tuple[tuple[str, ...], bool]:
    """A row of the table, and whether every bound is kept."""
    head = launch.kernel, launch.form, launch.arch.name, str(launch.options["num_warps"])
    mark = "" if counted else "extra: "
    if isinstance(found, str):
        return (*head, *("",) * 5, mark + found), False
    broken = [*found.breaches(launch), *["compiled anew"] * anew]
    registers = f"{found.registers}" + f"+{found.scalars}" * bool(found.scalars)
    products = f"{found.tensor_core}" + f"+{found.integer_core}" * launch.multiplies_int8
    ring = "/".join(map(str, found.ring)) + " ws" * found.specialised
    numbers = registers, str(found.spills), f"{found.shared / 1024:.1f}", products, ring
    return (*head, *numbers, mark + ("; ".join(broken) or "ok")), not broken


if __name__ == "__main__":
    sys.exit(main())
