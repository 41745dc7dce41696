"""Compiles the Triton kernels for GPUs that are not here and looks at the machine code.

    python kernels/aot/gate.py                    sm_80, sm_90, sm_100
    python kernels/aot/gate.py --extra            sm_86, sm_89, sm_120 and gfx942 too, not counted
    python kernels/aot/gate.py --save             and write them to kernels/results/gate.csv
    python kernels/aot/gate.py --full             every dtype, head dim, block size and content
    python kernels/aot/gate.py --arch 90 --only exact_tiles
    PYTHONPATH=.venv/triton-3.6.0 python kernels/aot/gate.py     another Triton: `make gates`

The launchers run as they would on the GPU, so every kernel is compiled as it is shipped; one row
per kernel, specialisation and architecture. Exit status 1 if a bound is broken: no spills (a few
for float32), shared memory within a block's limit or, where the tiling counts on it, within half of
a multiprocessor, tensor cores in use, K and V really pipelined (`ring`: buffers of each), no
products that wait for one another, no kernel compiled anew for other lengths,
budgets or densities. `loop`: instructions of one turn of the longest loops with tensor cores in
them, `programs`: that fit a multiprocessor, both with the number of the last saved table where it
was another, so a slower loop is seen. Rows are of one version of Triton: each has its own saved
ones, and some are in one version alone. It shows neither that results are right nor how fast they
come. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import csv
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

from vidsparse.kernels.gpu.exact_pointer import interpreted

COLUMNS = ("kernel", "form", "arch", "warps", "regs", "spills", "shared KB", "tensor cores", "ring",
           "loop", "programs", "verdict")  # fmt: skip
KEPT = Path(__file__).resolve().parents[1] / "results" / "gate.csv"
FIELDS = ("triton", "kernel", "form", "arch", "warps", "registers", "spills", "shared", "loop",
          "programs", "verdict")  # fmt: skip
EXTRA = "extra: "
pending: list[Launch] = []
"""What is to be compiled; processes made after it is filled find it by position."""


def main() -> int:
    options, parser = arguments()
    if options.only and options.save:
        parser.error("--save: writes whole architectures; leave out --only")
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
    former, rows = kept(), []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("fork")) as pool:
        outcomes = pool.map(attempt, range(len(pending)))
        outcomes = track(outcomes, "compiling", len(pending), console=Console(stderr=True))
        for launch, outcome in zip(pending, outcomes, strict=True):
            name = str(launch.arch.target.arch)
            cells, good = table_row(launch, outcome, launch in anew, name in named, former)
            table.add_row(*cells)
            if isinstance(outcome, Found):
                rows.append(numbers(launch, outcome) | {"verdict": cells[-1].removeprefix(EXTRA)})
            verdicts[name].append(good)
    table.caption = ", ".join(
        f"{ARCHITECTURES[name].name} {sum(good)} of {len(good)} ok"
        for name, good in verdicts.items()
    )
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    if options.save:
        save(rows, {ARCHITECTURES[name].name for name in verdicts})
    return int(not all(all(verdicts[name]) for name in named))


def arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=",".join(REQUIRED), help=f"of {','.join(ARCHITECTURES)}")
    parser.add_argument(
        "--extra", action="store_true", help="all others too, without a say in the exit status"
    )
    parser.add_argument(
        "--only", default="", help="a piece of a row's kernel and form, such as 'exact_tiles bf'"
    )
    parser.add_argument("--full", action="store_true", help="the rarer combinations too")
    parser.add_argument("--save", action="store_true", help=f"write the numbers to {KEPT.name}")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    return parser.parse_args(), parser


def attempt(position: int) -> Found | str:
    """What a launch gives, or why it does not compile."""
    try:
        return inspect(pending[position])
    except Exception as error:
        return f"does not compile: {type(error).__name__} {str(error).strip()[-100:]}"


def numbers(launch: Launch, found: Found) -> dict[str, str]:
    """A row of the saved table, without its verdict."""
    loop = "/".join(str(one.instructions) for one in found.loops)
    values = (
        *(triton.__version__, launch.kernel, launch.form, launch.arch.name, found.threads // 32),
        *(found.registers, found.spills, found.shared, loop, found.programs(launch)),
    )
    return dict(zip(FIELDS[:-1], map(str, values), strict=True))


def kept() -> dict[tuple[str, ...], dict[str, str]]:
    """The saved rows of this version of Triton, by kernel, form and architecture."""
    if not KEPT.exists():
        return {}
    with KEPT.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["triton"] == triton.__version__]
    return {(row["kernel"], row["form"], row["arch"]): row for row in rows}


def save(rows: list[dict[str, str]], named: set[str]) -> None:
    """Replace the rows of this version of Triton for the architectures named, keep all others."""
    others: list[dict[str, str]] = []
    if KEPT.exists():
        with KEPT.open(newline="") as file:
            others = [
                row
                for row in csv.DictReader(file)
                if row["triton"] != triton.__version__ or row["arch"] not in named
            ]
    part = KEPT.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(others + rows, key=lambda row: [row[f] for f in FIELDS[:4]]))
    part.replace(KEPT)


def beside(now: str, former: str | None) -> str:
    """A number with the saved one beside it, if that was another."""
    return now if former in (None, now) else f"{now} (was {former})"


def table_row(
    launch: Launch,
    found: Found | str,
    anew: bool,
    counted: bool,
    former: dict[tuple[str, ...], dict[str, str]] | None = None,
) -> tuple[tuple[str, ...], bool]:
    """A row of the table, and whether every bound is kept. former: what `kept` gave."""
    head = launch.kernel, launch.form, launch.arch.name, str(launch.options["num_warps"])
    mark = "" if counted else EXTRA
    if isinstance(found, str):
        return (*head, *("",) * 7, mark + found), False
    broken = [*found.breaches(launch), *["compiled anew"] * anew]
    registers = f"{found.registers}" + f"+{found.scalars}" * bool(found.scalars)
    products = f"{found.tensor_core}" + f"+{found.integer_core}" * launch.multiplies_int8
    ring = "/".join(map(str, found.ring))
    was = (former or {}).get((launch.kernel, launch.form, launch.arch.name), {})
    new = numbers(launch, found)
    speed = (beside(new[name], was.get(name)) for name in ("loop", "programs"))
    cells = registers, str(found.spills), f"{found.shared / 1024:.1f}", products, ring, *speed
    return (*head, *cells, mark + ("; ".join(broken) or "ok")), not broken


if __name__ == "__main__":
    sys.exit(main())
