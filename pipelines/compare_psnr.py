"""Speed-up and fidelity of presets: each prompt dense, then with every preset in turn.

    python pipelines/compare_psnr.py
    python pipelines/compare_psnr.py --presets balanced,pyramid --count 2 --set schedule.density=0.2
    python pipelines/compare_psnr.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts
    configs/prompts/real.txt --table outputs/real.csv

The default model is the shipped one, with the prompts of its card. What a preset makes sparse is
sparse, also where dense attention is as fast on this CPU: --set kernel.crossover=auto leaves such
calls dense, as `vidsparse generate` does. All runs are in one process;
a run that is repeated with the same settings takes up finished jobs from --out. Writes what
`vidsparse compare` does to OUT/compare, and a table: a row per prompt and preset, with a contact
sheet of the first prompt beside it. In the table printed at the end the speed-up is the median over
the prompts of dense / sparse seconds of the denoising loop, PSNR and SSIM are means.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from vidsparse import interrupts
from vidsparse.clip_bar import ClipBar
from vidsparse.compare.comparison import Comparison, Row
from vidsparse.compare.display import Display
from vidsparse.compare.measure import Settings
from vidsparse.compare.run import Request as CompareRequest
from vidsparse.compare.run import compare, cores
from vidsparse.ending import fail, leave
from vidsparse.generate.clock import Listener
from vidsparse.generate.job import Job
from vidsparse.generate.many import arms, execute_all, finished
from vidsparse.generate.model import find_model
from vidsparse.generate.prompts import Prompt, read_prompts, requests
from vidsparse.generate.request import Request
from vidsparse.kernels.cpu import machine
from vidsparse.quality.frames import atomic_output, read_clip
from vidsparse.quality.sheet import SheetRow, write_contact_sheet

RESULTS = Path(__file__).resolve().parent / "results"
ALWAYS_SPARSE = "kernel.crossover=1"
"""Set before what --set says: a measurement is of the preset, whatever it gains."""


def arguments(about: str, out: str) -> argparse.ArgumentParser:
    """What this recipe and compare_vbench.py have in common."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", help="folder or hub id; the demo model if left out")
    parser.add_argument("--presets", default="quality,balanced,fast", help="names, comma-separated")
    parser.add_argument("--set", action="append", default=[], help="override for every preset")
    parser.add_argument("--prompts", type=Path, help="text, a prompt a line, or .jsonl; else the "
                        "model's own")  # fmt: skip
    parser.add_argument("--count", type=int, help="only the first so many prompts")
    parser.add_argument("--samples", type=int, default=1, help="videos per prompt")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for jobs and figures")
    return parser


class Jobs(Listener):
    """Tells a bar over jobs which one runs, in which arm and step it is."""

    def __init__(self, bar: ClipBar) -> None:
        self.bar, self.arm, self.steps = bar, "", 0

    def job(self, job: Job) -> None:
        self.bar.next(job.preset, job.prompt)

    def begin(self, arm: str, steps: int) -> None:
        self.arm, self.steps = arm, steps

    def step(self, done: int, density: float) -> None:
        self.bar.detail(f"{self.arm} {done}/{self.steps}")


def generate_arms(options: argparse.Namespace, console: Console) -> dict[str, list[Job]]:
    """Preset -> its jobs, all of them done; the first preset's have dense videos too."""
    if options.prompts is not None:
        prompts = read_prompts(options.prompts)
    else:
        prompts = [Prompt(text) for text in find_model(options.model, print).prompts]
    base = Request(model=options.model, overrides=(ALWAYS_SPARSE, *options.set),
                   steps=options.steps, dtype=options.dtype)  # fmt: skip
    asked = requests(base, prompts[: options.count], options.samples)
    made = arms(asked, options.presets.split(","), options.out)
    in_turn = [job for same in zip(*made.values(), strict=True) for job in same]
    fresh = [job for job in in_turn if finished(job) is None]
    bar = ClipBar(console)
    bar.say(f"{len(fresh)} of {len(in_turn)} videos are to be made, in {options.out}")
    bar.begin(len(fresh))
    try:
        for _ in execute_all(fresh, Jobs(bar)):
            pass
    finally:
        bar.end()
    return made


