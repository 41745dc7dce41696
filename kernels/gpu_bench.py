"""Speed of the stages and of the whole operator against dense attention, the error beside it.

"sparse" is the forward over the exact blocks alone, the work that FlexAttention does with the same
mask; "compensate" is what the centroids in the same forward and the first-order term add to it;
"whole" is the public call on tokens in layout order, everything counted; "raster" the same on
tokens in raster order, which the kernels gather and scatter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
from gpu_dense import Flex, dense_acts
from gpu_results import Job, Machine, Result, facts, in_words, interleaved, speedup, spread
from torch import Tensor

from vidsparse.attention import attend
from vidsparse.config import SparseConfig
from vidsparse.geometry import plan_geometry
from vidsparse.kernels import triton_engine
from vidsparse.plan import SKIP, BlockPlan

MAIN = {"wan2.1-14b-720p": 100.0, "wan2.1-1.3b-480p": 45.0}
OTHERS = {"cogvideox-5b": 45.0, "hunyuanvideo-720p": 90.0}
"""Shape -> seconds that its bench takes."""

MAX_ERROR = {False: 5e-3, True: 3e-2}
"""Relative L2; the key says whether queries and keys are in int8."""

INT8_DENSITIES = (0.2, 1.0)
LEAST = 8.0
"""Seconds without which no density is begun."""

SECONDS = 1.5
"""Timed rounds of one density."""


def jobs(machine: Machine, main: bool) -> list[Job]:
    """A job per shape: the main ones, or the others."""
    if machine.dry:
        densities = (0.3,) if main else (1.0,)
        return [Job("bench: tiny", 0.0, lambda: bench(machine, TINY, densities), "gpu_bench")]
    names = MAIN if main else OTHERS
    return [
        Job(f"bench: {name}", time, partial(bench, machine, SHAPES[name], DENSITIES), "gpu_bench")
        for name, time in names.items()
    ]


@dataclass
class Bench:
    """One shape on one machine. dense: name of the fastest dense backend, its times beside."""

    machine: Machine
    shape: Shape
    qkv: QKV
    dense: str = ""
    dense_act: Callable[[], Tensor] | None = None
    flex: Flex | None = None

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
        shape = self.shape
        return Result(
            **facts(), shape=shape.name, tokens=shape.grid.tokens, heads=shape.heads,
            head_dim=shape.head_dim, dtype=name_of(self.qkv[0].dtype), density=density, impl=impl,
            stage=stage, ms_p20=low, ms_p50=middle, ms_p80=high,
            tflops=None if tflop is None else round(tflop / middle * 1e3, 1),
            dense_impl=self.dense if dense else None,
            speedup_vs_dense=speedup(dense, times) if dense else None,
            rel_l2=None if error is None else float(f"{error:.2e}"),
        )  # fmt: skip


def bench(machine: Machine, shape: Shape, densities: tuple[float, ...]) -> Iterator[Result]:
    """All rows of a shape."""
    this = Bench(machine, shape, random_qkv(shape, machine.device))
    with torch.no_grad():
        yield from dense_rows(this)
        yield from layout_rows(this)
        for n, density in enumerate(densities):
            if machine.left < LEAST and not machine.dry:
                raise TimeoutError(f"dropped for lack of time: densities {densities[n:]}")
            yield from density_rows(this, density)


def dense_rows(this: Bench) -> Iterator[Result]:
    """Every dense backend; notes the fastest."""
    acts = dense_acts(*this.qkv)
    every = exact_plan(this.shape, 1.0, (128, 64), this.machine.device, coherent=True)
    times = interleaved(acts, this.machine, SECONDS, 20)
    this.dense = min(acts, key=lambda name: spread(times[name])[1])
    this.dense_act = acts[this.dense]
    for name, act in acts.items():
        error = sampled_error(*this.qkv, act(), every, blocks=2)
        tflop = work(every, this.shape.head_dim)
        yield this.row(1.0, name, "whole", times[name], tflop, times[this.dense], error)


def layout_rows(this: Bench) -> Iterator[Result]:
    """Four permutations in torch: what a call in raster order would cost without the gather."""
    order = order_of(this, method(0.2))
    tokens = [*inputs(this), inputs(this)[0]]
    acts = {"permute": lambda: [x.index_select(1, order) for x in tokens]}
    times = interleaved(acts, this.machine, 0.3)
    yield this.row(1.0, "torch", "permute", times["permute"])
    yield this.row(1.0, "hoisted", "permute", [0.0])


def density_rows(this: Bench, density: float) -> Iterator[Result]:
    """Sparse forward and whole operator in every form, FlexAttention, and the stages."""
    timed = timed_acts(this, density)
    acts = {name: one.act for name, one in timed.items()}
    assert this.dense_act is not None
    times = interleaved({("dense", ""): this.dense_act, **acts}, this.machine, SECONDS, 30)
    for (impl, stage), one in timed.items():
        taken = times[impl, stage]
        yield this.row(density, impl, stage, taken, one.tflop, times["dense", ""], one.error)
    middle = {key: spread(taken)[1] for key, taken in times.items()}
    ran = [form for form in this.machine.forms if (f"triton-{form}", "sparse") in timed]
    form = min(ran, key=lambda name: middle[f"triton-{name}", "sparse"])
    yield from stage_rows(this, density, plan_at(this, density), form)


@dataclass(frozen=True)
class Timed:
    """Something to time: TFLOP of kept work and error of its output."""

    act: Callable[[], Any]
    tflop: float
    error: float


def plan_at(this: Bench, density: float) -> BlockPlan:
    """The plan of the default method; all blocks at density 1, where the method is dense."""
    config, grid = method(density), this.shape.grid
    if density == 1:
        sizes = config.kernel.query_block(grid.tokens), config.kernel.block_k
        return exact_plan(this.shape, 1.0, sizes, this.machine.device, coherent=True)
    plan = attend(*inputs(this), grid=grid, config=config, hoisted=True).plan
    assert plan is not None
    return plan


def inputs(this: Bench) -> list[Tensor]:
    """q, k, v [B, S, H, D]."""
    return [x.transpose(1, 2) for x in this.qkv]


def timed_acts(this: Bench, density: float) -> dict[tuple[str, str], Timed]:
    """What is timed in turn with dense attention at one density: (impl, stage) -> act."""
    plan = plan_at(this, density)
    timed: dict[tuple[str, str], Timed] = {}
    for form in this.machine.forms:
        try:
            timed |= form_acts(this, density, plan, form)
        except (RuntimeError, ValueError) as error:
            print(f"no {form} at density {density}: {in_words(error)}")
    exact = plan.with_rest(SKIP)
    if flex := flex_act(this, exact):
        timed["flex", "sparse"] = Timed(flex[0], work(exact, this.shape.head_dim), flex[1])
    return timed


def form_acts(
    this: Bench, density: float, plan: BlockPlan, form: str
) -> dict[tuple[str, str], Timed]:
    """Sparse forward, also in int8, and whole operator in one form."""
    exact = plan.with_rest(SKIP)
    kept, all_kept = (work(p, this.shape.head_dim) for p in (exact, plan))
    acts = {}
    for qk in ("native", "int8") if rounds(this, density) else ("native",):
        impl = f"triton-{form}" + ("-int8" if qk == "int8" else "")
        ready = prepare(*this.qkv, exact, form, int8=qk == "int8")
        error = sampled_error(*this.qkv, ready.forward(), exact)
        acts[impl, "sparse"] = Timed(ready.forward, kept, error)
        if density < 1:
            config, grid = method(density, kernel__form=form, kernel__qk=qk), this.shape.grid
            whole = partial(attend, *inputs(this), grid=grid, config=config, hoisted=True)
            error = sampled_error(*this.qkv, whole().out.transpose(1, 2), plan)
            acts[impl, "whole"] = Timed(whole, all_kept, error)
            if qk == "native" and rounds(this, density):
                acts[impl, "raster"] = raster_act(this, config)
    return acts


def raster_act(this: Bench, config: SparseConfig) -> Timed:
    """The public call on tokens in raster order."""
    act = partial(attend, *inputs(this), grid=this.shape.grid, config=config)
    result = act()
    assert result.plan is not None
    order = order_of(this, config)
    ordered = [x.index_select(2, order) for x in (*this.qkv, result.out.transpose(1, 2))]
    error = sampled_error(*ordered, result.plan)
    return Timed(act, work(result.plan, this.shape.head_dim), error)


def order_of(this: Bench, config: SparseConfig) -> Tensor:
    """int64 [S], the order of a method's layout."""
    grid = this.shape.grid
    sizes = config.kernel.query_block(grid.tokens), config.kernel.block_k
    device = this.machine.device
    return plan_geometry(grid, config.layout, config.force, *sizes, device).order


