"""Speed of the exact tiles and of the whole operator against dense attention, errors beside it.

"sparse" is an engine over the listed full blocks alone, from the plan to (O, LSE), the work that
FlexAttention does with the same mask; "whole" is the public call on tokens in layout order,
everything counted; "raster" the same on tokens in raster order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from gpu_bench import (
    Bench,
    Sizes,
    blank,
    inputs,
    order_of,
    plan_at,
    unit,
    waits,
    whole_call,
)
from gpu_bench_stages import STAGES, stage_unit
from gpu_cases import SHAPES, SIZES, TINY, Shape, exact_plan, full_blocks, method, work
from gpu_decide import AROUND, DENSITIES, SHAPE
from gpu_dense import Flex, dense_act, dense_names
from gpu_results import Machine, interleaved
from gpu_rows import Result
from gpu_units import Unit
from gpu_ways import Way, exact, here, levels
from sampled import sampled_error

from vidsparse.plan import SKIP

OTHERS = (0.3, 0.05, 0.5)
"""Densities of the first shape beside the table."""


def table(machine: Machine) -> Iterator[Unit]:
    """Wan 2.1 14B: dense, every engine at every size of blocks, and what else the targets need."""
    shape = TINY if machine.dry else SHAPES[SHAPE]
    for name in dense_names(machine.device):
        yield dense_unit(machine, shape, name, "table")
    for density in DENSITIES:
        for one in here(machine):
            for sizes in one.sizes(machine, shape.head_dim)[: 1 if machine.dry else None]:
                yield from engine_units(machine, shape, density, one, sizes, "table")
    first, second, _ = DENSITIES
    yield int8_unit(machine, shape, second, "table")
    for name in AROUND:
        yield stage_unit(machine, shape, first, name, "table")
    if not machine.dry:
        yield flex_unit(machine, shape, second, "table")


def shapes(machine: Machine) -> Iterator[Unit]:
    """Other models, then other densities, tokens in raster order, the stages."""
    if machine.dry:
        yield from one_shape(machine, replace(TINY, name="tiny, other"), (0.5,))
        yield from stage_units(machine, TINY, (0.3,))
        return
    large = SHAPES[SHAPE]
    for name in ("wan2.1-1.3b-480p", "hunyuanvideo-720p", "cogvideox-5b"):
        yield from one_shape(machine, SHAPES[name], (0.2,))
    for density in OTHERS:
        for one in here(machine):
            sizes = one.sizes(machine, large.head_dim)[0]
            yield call_unit(machine, large, density, one, sizes, "whole", "shapes")
    yield from stage_units(machine, large, (0.2,))


def one_shape(machine: Machine, shape: Shape, densities: tuple[float, ...]) -> Iterator[Unit]:
    """Dense attention of torch, then every engine at the first size of blocks that it takes."""
    for name in dense_names(machine.device)[:2]:
        yield dense_unit(machine, shape, name, "shapes")
    for density in densities:
        for one in here(machine):
            if taken := one.sizes(machine, shape.head_dim):
                yield call_unit(machine, shape, density, one, taken[0], "whole", "shapes")
        if not machine.dry:
            yield flex_unit(machine, shape, density, "shapes")
        for one in here(machine)[:1]:
            yield call_unit(machine, shape, density, one, SIZES[0], "raster", "shapes")


def stage_units(machine: Machine, shape: Shape, densities: tuple[float, ...]) -> Iterator[Unit]:
    """All stages, and the permutation that hoisting saves."""
    for density in densities:
        for name in STAGES:
            yield stage_unit(machine, shape, density, name, "shapes")
    yield permute_unit(machine, shape, "shapes")


def engine_units(
    machine: Machine, shape: Shape, density: float, one: Way, sizes: Sizes, part: str
) -> Iterator[Unit]:
    """An engine alone and, below density 1, in a whole call."""
    yield exact_unit(machine, shape, density, one, sizes, part)
    if density < 1:
        yield call_unit(machine, shape, density, one, sizes, "whole", part)


def dense_unit(machine: Machine, shape: Shape, name: str, part: str) -> Unit:
    """One dense backend alone."""

    def act(this: Bench) -> Iterator[Result]:
        dense = dense_act(name, *this.qkv)
        every = exact_plan(shape, 1.0, SIZES[0], machine.device, coherent=True)
        error = sampled_error(*this.qkv, dense(), every, blocks=2)
        times = this.beside_dense({name: dense})
        yield this.row(1.0, name, "whole", times[name], work(every, shape.head_dim),
                       times.get("dense"), error)  # fmt: skip

    return unit(machine, shape, blank(shape, 1.0, name, "whole"), act, name, part)


def permute_unit(machine: Machine, shape: Shape, part: str) -> Unit:
    """Four permutations in torch: what a call in raster order would cost without the gather."""

    def act(this: Bench) -> Iterator[Result]:
        order = order_of(this, 0.2)
        tokens = [*inputs(this), inputs(this)[0]]
        acts = {"permute": lambda: [x.index_select(1, order) for x in tokens]}
        times = interleaved(acts, machine, 0.3)
        yield this.row(1.0, "torch", "permute", times["permute"])

    return unit(machine, shape, blank(shape, 1.0, "torch", "permute"), act, "permute", part)


def exact_unit(
    machine: Machine, shape: Shape, density: float, one: Way, sizes: Sizes, part: str
) -> Unit:
    """The listed full blocks of the default method's plan."""

    def act(this: Bench) -> Iterator[Result]:
        ready = exact(one, *this.qkv, plan_at(this, density, sizes))
        error = sampled_error(*this.qkv, ready.run(), ready.plan)
        yield from timed(this, ready.run, density, one.name, "sparse",
                         work(ready.plan, shape.head_dim), error, sizes)  # fmt: skip

    row = blank(shape, density, one.name, "sparse", sizes=sizes)
    return unit(machine, shape, row, act, one.name, part)


