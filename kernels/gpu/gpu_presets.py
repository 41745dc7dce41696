"""Whole calls of presets: what a sparse step costs its user, and its error.

Each as it is; our own, at the shape of the targets, by every exact engine that runs here.

"kept" is a call as most of a run are: it takes what earlier calls left, the orders of heads or a
plan. "fresh" is one that makes all of that. Engine and blocks are those of the call, and its engine
stands in the name. The error is of the output against the oracle of the call's own plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from gpu_bench import Bench, blank, inputs, unit, waits
from gpu_cases import SHAPES, TINY, Shape, work
from gpu_decide import SHAPE
from gpu_results import Machine
from gpu_rows import Result
from gpu_units import Unit
from gpu_ways import here, runs
from sampled import sampled_error

from vidsparse.config import SparseConfig, presets
from vidsparse.memory import Memory

OWN = ("balanced", "fast", "quality", "tiles")
"""Those that are measured at every shape; the others at one that is small."""

SMALL = "wan2.1-1.3b-480p"
OTHERS = ("hunyuanvideo-720p", "cogvideox-5b")
DRY = ("balanced", "rectified", "tiles")


def units(machine: Machine) -> Iterator[Unit]:
    """Our own at the shape of the targets, every one at a small shape, our own at others."""
    if machine.dry:
        for name in DRY:
            yield preset_unit(machine, TINY, name)
        return
    for name in OWN:
        for engine in dict.fromkeys(one.engine for one in here(machine)):
            yield preset_unit(machine, SHAPES[SHAPE], name, engine)
    for shape, names in ((SMALL, presets()), *((shape, OWN) for shape in OTHERS)):
        for name in names:
            yield preset_unit(machine, SHAPES[shape], name)


def preset_unit(machine: Machine, shape: Shape, name: str, engine: str = "auto") -> Unit:
    """The calls of one preset on tokens that stand in the base order of its layout."""
    config = SparseConfig.load(name, ["schedule.min_tokens=0", "kernel.impl=triton"])
    config = replace(config, kernel=replace(config.kernel, engine=engine))
    density = float(getattr(config.schedule, "density", 0.0))
    impl = f"{name} by {runs(config, machine.device, shape.head_dim)}"

    def act(this: Bench) -> Iterator[Result]:
        from vidsparse.attention import attend

        memory = Memory()
        how: dict[str, Any] = {"grid": shape.grid, "config": config, "hoisted": True}
        kept = partial(attend, *inputs(this), **how, recall=memory.of(1))
        acts: dict[str, Callable[[], Any]] = {
            "fresh": lambda: made(memory, partial(attend, *inputs(this), **how)),
            "kept": kept,
        }
        found = {stage: judged(this, run()) for stage, run in acts.items()}
        times = this.beside_dense(acts)
        for stage, run in acts.items():
            tflop, error, sizes = found[stage]
            row = this.row(density, impl, stage, times[stage], tflop, times.get("dense"), error)
            row.blocks = sizes
            row.message = waits(this, run)
            yield row

    row = blank(shape, density, impl, "kept")
    return unit(machine, shape, row, act, f"preset {name}", "presets")


def judged(this: Bench, result: Any) -> tuple[float, float, str]:
    """Kept work in TFLOP, the sampled error of a call, its blocks."""
    if result.plan is None:
        raise ValueError("the call went dense")
    error = sampled_error(*this.qkv, result.out.transpose(1, 2), result.plan)
    sizes = result.plan.q_blocks.size, result.plan.k_blocks.size
    return work(result.plan, this.shape.head_dim), error, "x".join(map(str, sizes))


def made(memory: Memory, call: Callable[..., Any]) -> Any:
    """A call that finds nothing, and leaves what the next ones take."""
    memory.clear()
    return call(recall=memory.of(0))
