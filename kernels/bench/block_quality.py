"""What larger blocks cost: the error of the default method by block sizes, on real q, k and v.

    python kernels/bench/block_quality.py        the demo model: some minutes

Every self-attention call of the sparse steps of a short run of the demo model is computed again by
the method at density 0.2 for each pair of block sizes, and dense in float64. The error is relative
L2 over all tokens and heads of a call; the figure the mean over calls. It is a matter of the method
and the model, not of the machine.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import needs

needs.demand(needs.MODELS)

import torch.nn.functional as F

import vidsparse
from vidsparse.accelerate import observing
from vidsparse.attention import attend
from vidsparse.config import SparseConfig
from vidsparse.generate.clock import Listener
from vidsparse.generate.job import prepare
from vidsparse.generate.request import Request
from vidsparse.generate.run import load, run_arm
from vidsparse.pipelines.observation import ObservedCall

BLOCKS = ((64, 64), (128, 64), (256, 64), (128, 128))
"""Tokens of a query block and of a key block."""

DENSITY = 0.2
CSV = Path(__file__).resolve().parents[1] / "results" / "block_quality.csv"


class Meter:
    """Errors of each pair of block sizes, call by call."""

    def __init__(self, configs: Mapping[tuple[int, int], SparseConfig]) -> None:
        self.configs = configs
        self.errors: dict[tuple[int, int], list[float]] = defaultdict(list)

    def __call__(self, call: ObservedCall) -> None:
        if call.result.plan is None:
            return
        q, k, v = (x.double().transpose(1, 2) for x in (call.q, call.k, call.v))
        want = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        for sizes, config in self.configs.items():
            found = attend(call.q, call.k, call.v, grid=call.grid, config=config, hoisted=True)
            assert found.reason is None, found.reason
            self.errors[sizes].append(float((found.out - want).norm() / want.norm()))


def config_of(sizes: tuple[int, int]) -> SparseConfig:
    """The default method at a constant density, in blocks of these sizes."""
    block_q, block_k = sizes
    changes = ["schedule.name=constant", f"schedule.density={DENSITY}", "kernel.impl=cpu"]
    blocks = [f"kernel.block_q={block_q}", f"kernel.block_k={block_k}"]
    return SparseConfig.load("tiles", [*changes, *blocks])


def measure(steps: int) -> dict[tuple[int, int], list[float]]:
    """Run the demo model sparse under a meter."""
    job = prepare(Request(steps=steps, overrides=("kernel.crossover=1",)))
    listener = Listener()
    pipe = load(job, listener)
    meter = Meter({sizes: config_of(sizes) for sizes in BLOCKS})
    vidsparse.accelerate_pipeline(pipe, job.preset, job.overrides)
    with observing(pipe, meter):
        run_arm(pipe, job, "sparse", listener)
    return meter.errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    errors = measure(options.steps)
    first = fmean(errors[BLOCKS[0]])
    lines = [("block_q", "block_k", "density", "calls", "rel_l2", "of_64_64")]
    for (block_q, block_k), found in errors.items():
        mean = fmean(found)
        lines.append(
            (block_q, block_k, DENSITY, len(found), f"{mean:.4f}", f"{mean / first:.2f}")  # type: ignore[arg-type]
        )
        print(f"{block_q}/{block_k}: error {mean:.4f}, {mean / first:.2f} of that of 64/64")
    part = CSV.with_suffix(".part")
    with part.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    os.replace(part, CSV)
    return 0


if __name__ == "__main__":
    sys.exit(main())
