"""Everything that needs a GPU, in under ten minutes: correct on silicon, how fast, and why.

    python kernels/gpu_suite.py                       all parts, the most important first
    python kernels/gpu_suite.py --only check bench    some of them
    python kernels/gpu_suite.py --plot                the pictures again, from the CSVs
    python kernels/gpu_suite.py --dry-run             all parts, tiny, on a CPU in the interpreter

    check     sparse forward and every stage against float64, and offsets past 2^31
    bench     Wan 2.1 14B and 1.3B: stages, whole operator, dense and FlexAttention, six densities
    model     one forward of both transformers with random weights, and the first call
    forms     pointer, TMA and warp-specialised tilings, random and coherent lists
    shapes    the bench for HunyuanVideo and CogVideoX-5B
    sanitize  compute-sanitizer (memcheck) over a small run

Every part is a process of its own: what crashes or hangs in one does not reach the next, and what a
part has measured is saved as it goes in kernels/results/gpu_*.csv. Parts and jobs for which
--budget-s leaves no time are dropped, the last ones first, and named. Exit status 1 if a result is
wrong or a part failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_start import FORMS, machine_for

PARTS = {"check": 200.0, "bench": 200.0, "model": 170.0, "forms": 110.0, "shapes": 130.0,
         "sanitize": 90.0}  # fmt: skip
"""Part -> seconds that it may take."""

LEAST = 20.0
"""A part that would get less is dropped."""

PROBE_SECONDS = 120.0
TARGETS = (
    ("wan2.1-14b-720p", 1.0, "x dense", 0.85),
    ("wan2.1-14b-720p", 0.2, "whole x dense", 4.0),
    ("wan2.1-14b-720p", 0.1, "whole x dense", 7.5),
    ("wan2.1-14b-720p", 0.2, "x flex", 1.3),
    ("wan2.1-14b-720p", 0.2, "x int8", 1.2),
    ("wan2.1-14b-720p", 0.1, "overhead", 0.15),
)
"""Shape, density, column of the summary, and what it should be at least; overhead: at most."""


def main() -> int:
    """All parts in turn, each in a process of its own."""
    options, parser = arguments()
    if options.plot:
        return draw(options)
    if options.first_call or options.probe or options.child:
        return child(options, parser)
    start = time.monotonic()
    failed, dropped = [], []
    say_hardware()
    forms = options.forms
    if set(options.only) != {"sanitize"}:
        forms = probe(options)
        if "pointer" not in forms:
            print("no form of the sparse forward answers: nothing to measure")
            return 1
    for part in options.only:
        left = options.budget_s - (time.monotonic() - start)
        if left < LEAST and not options.dry_run:
            dropped.append(part)
            continue
        print(f"\n== {part}, {left:.0f} s left", flush=True)
        seconds = left if options.dry_run else min(left, PARTS[part])
        if part == "sanitize":
            status = sanitize(options, seconds)
        else:
            status = run_part(options, part, seconds, forms)
        if status:
            failed.append(f"{part} ({status})")
    if {"bench", "shapes"} & set(options.only):
        draw(options)
    lost = [form for form in options.forms if form not in forms]
    print(f"\n{time.monotonic() - start:.0f} s; forms {', '.join(forms)}", end="")
    print(f"; did not answer: {', '.join(lost)}" if lost else "")
    print(f"dropped for lack of time: {', '.join(dropped)}" if dropped else "no part dropped")
    print(f"failed: {', '.join(failed)}" if failed else "no part failed")
    return int(bool(failed or lost))


def arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--dry-run", action="store_true", help="tiny, in Triton's CPU interpreter")
    parser.add_argument("--plot", action="store_true", help="only the pictures, from the CSVs")
    for hidden in ("--child", "--probe", "--first-call"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(), parser


def command(options: argparse.Namespace, *extra: str) -> list[str]:
    """This script again, in a new process."""
    parts = [sys.executable, str(Path(__file__).resolve()), *["--dry-run"] * options.dry_run]
    if options.out:
        parts += ["--out", str(options.out)]
    return [*parts, *extra]


def say_hardware() -> None:
    """Name, clocks and limits of the GPU, as they are."""
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        fields = (
            "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        )
        query = [tool, f"--query-gpu={fields}", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        print(done.stdout.strip(), flush=True)


def probe(options: argparse.Namespace) -> list[str]:
    """The forms that answer at all, found in a process that may hang or die."""
    process = command(options, "--probe", "--forms", *options.forms)
    try:
        done = subprocess.run(process, stdout=subprocess.PIPE, text=True, timeout=PROBE_SECONDS)
        output = done.stdout
    except subprocess.TimeoutExpired as late:
        said: Any = late.stdout or ""
        output = said.decode() if isinstance(said, bytes) else said
        print(f"a form hangs: no answer in {PROBE_SECONDS:.0f} s")
    forms = [line.split()[1] for line in output.splitlines() if line.startswith("answers ")]
    print(f"forms that answer: {', '.join(forms) or 'none'}", flush=True)
    return forms


def run_part(options: argparse.Namespace, part: str, seconds: float, forms: list[str]) -> str:
    """Run a part; empty if it went well, else how it did not."""
    budget = f"{seconds:.0f}"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # what it says before it is stopped
    process = command(options, "--child", "--only", part, "--budget-s", budget, "--forms", *forms)
    try:
        done = subprocess.run(process, env=environment, timeout=seconds + LEAST, check=False)
    except subprocess.TimeoutExpired:
        return "stopped: out of time"
    return f"exit status {done.returncode}" if done.returncode else ""


def sanitize(options: argparse.Namespace, seconds: float) -> str:
    """compute-sanitizer over a small run."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not on the PATH: not run")
        return ""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = [tool, "--tool", "memcheck", "--error-exitcode", "9", *command(options, "--probe")]
    try:
        done = subprocess.run(
            process, env=environment, timeout=seconds, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"compute-sanitizer was not done in {seconds:.0f} s")
        return "out of time"
    lines = [line for line in done.stdout.splitlines() if "=====" in line or "answers" in line]
    print("\n".join(lines[-12:]))
    return f"exit status {done.returncode}" if done.returncode else ""


