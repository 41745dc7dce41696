"""Everything that needs a GPU, the most valuable first: is it correct, how fast, and why.

    python kernels/gpu/suite.py                       all parts
    python kernels/gpu/suite.py --only first table    some of them
    python kernels/gpu/suite.py --budget-s 500        in so many seconds; run it again to go on
    python kernels/gpu/suite.py --resume FOLDER       go on from the CSVs of another call
    python kernels/gpu/suite.py --jobs 8              checks in eight processes, then the rest
    python kernels/gpu/suite.py --plan                the parts, their units and seconds
    python kernels/gpu/suite.py --needs               the packages, and how to bring them
    python kernels/gpu/suite.py --summary             what is known so far, from the CSVs
    python kernels/gpu/suite.py --plot                the pictures again, from the CSVs
    python kernels/gpu/suite.py --dry-run             all parts, tiny, on a CPU in the interpreter

    first     every exact engine in a process of its own: does it run here, is it right
    table     Wan 2.1 14B at densities 0.1, 0.2 and 1.0: every engine, dense, FlexAttention
    check     kernels, plans, CUDA graphs and offsets past 2^31 against float64
    select    draft scores, selection and whole calls
    presets   whole calls of every preset as it is, fresh and with what earlier calls left
    forms     every engine on random and coherent lists
    shapes    other models, other densities, the stages of a call
    model     one forward of both transformers with random weights, and the first call
    sanitize  compute-sanitizer (memcheck, racecheck, initcheck) over the first checks
    tune      the tilings of the Triton kernels

Parts run in this order. Every comparison and every timing is a unit of its own: what raises,
crashes, hangs or takes all memory is a line with its reason, and the next unit runs. A row is saved
the moment it is there (kernels/results/gpu_*.csv); what is done already with the same sources on
such a machine is not done again. An engine that does not run here is a row with the reason. The
last lines are what to decide by: targets, the fastest engine, wrong checks, lines to paste. Exit
status 1 if a result is wrong or something could not be run.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpu_shares
import needs
from gpu_drive import add_options, say, serve, watch
from gpu_report import failed, report
from gpu_start import folder_for, machine_for
from gpu_watch import Watched

if TYPE_CHECKING:
    from gpu_results import Machine
    from gpu_units import Unit

PARTS = {
    "first": needs.KERNELS,
    "table": needs.METHODS,
    "check": needs.KERNELS,
    "select": needs.METHODS,
    "presets": needs.METHODS,
    "forms": needs.METHODS,
    "shapes": needs.METHODS,
    "model": needs.MODELS,
    "sanitize": needs.KERNELS,
    "tune": needs.METHODS,
}
"""Part -> the modules that it needs; in the order in which they run."""

BUDGET = 540.0
SUMMARY = "gpu_summary.txt"
NONE = "<none>"
"""Part of no unit's name."""

Source = tuple[str, "Callable[[], list[Unit]]"]


def main() -> int:
    """Watch over the work; or, in a process of its own, do it."""
    options, parser = arguments()
    if options.needs:
        print(needs.report({part: PARTS[part] for part in options.only}))
        return 0
    if options.plan:
        return plan(options, parser)
    if options.plot:
        return draw(options)
    if options.first_call:
        return first_call(options, parser)
    if options.worker:
        return serve(options, parser, partial(sources, options))
    unmet = {part: needs.missing(PARTS[part]) for part in options.only}
    if any(unmet.values()):
        print(needs.cure(unmet), flush=True)
    parts = [part for part in options.only if not unmet[part]]
    if not parts:
        return 2
    say_hardware()
    extra = ["--only", *parts]
    shared = [part for part in parts if part in gpu_shares.PARTS]
    if options.jobs > 1 and shared and not options.summary:
        folder = folder_for(options.dry_run, options.out)
        gpu_shares.side_by_side(Path(__file__), options, shared, folder, say)
    if options.summary:
        extra += ["--units", NONE]
    elif options.units:
        extra += ["--units", options.units]
    extra += ["--share", "{}/{}".format(*options.share)]
    return conclude(options, watch(Path(__file__), options, *extra), unmet)


def arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    add_options(parser, BUDGET)
    parser.add_argument("--plan", action="store_true", help="parts, units and their seconds")
    parser.add_argument("--needs", action="store_true", help="packages, and how to bring them")
    parser.add_argument("--summary", action="store_true", help="only the summary, from the CSVs")
    parser.add_argument("--plot", action="store_true", help="only the pictures, from the CSVs")
    parser.add_argument("--units", help="only units whose name holds this")
    parser.add_argument("--jobs", type=int, default=1, metavar="N",
                        help="processes for the checks, in which nothing is timed")  # fmt: skip
    parser.add_argument("--share", type=share, default=(1, 1), metavar="K/N",
                        help="every N-th unit from the K-th on")  # fmt: skip
    parser.add_argument("--first-call", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(), parser


def share(text: str) -> tuple[int, int]:
    """K and N of "K/N"; raises ArgumentTypeError."""
    first, slash, every = text.partition("/")
    if not (slash and first.isdigit() and every.isdigit() and 1 <= int(first) <= int(every)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected K/N with 1 <= K <= N, such as 2/6")
    return int(first), int(every)


def sources(options: argparse.Namespace, machine: Machine) -> Iterator[Source]:
    """Each part and what lists its units, those that were asked for."""
    for part in options.only:
        yield part, partial(chosen, options, part, machine)


def chosen(options: argparse.Namespace, part: str, machine: Machine) -> list[Unit]:
    wanted = options.units or ""
    first, every = options.share
    units = [unit for unit in units_of(part, machine) if wanted in unit.name]
    return units[first - 1 :: every]


def units_of(part: str, machine: Machine) -> list[Unit]:
    """The units of a part; imports what the part alone needs."""
    if part in ("first", "check"):
        import gpu_check

        return list(gpu_check.first(machine)) if part == "first" else gpu_check.units(machine)
    if part == "select":
        import gpu_check_select

        return gpu_check_select.units(machine)
    if part in ("table", "shapes"):
        import gpu_speed

        return list(gpu_speed.table(machine) if part == "table" else gpu_speed.shapes(machine))
    if part == "presets":
        import gpu_presets

        return list(gpu_presets.units(machine))
    if part in ("forms", "tune"):
        import gpu_tilings

        return list(gpu_tilings.forms(machine) if part == "forms" else gpu_tilings.tune(machine))
    if part == "model":
        import gpu_model

        return gpu_model.units(machine)
    import gpu_sanitize

    return list(gpu_sanitize.units(machine))


def conclude(options: argparse.Namespace, seen: Watched, unmet: dict[str, list[str]]) -> int:
    """Pictures and summary; the exit status."""
    folder = folder_for(options.dry_run, options.out)
    text = "\n".join(report(folder, seen, unmet))
    (folder / SUMMARY).write_text(text + "\n")
    if {"table", "shapes"} & set(options.only) and not seen.trouble:
        draw(options)
    print(f"\n{text}")
    return int(failed(seen, unmet))


def say_hardware() -> None:
    """Name, clocks and limits of the GPU, as they are."""
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        fields = (
            "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        )
        query = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
            print(done.stdout.strip(), flush=True)
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"nvidia-smi does not answer: {error}", flush=True)


def first_call(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Seconds of the first and of the second call of this process."""
    folder = folder_for(options.dry_run, options.out)
    machine = machine_for(options.dry_run, folder, 1e9, tuple(options.engines), parser.error)
    import gpu_model

    print(*gpu_model.first_call(machine))
    return 0


def plan(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """How many units every part has on this machine, and about how long they take."""
    folder = folder_for(options.dry_run, options.out)
    machine = machine_for(options.dry_run, folder, 1e9, tuple(options.engines), parser.error)
    print("\n".join(planned(options, machine)))
    return 0


def planned(options: argparse.Namespace, machine: Machine) -> Iterator[str]:
    """A line per part; seconds are what its units say of themselves, a guess for a GPU."""
    until = 0.0
    for part, listed in sources(options, machine):
        units = listed()
        taken = sum(unit.seconds for unit in units)
        until += taken
        yield f"{part:9} {len(units):4} units {taken:5.0f} s, until {until:5.0f} s"


def draw(options: argparse.Namespace) -> int:
    """The pictures."""
    from gpu_plot import plot

    try:
        written = plot(folder_for(options.dry_run, options.out))
    except (FileNotFoundError, ImportError, ValueError) as error:
        print(f"no pictures: {error}")
        return 1
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
