"""Predicted against measured seconds of the demo model on this CPU, in eight settings.

    taskset -c 0 env OMP_NUM_THREADS=1 python pipelines/check_predictions.py
    python pipelines/check_predictions.py --rounds 1    quicker

Calibrates anew, in a cache folder of its own, and says how long that took. Then the settings run in
turn, so that what slows the machine down slows all of them; measured is the median over rounds of
the denoising loop, in CPU time for one thread, in wall time for more. The CSV holds the constants,
too: `tests/test_costs_recorded.py` predicts from them.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

CSV = Path(__file__).parent / "results" / "predictions_cpu.csv"
CONSTANTS = ("matmul", "bandwidth", "launch", "dense", "sparse")


@dataclass(frozen=True)
class Setting:
    """arm: dense, or sparse by preset and overrides. size: height, width, frames."""

    arm: str
    preset: str
    dtype: str
    size: tuple[int, int, int]
    steps: int = 4


FAST = "schedule.density=0.125 schedule.dense_steps=0.2"
FINE = "schedule.density=0.35 schedule.dense_steps=0.4"
SETTINGS = (
    Setting("dense", "tiles", "fp32", (96, 96, 21)),
    Setting("sparse", "tiles", "fp32", (96, 96, 21)),
    Setting("sparse", f"tiles {FAST}", "fp32", (96, 96, 21)),
    Setting("sparse", f"tiles {FINE}", "fp32", (64, 96, 21)),
    Setting("sparse", "tiles", "bf16", (96, 96, 21)),
    Setting("sparse", "pyramid", "fp32", (96, 96, 33)),
    Setting("sparse", "balanced", "fp32", (96, 96, 21), steps=8),
    Setting("sparse", "fast", "fp32", (96, 96, 33), steps=8),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=CSV)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        rows = check(options.rounds)
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    worst = max(abs(float(row["ratio"]) - 1) for row in rows)
    print(f"the largest error is {worst:.0%}; {options.csv}")


def check(rounds: int) -> list[dict[str, object]]:
    """Rows of the CSV, printed as well."""
    import torch

    from vidsparse.accelerate import accelerate_pipeline, restore_pipeline
    from vidsparse.generate.clock import Listener
    from vidsparse.generate.forecast import forecast, plan_of
    from vidsparse.generate.job import prepare
    from vidsparse.generate.request import Request
    from vidsparse.generate.run import load, run_arm

    pipes, jobs, found, waited = {}, [], [], []
    for setting in SETTINGS:
        height, width, frames = setting.size
        size = {"height": height, "width": width, "frames": frames, "steps": setting.steps}
        preset, *overrides = setting.preset.split()
        method = {"preset": preset, "overrides": tuple(overrides)}
        job = prepare(Request(**method, dtype=setting.dtype, device="cpu", **size))
        jobs.append(job)
        if setting.dtype not in pipes:
            pipes[setting.dtype] = load(job, Listener())
        start = time.perf_counter()
        found.append(forecast(plan_of(pipes[setting.dtype], job), "cpu"))
        waited.append(time.perf_counter() - start)
    times: list[list[float]] = [[] for _ in SETTINGS]
    for _ in range(rounds):
        for setting, job, taken in zip(SETTINGS, jobs, times, strict=True):
            pipe = pipes[setting.dtype]
            if setting.arm == "sparse":
                accelerate_pipeline(pipe, job.config)
            try:
                arm = run_arm(pipe, job, setting.arm, Listener())
                one = torch.get_num_threads() == 1
                taken.append(arm.cpu_seconds if one else arm.denoise_seconds)
            finally:
                restore_pipeline(pipe)
    rows = []
    for setting, one, taken, wait in zip(SETTINGS, found, times, waited, strict=True):
        run = one.dense_run if setting.arm == "dense" else one.sparse_run
        measured = median(taken)
        around = next(iter(one.machine.slower.values())).value
        constants = {name: f"{one.machine.constants[name].value:.4g}" for name in CONSTANTS}
        row = {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "cpu": one.machine.about,
            "torch": torch.__version__,
            "arm": setting.arm,
            "preset": setting.preset,
            "dtype": setting.dtype,
            "height": setting.size[0],
            "width": setting.size[1],
            "frames": setting.size[2],
            "steps": setting.steps,
            "threads": torch.get_num_threads(),
            **constants,
            "around": f"{around:.4g}",
            "crossover": f"{one.crossover:.4f}",
            "calibration_s": f"{wait:.1f}",
            "predicted_s": f"{run.seconds:.3f}",
            "error": f"{one.errors[setting.arm]:.3f}",
            "measured_s": f"{measured:.3f}",
            "ratio": f"{run.seconds / measured:.3f}",
        }
        rows.append(row)
        print(
            f"{setting.arm:6} {setting.preset:9} {setting.dtype} "
            f"{'x'.join(map(str, setting.size)):10} predicted {run.seconds:7.2f} s "
            f"measured {measured:7.2f} s ({min(taken):.2f} .. {max(taken):.2f}) "
            f"ratio {run.seconds / measured:.2f}, calibrated in {wait:.1f} s"
        )
    return rows


if __name__ == "__main__":
    main()
