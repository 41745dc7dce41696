"""Speed of the sparse forward and of the whole operator against dense attention, errors beside it.

"sparse" is the forward over the exact blocks alone, the work that FlexAttention does with the same
mask; "whole" is the public call on tokens in layout order, everything counted; "raster" the same on
tokens in raster order, which the kernels gather and scatter. Every timing is a unit of its own,
in turn with the fastest dense attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from gpu_cases import (
    DENSITIES,
    QKV,
    SHAPES,
    TINY,
    Shape,
    exact_plan,
    method,
    name_of,
    prepare,
    random_qkv,
    sampled_error,
    work,
)
from gpu_dense import Flex, dense_act, dense_names
from gpu_results import Machine, facts, interleaved, seed, speedup, spread
from gpu_rows import Result
from gpu_units import Unit, in_words
from torch import Tensor

from vidsparse.plan import SKIP, BlockPlan

MAIN = ("wan2.1-14b-720p", "wan2.1-1.3b-480p")
OTHERS = ("cogvideox-5b", "hunyuanvideo-720p")
HEADLINE = (0.1, 0.2)
"""Densities that come right behind the first checks, for the first shape."""

INT8_DENSITIES = (0.2, 1.0)
SECONDS = 1.5
"""Timed rounds of one unit."""


def units(machine: Machine, main: bool) -> list[Unit]:
    """Of the main shapes, or of the others."""
    from gpu_bench_stages import STAGES, stage_unit

    tiny = TINY if main else replace(TINY, name="tiny, other")
    shapes = [tiny] if machine.dry else [SHAPES[name] for name in (MAIN if main else OTHERS)]
    densities = ((0.3,) if main else (1.0,)) if machine.dry else DENSITIES
    found = []
    for n, shape in enumerate(shapes):
        best = main and n == 0
        for name in dense_names(machine.device):
            found.append(dense_unit(machine, shape, name, 1 if best else 4))
        for density in densities:
            rank = 1 if best and (density in HEADLINE or machine.dry) else 4 if main else 7
            rounded = density in INT8_DENSITIES or machine.dry
            timed = partial(forward_unit, machine, shape, density)
            for form in machine.forms:
                found.append(timed(form, "sparse", rank=rank))
                if density < 1:
                    found.append(timed(form, "whole", rank=rank))
                if machine.dry and form != "pointer":
                    continue
                if rounded:
                    found.append(timed(form, "sparse", qk="int8", rank=rank + 1))
                if rounded and density < 1:
                    found.append(timed(form, "whole", qk="int8", rank=rank + 1))
                    found.append(timed(form, "raster", rank=rank + 1))
            if not machine.dry:
                found.append(flex_unit(machine, shape, density, rank + 1))
            found += [stage_unit(machine, shape, density, name, rank + 1) for name in STAGES
                      if density < 1 or name in ("lists", "fill", "quantise")
                      if rounded or name != "quantise"]  # fmt: skip
        found.append(permute_unit(machine, shape, 4 if main else 7))
    return found


@dataclass
class Bench:
    """One shape on one machine. dense: name of the fastest dense backend that runs, "" if none."""

    machine: Machine
    shape: Shape
    qkv: QKV
    dense: str = ""
    dense_act: Callable[[], Tensor] | None = None
    flex: Flex | None = None
    plans: dict[float, BlockPlan] = field(default_factory=dict)

    def row(
        self,
        density: float,
        impl: str,
        stage: str,
        times: list[float],
        tflop: float | None = None,
        dense: list[float] | None = None,
        error: float | None = None,
    ) -> Result:
        """One line. tflop: kept work; dense: times of the same rounds."""
        low, middle, high = spread(times)
        return replace(
            blank(self.shape, density, impl, stage, self.qkv[0].dtype),
            ms_p20=low, ms_p50=middle, ms_p80=high,
            tflops=None if tflop is None else round(tflop / middle * 1e3, 1),
            dense_impl=self.dense if dense else None,
            speedup_vs_dense=speedup(dense, times) if dense else None,
            rel_l2=None if error is None else float(f"{error:.2e}"),
        )  # fmt: skip

    def beside_dense(
        self, acts: dict[str, Callable[[], Any]], seconds: float = SECONDS
    ) -> dict[str, list[float]]:
        """Times of acts, and of dense attention under "dense", in turn; alone where none runs."""
        every = dict(acts) if self.dense_act is None else {"dense": self.dense_act, **acts}
        return interleaved(every, self.machine, seconds, 30)


def blank(
    shape: Shape, density: float, impl: str, stage: str, dtype: torch.dtype = torch.bfloat16
) -> Result:
    """A row without times."""
    return Result(
        **facts(), shape=shape.name, tokens=shape.grid.tokens, heads=shape.heads,
        head_dim=shape.head_dim, dtype=name_of(dtype), density=density, impl=impl, stage=stage,
    )  # fmt: skip


@lru_cache(maxsize=1)
def bench_of(machine: Machine, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Bench:
    """Inputs of a shape and the fastest dense attention; kept for the units that follow."""
    this = Bench(machine, shape, random_qkv(shape, machine.device, dtype))
    acts: dict[str, Callable[[], Tensor]] = {}
    for name in dense_names(machine.device):
        if name in machine.broken:
            continue
        try:
            act = dense_act(name, *this.qkv)
            act()
            machine.settle()
            acts[name] = act
        except Exception as error:
            if not machine.healthy(error):
                raise
            print(f"no {name} for {shape.name}: {in_words(error)}")
    if acts:
        times = interleaved(acts, machine, 0.5, 5)
        this.dense = min(acts, key=lambda name: spread(times[name])[1])
        this.dense_act = acts[this.dense]
    return this


def unit(
    machine: Machine,
    shape: Shape,
    row: Result,
    act: Callable[[Bench], Iterator[Result]],
    family: str,
    rank: int,
    part: str = "bench",
    limit: float = 90.0,
) -> Unit:
    """The unit of a timing. row: what is saved if it fails. act: is given the shape's bench."""
    name = f"{part}: {shape.name}, d {row.density:g}, {row.impl}, {row.stage}"
    dtype = getattr(torch, row.dtype)

    def run() -> Iterator[Result]:
        seed(name)
        try:
            yield from act(bench_of(machine, shape, dtype))
        except BaseException:
            bench_of.cache_clear()  # may hold what the failure spoiled, or the memory it lacked
            raise

    large = 0.0 if machine.dry else 12.0 if shape.grid.tokens > 60_000 else 6.0
    return Unit(name, row, run, f"gpu_{part}", family, rank, large, limit)