def compare_arms(made: dict[str, list[Job]], out: Path, console: Console) -> Comparison:
    """Every preset against the dense videos of the first."""
    folders = {preset: jobs[0].out.parent for preset, jobs in made.items()}
    reference = next(iter(folders.values()))
    tests = list(folders.items())
    command = " ".join(["python", *sys.argv])
    request = CompareRequest(reference, tests, out, "manifest", Settings(workers=cores()),
                             command=command)  # fmt: skip
    return compare(request, Display(console))


@contextmanager
def ended(out: Path) -> Iterator[None]:
    """A mistake is one line and exit code 2, an interrupt one line that says what is kept."""
    try:
        with interrupts.listening():
            yield
    except (ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        leave(f"; what is finished is in {out}, the same command goes on from there")


def line(row: Row) -> dict[str, Any]:
    """The table's row of one preset on one prompt."""
    job, quality = row.test.sidecar, row.measured.metrics
    assert job is not None
    dense, sparse = row.seconds
    assert dense and sparse
    return {
        "commit": commit(),
        "date": date.today().isoformat(),
        "model": job["model"]["name"],
        "tokens": job["tokens"],
        "device": job["device"],
        "cpu": machine.name(),
        "threads": job["threads"],
        "torch": job["versions"]["torch"],
        "dtype": job["dtype"],
        "steps": job["steps"],
        "preset": row.arm,
        "prompt": job["prompt"],
        "seed": job["seed"],
        "density": round(job["density"], 4),
        "attention_density": round(job["attention_density"], 4),
        "dense_seconds": round(dense, 3),
        "sparse_seconds": round(sparse, 3),
        "speedup": round(dense / sparse, 3),
        "psnr_pool": round(quality.psnr_pool, 3),
        "ssim": round(quality.ssim, 5),
    }


def sheet(path: Path, comparison: Comparison, first: Job) -> None:
    """All presets on the first prompt."""
    rows = [
        row for row in comparison.rows
        if row.test.sidecar and row.test.sidecar["prompt"] == first.prompt
        and row.test.sidecar["seed"] == first.seed
    ]  # fmt: skip
    shown = [
        SheetRow(row.arm, read_clip(row.test.clip.path), row.speedup, None,
                 row.measured.metrics.psnr_pool, row.measured.metrics.ssim, row.density)
        for row in rows
    ]  # fmt: skip
    dense = SheetRow("dense", read_clip(rows[0].reference.clip.path))
    write_contact_sheet(path, dense, shown, title=first.prompt, fps=first.fps)


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def summary(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None)
    columns = ("preset", "speed-up", "PSNR dB", "worst", "SSIM", "density", "dense s", "sparse s")
    for column in columns:
        table.add_column(column, justify="left" if column == "preset" else "right")
    for name in dict.fromkeys(r["preset"] for r in rows):
        own = [r for r in rows if r["preset"] == name]
        psnr = [r["psnr_pool"] for r in own]
        table.add_row(
            name,
            f"{median(r['speedup'] for r in own):.2f}x",
            f"{fmean(psnr):.2f}",
            f"{min(psnr):.2f}",
            f"{fmean(r['ssim'] for r in own):.4f}",
            f"{fmean(r['density'] for r in own):.3f}",
            f"{median(r['dense_seconds'] for r in own):.1f}",
            f"{median(r['sparse_seconds'] for r in own):.1f}",
        )
    return table


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], "outputs/compare_psnr")
    parser.add_argument("--table", type=Path, default=RESULTS / "demo_presets.csv")
    options = parser.parse_args()
    console = Console(stderr=True)
    with ended(options.out):
        made = generate_arms(options, console)
        comparison = compare_arms(made, options.out / "compare", console)
        rows = [line(row) for row in comparison.rows]
        options.table.parent.mkdir(parents=True, exist_ok=True)
        with atomic_output(options.table) as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        sheet(options.table.with_suffix(".png"), comparison, next(iter(made.values()))[0])
    Console().print(summary(rows))
    said = f"{options.table}, {options.table.with_suffix('.png').name}, {options.out}/compare"
    console.print(said, markup=False)


if __name__ == "__main__":
    main()