def rounds(this: Bench, density: float) -> bool:
    """Whether int8 is timed at this density."""
    return density in INT8_DENSITIES or this.machine.dry


def flex_act(this: Bench, plan: BlockPlan) -> tuple[Callable[[], Tensor], float] | None:
    """FlexAttention with the mask of a plan and its error; None where it does not run."""
    if this.machine.dry:
        return None
    try:
        if this.flex is None:
            this.flex = Flex(*this.qkv, plan.q_blocks, plan.k_blocks)
        act = this.flex.act(plan)
        return act, sampled_error(*this.qkv, this.flex.tokens(act()), plan)
    except Exception as error:
        print(f"no FlexAttention: {in_words(error)}")
        return None


def stage_rows(this: Bench, density: float, plan: BlockPlan, form: str) -> Iterator[Result]:
    """Everything around the sparse forward, each alone."""
    times = interleaved(stage_acts(this, density, plan, form), this.machine, 0.7)
    if "with rest" in times:
        added = zip(times["with rest"], times["without rest"], times["first order"], strict=True)
        times["compensate"] = [more - less + after for more, less, after in added]
    for name in ("with rest", "without rest", "first order"):
        times.pop(name, None)
    for name, taken in times.items():
        yield this.row(density, "triton", name, taken)


def stage_acts(
    this: Bench, density: float, plan: BlockPlan, form: str
) -> dict[str, Callable[[], Any]]:
    """The stages of a call as `vidsparse.attention` strings them together."""
    from vidsparse.kernels import triton_draft, triton_pool, triton_quant, triton_select

    q, k, v = this.qkv
    device = this.machine.device
    config = method(density)
    full, bare = prepare(q, k, v, plan, form), prepare(q, k, v, plan.with_rest(SKIP), form)
    layout = triton_engine.layout_for(plan, full.shape.block_n, device)
    acts: dict[str, Callable[[], Any]] = {
        "lists": partial(triton_engine.lists_for, plan, layout, full.shape.block_n),
        "fill": partial(triton_engine.fill, k, v, layout),
    }
    if rounds(this, density):
        operands = q, full.keys, full.rows, full.shape
        acts["quantise"] = partial(triton_quant.int8_operands, *operands)
    if density == 1:
        return acts
    cuts = [triton_engine.query_rows(blocks, device) for blocks in (plan.q_blocks, plan.k_blocks)]

    def pool() -> list[Tensor]:
        means = triton_pool.block_means
        return [means(x, c.start, c.count, c.size) for x, c in zip((q, k), cuts, strict=True)]

    (q_means, k_means), (q_cut, k_cut) = pool(), cuts
    scale = q.shape[3] ** -0.5
    counts = q_cut.count, k_cut.count
    draft = partial(triton_draft.draft_scores, q_means, k_means, *counts, 1, scale)
    sizes = plan.q_blocks.size, plan.k_blocks.size
    forced = plan_geometry(this.shape.grid, config.layout, config.force, *sizes, device).forced
    kept = max(1, int(density * len(plan.k_blocks) + 1e-9))
    select = partial(triton_select.select_topk, draft(), forced, kept)
    acts |= {"pool": pool, "draft": draft, "select": select}
    if full.rest is not None:
        acts |= {"with rest": full.forward, "without rest": bare.forward}
        full.forward()
        scratch = full.out.clone(memory_format=torch.preserve_format)
        first_order = triton_engine.first_order
        acts["first order"] = partial(first_order, q, k, v, plan, full.rest, scratch)
    return acts
