"""Speed-up and fidelity of presets on a model: each prompt dense, then with every preset in turn.

    python pipelines/compare_presets.py
    python pipelines/compare_presets.py --presets balanced,pyramid --prompts 2 --set
    schedule.density=0.2

The default model is the shipped one. Dense and sparse runs alternate in one process; the speed-up
of a preset is the median over the prompts of dense / sparse seconds of the denoising loop, PSNR and
SSIM are means over the prompts, against the dense video of the same prompt and seed. Writes one CSV
row per prompt and preset, and a contact sheet of the first prompt.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vidsparse.accelerate import accelerate_pipeline, restore_pipeline
from vidsparse.generate.job import Request, prepare
from vidsparse.generate.run import Arm, Listener, load, run_arm
from vidsparse.quality.frames import atomic_output
from vidsparse.quality.metrics import compare_clips
from vidsparse.quality.sheet import SheetRow, write_contact_sheet

RESULTS = Path(__file__).resolve().parent / "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id; the demo model if left out")
    parser.add_argument("--presets", default="quality,balanced,fast", help="names, comma-separated")
    parser.add_argument("--set", action="append", default=[], help="override for every preset")
    parser.add_argument("--prompts", type=int, default=8, help="how many of the model's list")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--out", type=Path, default=RESULTS / "demo_presets.csv")
    return parser.parse_args()


def compare(options: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """One row per prompt and preset."""
    presets = options.presets.split(",")
    request = Request(model=options.model, steps=options.steps, dtype=options.dtype)
    jobs = {
        name: prepare(replace(request, preset=name, overrides=tuple(options.set)))
        for name in presets
    }
    first = jobs[presets[0]]
    prompts = first.model.prompts[: options.prompts]
    task = progress.add_task("loading", total=len(prompts) * (1 + len(presets)))
    pipe = load(first, Listener())
    rows: list[dict[str, Any]] = []
    for seed, prompt in enumerate(prompts):
        arms: dict[str, Arm] = {}
        for name in ("dense", *presets):
            progress.update(task, description=f"{seed + 1}/{len(prompts)} {name}")
            job = jobs.get(name, first)
            call = {**job.call, "prompt": prompt}
            job = replace(job, prompt=prompt, seed=seed, call=call)
            if name != "dense":
                accelerate_pipeline(pipe, job.config)
            arms[name] = run_arm(pipe, job, "dense" if name == "dense" else "sparse", Listener())
            restore_pipeline(pipe)
            progress.advance(task)
        rows += [row(name, prompt, seed, arms, first) for name in presets]
        if seed == 0:
            sheet(options.out.with_suffix(".png"), prompt, arms, first.fps)
    return rows


def row(name: str, prompt: str, seed: int, arms: dict[str, Arm], job: Any) -> dict[str, Any]:
    """The figures of one preset on one prompt."""
    dense, sparse = arms["dense"], arms[name]
    quality = compare_clips(dense.frames, sparse.frames)
    assert sparse.report is not None
    return {
        "commit": commit(),
        "date": date.today().isoformat(),
        "model": job.model.name,
        "tokens": job.tokens,
        "device": job.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": job.dtype,
        "steps": job.call["num_inference_steps"],
        "preset": name,
        "prompt": prompt,
        "seed": seed,
        "density": round(sparse.report.density, 4),
        "attention_density": round(sparse.report.attention_density, 4),
        "dense_seconds": round(dense.denoise_seconds, 3),
        "sparse_seconds": round(sparse.denoise_seconds, 3),
        "speedup": round(dense.denoise_seconds / sparse.denoise_seconds, 3),
        "psnr_pool": round(quality.psnr_pool, 3),
        "ssim": round(quality.ssim, 5),
    }


def sheet(path: Path, prompt: str, arms: dict[str, Arm], fps: float) -> None:
    """All presets on one prompt."""
    dense = arms["dense"]
    rows = []
    for name, arm in arms.items():
        if arm.report is not None:
            quality = compare_clips(dense.frames, arm.frames)
            speedup = dense.denoise_seconds / arm.denoise_seconds
            figures = (speedup, None, quality.psnr_pool, quality.ssim, arm.report.density)
            rows.append(SheetRow(name, arm.frames, *figures))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_contact_sheet(path, SheetRow("dense", dense.frames), rows, title=prompt, fps=fps)


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
    options = arguments()
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        rows = compare(options, progress)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_output(options.out) as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    Console().print(summary(rows))
    console.print(f"{options.out}, {options.out.with_suffix('.png').name}", markup=False)


if __name__ == "__main__":
    main()