def dense_unit(machine: Machine, shape: Shape, name: str, rank: int) -> Unit:
    """One dense backend alone."""

    def act(this: Bench) -> Iterator[Result]:
        dense = dense_act(name, *this.qkv)
        every = exact_plan(shape, 1.0, (128, 64), machine.device, coherent=True)
        error = sampled_error(*this.qkv, dense(), every, blocks=2)
        times = this.beside_dense({name: dense})
        yield this.row(1.0, name, "whole", times[name], work(every, shape.head_dim),
                       times.get("dense"), error)  # fmt: skip

    return unit(machine, shape, blank(shape, 1.0, name, "whole"), act, name, rank)


def permute_unit(machine: Machine, shape: Shape, rank: int) -> Unit:
    """Four permutations in torch: what a call in raster order would cost without the gather."""

    def act(this: Bench) -> Iterator[Result]:
        order = order_of(this, 0.2)
        tokens = [*inputs(this), inputs(this)[0]]
        acts = {"permute": lambda: [x.index_select(1, order) for x in tokens]}
        times = interleaved(acts, machine, 0.3)
        yield this.row(1.0, "torch", "permute", times["permute"])

    return unit(machine, shape, blank(shape, 1.0, "torch", "permute"), act, "permute", rank)


def forward_unit(
    machine: Machine,
    shape: Shape,
    density: float,
    form: str,
    stage: str,
    qk: str = "native",
    rank: int = 4,
) -> Unit:
    """Sparse forward, or whole operator on tokens in layout or in raster order, in one form."""
    impl = f"triton-{form}" + ("-int8" if qk == "int8" else "")

    def act(this: Bench) -> Iterator[Result]:
        if stage == "sparse":
            plan = plan_at(this, density).with_rest(SKIP)
            ready = prepare(*this.qkv, plan, form, int8=qk == "int8")
            run: Callable[[], Any] = ready.forward
            error = sampled_error(*this.qkv, run(), plan)
        else:
            config = method(density, kernel__form=form, kernel__qk=qk)
            run, plan, error = whole_call(this, config, hoisted=stage == "whole")
        times = this.beside_dense({stage: run})
        tflop = work(plan, shape.head_dim)
        yield this.row(density, impl, stage, times[stage], tflop, times.get("dense"), error)

    return unit(machine, shape, blank(shape, density, impl, stage), act, form, rank)