def child(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """One part, the probe or the first call, in this process."""
    machine = machine_for(
        options.dry_run, options.out, options.budget_s, tuple(options.forms), parser.error
    )
    if options.probe:
        from gpu_check import probe as answers

        for form in answers(machine):
            print(f"answers {form}", flush=True)
        return 0
    if options.first_call:
        from gpu_model import first_call

        print(*first_call(machine))
        return 0
    from gpu_results import console, run_jobs

    (part,) = options.only
    outcome = run_jobs(jobs_of(part, machine), machine, console())
    return report(part, outcome.rows, console()) or int(bool(outcome.failed))


def jobs_of(part: str, machine: Any) -> list[Any]:
    """The jobs of a part."""
    if part == "check":
        import gpu_check

        return gpu_check.jobs(machine)
    if part in ("bench", "shapes"):
        import gpu_bench

        return gpu_bench.jobs(machine, main=part == "bench")
    if part == "model":
        import gpu_model

        return gpu_model.jobs(machine)
    import gpu_forms

    return gpu_forms.jobs(machine)


def report(part: str, rows: list[Any], console: Any) -> int:
    """Print what a part found, briefly; 1 if something is wrong."""
    from gpu_bench import MAX_ERROR
    from gpu_tables import background, stages, summary

    if part == "check":
        bad = [row for row in rows if row.verdict != "right"]
        for row in bad:
            what = f"{row.verdict}: {row.check}, {row.shape}, {row.dtype}, {row.impl}"
            numbers = f"{row.error:.2e} of {row.limit:.0e} {row.message}"
            console.print(f"{what}: {numbers}", markup=False)
        console.print(f"{len(rows) - len(bad)} of {len(rows)} comparisons right")
        return int(bool(bad) or not rows)
    if part in ("bench", "shapes"):
        lines = summary(rows)
        console.print(table(part, lines))
        console.print(table(f"{part}: stages, ms", stages(rows)))
        for line in (*background(rows), *verdicts(lines)):
            console.print(line, highlight=False)
        checked = [r for r in rows if r.rel_l2 is not None and r.impl.startswith("triton")]
        wrong = [r for r in checked if not r.rel_l2 <= MAX_ERROR[r.impl.endswith("-int8")]]
        for r in wrong:
            console.print(f"error too large: {r.shape} {r.density} {r.impl} {r.stage} {r.rel_l2}")
        return int(bool(wrong))
    names = ("shape", "density", "impl", "stage", "ms_p50", "tflops", "speedup_vs_dense", "rel_l2")
    console.print(table(part, [{name: getattr(row, name) for name in names} for row in rows]))
    return 0


def table(title: str, lines: list[dict[str, Any]]) -> Any:
    """A rich table of equal dicts."""
    from rich.table import Table

    drawn = Table(title=title, pad_edge=False)
    for name in lines[0] if lines else ():
        drawn.add_column(name, justify="left" if name in ("shape", "stage", "impl") else "right")
    for line in lines:
        drawn.add_row(*(shown(value) for value in line.values()))
    return drawn


def shown(value: Any) -> str:
    """A number with three or four digits that count."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if value != value:
        return ""
    return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.4g}"


def verdicts(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Of each target for which there is a number."""
    at = {(line["shape"], line["density"]): line for line in lines}
    for shape, density, column, wanted in TARGETS:
        value = at.get((shape, density), {}).get(column)
        if value is None or value != value:
            continue
        most = column == "overhead"
        met = value <= wanted if most else value >= wanted
        bound = f"at {'most' if most else 'least'} {wanted}"
        verdict = "met" if met else "MISSED"
        yield f"target {verdict}: {shape} d {density} {column} {value:.3g}, {bound}"


def draw(options: argparse.Namespace) -> int:
    """The pictures."""
    from gpu_plot import plot

    folder = options.out or (
        Path("/tmp/vidsparse-dry-run") if options.dry_run
        else Path(__file__).resolve().parent / "results"
    )  # fmt: skip
    try:
        written = plot(folder)
    except (FileNotFoundError, ImportError) as error:
        print(f"no pictures: {error}")
        return 1
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
