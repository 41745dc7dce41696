"""What the timings of the GPU suite share: inputs of a shape, rows, plans, and whole calls.

Every timing is a unit of its own, in turn with the fastest dense attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import torch
from gpu_cases import QKV, SIZES, Shape, exact_plan, method, name_of, random_qkv
from gpu_dense import Flex, dense_act, dense_names
from gpu_graphs import no_wait
from gpu_results import Machine, facts, interleaved, seed, speedup, spread
from gpu_rows import Result
from gpu_units import Unit, in_words
from sampled import sampled_error
from torch import Tensor

from vidsparse.plan import BlockPlan

SECONDS = 1.0
"""Timed rounds of one unit."""

FILES = {"forms": "gpu_forms", "presets": "gpu_presets", "tune": "gpu_tune"}
"""Part -> name of its CSV, where it is not that of the bench."""

Sizes = tuple[int, int]


@dataclass
class Bench:
    """One shape on one machine. dense: name of the fastest dense backend that runs, "" if none."""

    machine: Machine
    shape: Shape
    qkv: QKV
    dense: str = ""
    dense_act: Callable[[], Tensor] | None = None
    flex: Flex | None = None
    plans: dict[tuple[float, Sizes], BlockPlan] = field(default_factory=dict)

    def row(
        self,
        density: float,
        impl: str,
        stage: str,
        times: list[float],
        tflop: float | None = None,
        dense: list[float] | None = None,
        error: float | None = None,
        sizes: Sizes | None = None,
    ) -> Result:
        """One line. tflop: kept work; dense: times of the same rounds."""
        low, middle, high = spread(times)
        return replace(
            blank(self.shape, density, impl, stage, self.qkv[0].dtype, sizes),
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
    shape: Shape,
    density: float,
    impl: str,
    stage: str,
    dtype: torch.dtype = torch.bfloat16,
    sizes: Sizes | None = None,
) -> Result:
    """A row without times. sizes: tokens of a query and of a key block."""
    return Result(
        **facts(), shape=shape.name, tokens=shape.grid.tokens, heads=shape.heads,
        head_dim=shape.head_dim, dtype=name_of(dtype), density=density, impl=impl, stage=stage,
        blocks="x".join(map(str, sizes)) if sizes else "",
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
    part: str,
    limit: float = 90.0,
) -> Unit:
    """The unit of a timing. row: what is saved if it fails. act: is given the shape's bench."""
    sizes = f", blocks {row.blocks}" if row.blocks else ""
    name = f"{part}: {shape.name}, d {row.density:g}, {row.impl}, {row.stage}{sizes}"
    dtype = getattr(torch, row.dtype)

    def run() -> Iterator[Result]:
        seed(name)
        try:
            yield from act(bench_of(machine, shape, dtype))
        except BaseException:
            bench_of.cache_clear()  # may hold what the failure spoiled, or the memory it lacked
            raise

    large = 0.0 if machine.dry else 2.5 if shape.grid.tokens > 60_000 else 1.5
    return Unit(name, row, run, FILES.get(part, "gpu_bench"), family, large, limit)


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


def waits(this: Bench, run: Callable[[], Any]) -> str:
    """In words that a call waits for the device; empty if it does not."""
    if this.machine.dry:
        return ""
    try:
        no_wait(run)
    except RuntimeError as error:
        return f"waits for the device: {in_words(error)}"
    return ""


def plan_at(this: Bench, density: float, sizes: Sizes = SIZES[0]) -> BlockPlan:
    """The plan of the default method; all blocks at density 1, where the method is dense."""
    key = density, sizes
    if key not in this.plans:
        this.plans[key] = _plan_at(this, density, sizes)
    return this.plans[key]


def _plan_at(this: Bench, density: float, sizes: Sizes) -> BlockPlan:
    from vidsparse.attention import attend

    if density == 1:
        return exact_plan(this.shape, 1.0, sizes, this.machine.device, coherent=True)
    config = method(density, sizes)
    plan = attend(*inputs(this), grid=this.shape.grid, config=config, hoisted=True).plan
    if plan is None:
        raise ValueError(f"the call at density {density} went dense")
    return plan


def inputs(this: Bench) -> list[Tensor]:
    """q, k, v [B, S, H, D]."""
    return [x.transpose(1, 2) for x in this.qkv]


def geometry_of(this: Bench, config: Any) -> Any:
    """What a method's layout says of the shape."""
    from vidsparse.geometry import plan_geometry

    sizes = config.kernel.block_q, config.kernel.block_k
    grid = this.shape.grid
    return plan_geometry(grid, config.layout, config.force, *sizes, this.machine.device)


def order_of(this: Bench, density: float) -> Tensor:
    """int64 [S], the order of the default method's layout."""
    order: Tensor = geometry_of(this, method(density)).order
    return order