def whole_call(
    this: Bench, config: Any, hoisted: bool
) -> tuple[Callable[[], Any], BlockPlan, float]:
    """The public call, its plan, and the error of its output against the oracle of the plan."""
    from vidsparse.attention import attend

    act = partial(attend, *inputs(this), grid=this.shape.grid, config=config, hoisted=hoisted)
    result = act()
    if result.plan is None:
        raise ValueError("the call went dense")
    tensors = *this.qkv, result.out.transpose(1, 2)
    if not hoisted:
        order = geometry_of(this, config).order
        tensors = tuple(x.index_select(2, order) for x in tensors)
    return act, result.plan, sampled_error(*tensors, result.plan)


def flex_unit(machine: Machine, shape: Shape, density: float, rank: int) -> Unit:
    """FlexAttention with the mask of the plan; compiled once per shape."""

    def act(this: Bench) -> Iterator[Result]:
        plan = plan_at(this, density).with_rest(SKIP)
        if this.flex is None:
            this.flex = Flex(*this.qkv, plan.q_blocks, plan.k_blocks)
        flex = this.flex
        run = flex.act(plan)
        error = sampled_error(*this.qkv, flex.tokens(run()), plan)
        times = this.beside_dense({"flex": run})
        yield this.row(density, "flex", "sparse", times["flex"], work(plan, shape.head_dim),
                       times.get("dense"), error)  # fmt: skip

    row = blank(shape, density, "flex", "sparse")
    return unit(machine, shape, row, act, "flex", rank, limit=180.0)


def plan_at(this: Bench, density: float) -> BlockPlan:
    """The plan of the default method; all blocks at density 1, where the method is dense."""
    if density not in this.plans:
        this.plans[density] = _plan_at(this, density)
    return this.plans[density]


def _plan_at(this: Bench, density: float) -> BlockPlan:
    from vidsparse.attention import attend

    config, grid = method(density), this.shape.grid
    if density == 1:
        sizes = blocks_of(this, config)
        return exact_plan(this.shape, 1.0, sizes, this.machine.device, coherent=True)
    forms = [f for f in this.machine.forms if f not in this.machine.broken]
    config = method(density, kernel__form=forms[0] if forms else "pointer")
    plan = attend(*inputs(this), grid=grid, config=config, hoisted=True).plan
    if plan is None:
        raise ValueError(f"the call at density {density} went dense")
    return plan


def inputs(this: Bench) -> list[Tensor]:
    """q, k, v [B, S, H, D]."""
    return [x.transpose(1, 2) for x in this.qkv]


def geometry_of(this: Bench, config: Any) -> Any:
    """What a method's layout says of the shape."""
    from vidsparse.geometry import plan_geometry

    grid = this.shape.grid
    sizes = blocks_of(this, config)
    return plan_geometry(grid, config.layout, config.force, *sizes, this.machine.device)


def blocks_of(this: Bench, config: Any) -> tuple[int, int]:
    """Tokens per query and per key block of a method for the shape."""
    from vidsparse.kernels.executor import Form
    from vidsparse.kernels.gpu.executor import EXECUTOR

    form = Form(config, this.shape.grid, this.machine.device)
    return EXECUTOR.query_block(form), config.kernel.block_k


def order_of(this: Bench, density: float) -> Tensor:
    """int64 [S], the order of the default method's layout."""
    order: Tensor = geometry_of(this, method(density)).order
    return order