def call_unit(
    machine: Machine, shape: Shape, density: float, one: Way, sizes: Sizes, stage: str, part: str
) -> Unit:
    """The public call on tokens in layout order, "whole", or in "raster" order."""

    def act(this: Bench) -> Iterator[Result]:
        config = method(density, sizes, kernel__engine=one.engine, kernel__form=one.form)
        run, plan, error = whole_call(this, config, hoisted=stage == "whole")
        tflop = work(plan, shape.head_dim)
        yield from timed(this, run, density, one.name, stage, tflop, error, sizes)

    row = blank(shape, density, one.name, stage, sizes=sizes)
    return unit(machine, shape, row, act, one.name, part)


def int8_unit(machine: Machine, shape: Shape, density: float, part: str) -> Unit:
    """The listed blocks with products in 8 bits."""

    def act(this: Bench) -> Iterator[Result]:
        plan = full_blocks(plan_at(this, density))
        ready = levels(*this.qkv, plan, int8=True)
        error = sampled_error(*this.qkv, ready.run(), plan)
        tflop = work(plan, shape.head_dim)
        yield from timed(this, ready.run, density, "triton-int8", "sparse", tflop, error, SIZES[0])

    row = blank(shape, density, "triton-int8", "sparse", sizes=SIZES[0])
    return unit(machine, shape, row, act, "triton-int8", part)


def timed(
    this: Bench,
    run: Callable[[], Any],
    density: float,
    impl: str,
    stage: str,
    tflop: float,
    error: float,
    sizes: Sizes,
) -> Iterator[Result]:
    """The row of a sparse act, in turn with dense attention; again, if it waits for the device."""
    times = this.beside_dense({stage: run})
    row = this.row(density, impl, stage, times[stage], tflop, times.get("dense"), error, sizes)
    yield row
    if why := waits(this, run):
        yield replace(row, message=why)


def flex_unit(machine: Machine, shape: Shape, density: float, part: str) -> Unit:
    """FlexAttention with the mask of the plan; compiled once per shape."""

    def act(this: Bench) -> Iterator[Result]:
        plan = plan_at(this, density).with_rest(SKIP)
        if this.flex is None:
            this.flex = Flex(*this.qkv, plan.q_blocks, plan.k_blocks)
        run = this.flex.act(plan)
        error = sampled_error(*this.qkv, this.flex.tokens(run()), plan)
        times = this.beside_dense({"flex": run})
        yield this.row(density, "flex", "sparse", times["flex"], work(plan, shape.head_dim),
                       times.get("dense"), error, SIZES[0])  # fmt: skip

    row = blank(shape, density, "flex", "sparse", sizes=SIZES[0])
    return unit(machine, shape, row, act, "flex", part, limit=180.0)
