"""The forms and tilings of the sparse forward against each other, random against coherent lists.

Coherent: a row lists the blocks around the diagonal, so neighbouring programs read the same keys;
random: no two rows alike, the worst case for the L2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_bench import Bench
from gpu_cases import SHAPES, TINY, Shape, exact_plan, random_qkv, work
from gpu_dense import dense_acts
from gpu_results import Job, Machine, Result, interleaved, spread
from tune import label, try_all

PATTERNS = (
    ("random", "plain", 0.1),
    ("coherent", "plain", 0.1),
    ("random", "rest", 0.1),
    ("random", "plain", 0.3),
    ("coherent", "plain", 0.3),
    ("coherent", "plain", 1.0),
)


def jobs(machine: Machine) -> list[Job]:
    """Head dim 128, then 64."""
    if machine.dry:
        return [Job("forms: tiny", 0.0, lambda: compare(machine, TINY), "gpu_forms")]
    wide = SHAPES["wan2.1-1.3b-480p"]
    narrow = replace(wide, name=f"{wide.name}, D 64", head_dim=64)
    return [
        Job(f"forms: {shape.name}", 60.0, partial(compare, machine, shape), "gpu_forms")
        for shape in (wide, narrow)
    ]


def compare(machine: Machine, shape: Shape) -> Iterator[Result]:
    """Every tiling of `tune.HALF` in turn with the fastest dense attention."""
    qkv = random_qkv(shape, machine.device)
    this = Bench(machine, shape, qkv)
    dense = dense_acts(*qkv)
    first = interleaved(dense, machine, 0.3, 10)
    this.dense = min(dense, key=lambda name: spread(first[name])[1])
    for pattern, content, density in PATTERNS[2:3] if machine.dry else PATTERNS:
        ready, failed = try_all(
            machine, shape, torch.bfloat16, content, density, pattern == "coherent"
        )
        acts: dict[Any, Callable[[], Any]] = {key: pair[0].forward for key, pair in ready.items()}
        times = interleaved({"dense": dense[this.dense], **acts}, machine, 0.8)
        tflop = work(exact_plan(shape, density, (128, 64), machine.device, True), shape.head_dim)
        for (form, tiling), (_, error) in ready.items():
            stage = f"{content} {label(tiling)}, {pattern}"
            taken = times[form, tiling]
            yield this.row(density, form, stage, taken, tflop, times["dense"], error)
        for (form, tiling), why in failed.items():
            print(f"{content} {form} {label(tiling)}: {why}")
