"""Correctness on a GPU, against float64: every form of the sparse forward, the kernels around it.

Every output buffer starts as NaN: what a kernel does not write is found.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import inf, nan
from typing import Any

import torch
from gpu_cases import QKV, Shape, method, name_of, sampled_error
from gpu_results import Check, Job, Machine, facts, in_words
from torch import Tensor

from vidsparse.attention import attend
from vidsparse.kernels import reference, triton_engine
from vidsparse.plan import SKIP, BlockPlan, Blocks, TokenGrid

LIMITS = {torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""Relative L2 of the output."""

LSE_LIMIT = 1e-4
"""Absolute, for plans of exact blocks: means are rounded to the dtype of the input."""

INT8_LIMIT = 2e-2
GRIDS = {
    "ragged": TokenGrid(2, 9, 13, 41),
    "text first": TokenGrid(2, 9, 13, 41, True),
    "no text": TokenGrid(1, 1, 337),
    "one token": TokenGrid(1, 1, 1),
}
FAR = Shape("wan2.1-14b-720p x 2, fused QKV", TokenGrid(21, 45, 80), 40, 128)
"""Two of them in one tensor of queries, keys and values hold more than 2^31 elements."""

Act = Callable[[], float]


def jobs(machine: Machine) -> list[Job]:
    """The checks, the ones that everything else rests on first."""
    parts = [
        ("plans of every kind", 100.0, lambda: plans(machine)),
        ("every form", 100.0, lambda: forms(machine)),
        ("offsets past 2^31 elements", 40.0, lambda: far_offsets(machine)),
        ("stages", 60.0, lambda: stages(machine)),
        ("int8 QK", 40.0, lambda: int8(machine)),
    ]
    return [Job(f"check: {name}", time, act, "gpu_checks") for name, time, act in parts]


def compare(name: str, shape: str, dtype: torch.dtype, impl: str, limit: float, act: Act) -> Check:
    """Run a comparison; an exception is a verdict too."""
    error, message = nan, ""
    try:
        with poisoned():
            error = act()
    except Exception as caught:
        message = in_words(caught)
    verdict = "right" if error <= limit else "failed" if message else "wrong"
    kept = float(f"{error:.3e}")
    return Check(**facts(), check=name, shape=shape, dtype=name_of(dtype), impl=impl, error=kept,
                 limit=limit, verdict=verdict, message=message)  # fmt: skip


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def tokens(
    machine: Machine, plan: BlockPlan, depth: int, dtype: torch.dtype, kind: str = "random"
) -> QKV:
    """Views of [B, S, H, D] memory.

    "structured": neighbours are alike, and scores rise along the sequence.
    """
    batch, heads = plan.levels.shape[:2]
    sizes = batch, plan.q_blocks.tokens, heads, depth
    q, k, v = (torch.randn(sizes, device=machine.device) for _ in range(3))
    if kind == "structured":
        coarse = torch.randn(batch, sizes[1] // 8 + 1, heads, depth, device=machine.device)
        k = k * 0.3 + coarse.repeat_interleave(8, 1)[:, : sizes[1]]
        way = torch.nn.functional.normalize(torch.randn(depth, device=machine.device), dim=0)
        q = q * 0.5 + 3 * way
        k = k + torch.linspace(0, 40, sizes[1], device=machine.device)[:, None, None] * way
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    return q, k, v


def level_plan(
    machine: Machine, grid: str, sizes: tuple[int, int], kind: str, rest: str, batch: int = 1
) -> BlockPlan:
    """Random levels, "mixed" over all or "exact" ones, with an empty and a full row."""
    q_blocks, k_blocks = (Blocks.cut(GRIDS[grid], size) for size in sizes)
    shape = (batch, 2, len(q_blocks), len(k_blocks))
    levels = torch.randint(SKIP, k_blocks.levels + 1, shape)
    if kind == "exact":
        levels = torch.where(torch.rand(shape) < 0.3, 0, SKIP)
    levels[0, -1, -1] = 0
    levels[0, 0, 0] = SKIP
    levels = levels.to(machine.device, torch.int8)
    listed = (0,) if kind == "exact" else tuple(range(k_blocks.levels + 1))
    plan = BlockPlan.from_levels(levels, q_blocks, k_blocks, listed)
    if rest == "skip":
        return plan
    return plan.with_rest(k_blocks.levels, "global" if rest == "global" else "none")


def error_of(qkv: QKV, plan: BlockPlan, **how: Any) -> float:
    """Relative L2 of the output of the engine; infinite if an empty row or an LSE is wrong."""
    out, lse = triton_engine.execute(*qkv, plan, return_lse=True, **how)
    q, k, v = (x.double() for x in qkv)
    want, want_lse = reference.execute(q, k, v, plan)
    assert lse is not None and want_lse is not None
    empty = want_lse == -inf
    if not torch.equal(lse == -inf, empty) or bool(out[empty].any()):
        return inf
    exact = plan.listed == (0,) and plan.rest == SKIP and how.get("qk") != "int8"
    if exact and not bool(((lse - want_lse)[~empty].abs() <= LSE_LIMIT).all()):
        return inf
    return float((out.double() - want).norm() / want.norm())


def plans(machine: Machine) -> Iterator[Check]:
    """`triton_engine.execute` over dtypes, head dims, grids, block sizes, levels and rests."""
    half, full = (torch.bfloat16, 128), ((128, 64), "mixed", "global")
    cases: list[tuple[Any, ...]] = [
        *((torch.bfloat16, depth, "ragged", *full, 2) for depth in (64, 96, 128)),
        *((torch.float32, depth, "ragged", *full, 2) for depth in (64, 128)),
        (torch.float16, 128, "ragged", *full, 2),
        *((*half, grid, (128, 64), "exact", "skip", 1) for grid in GRIDS),
        *((*half, "text first", (128, 64), "mixed", rest, 1) for rest in ("skip", "centroid")),
        *((*half, "text first", (128, 64), "exact", rest, 1) for rest in ("centroid", "global")),
        *((*half, "ragged", (n, n), "mixed", "global", 1) for n in (16, 64, 128)),
    ]
    step = 6 if machine.dry else 1
    for dtype, depth, grid, sizes, kind, rest, batch in cases[::step]:
        plan = level_plan(machine, grid, sizes, kind, rest, batch)
        for data in ("random", "structured"):
            exact = (kind, rest) == ("exact", "skip")
            if data == "structured" and dtype != torch.float32 and not exact:
                continue  # sharp scores: rounding of the means alone is more than the limit
            qkv = tokens(machine, plan, depth, dtype, data)
            name = f"plan: {kind}, rest {rest}, blocks {sizes[0]}x{sizes[1]}, {data}"
            shape = f"{grid}, B {batch}, D {depth}"
            act = partial(error_of, qkv, plan)
            yield compare(name, shape, dtype, "engine", LIMITS[dtype], act)


def forms(machine: Machine) -> Iterator[Check]:
    """Each form with plain and shared tiles, with and without the share of the rest."""
    cases: list[tuple[Any, ...]] = [
        (torch.bfloat16, 128, "exact", "skip"),
        (torch.bfloat16, 128, "exact", "global"),
        (torch.bfloat16, 128, "mixed", "skip"),
        (torch.bfloat16, 64, "exact", "skip"),
        (torch.bfloat16, 96, "mixed", "global"),
        (torch.float16, 128, "mixed", "global"),
    ]
    for form in machine.forms:
        for dtype, depth, kind, rest in cases[:: 3 if machine.dry else 1]:
            plan = level_plan(machine, "ragged", (128, 64), kind, rest, batch=2)
            qkv = tokens(machine, plan, depth, dtype)
            name = f"form: {kind}, rest {rest}"
            shape = f"ragged, B 2, D {depth}"
            act = partial(error_of, qkv, plan, form=form)
            yield compare(name, shape, dtype, form, LIMITS[dtype], act)


def int8(machine: Machine) -> Iterator[Check]:
    """Keys with a common offset, which must cost nothing."""
    for form in machine.forms:
        for kind, rest in (("exact", "skip"), ("mixed", "global"))[: 1 if machine.dry else 2]:
            plan = level_plan(machine, "ragged", (128, 64), kind, rest)
            q, k, v = tokens(machine, plan, 128, torch.bfloat16)
            qkv = q, k + 2, v
            act = partial(error_of, qkv, plan, form=form, qk="int8")
            name = f"int8: {kind}, rest {rest}"
            yield compare(name, "ragged, D 128", torch.bfloat16, form, INT8_LIMIT, act)


def far_offsets(machine: Machine) -> Iterator[Check]:
    """Two videos at once in one tensor [B, S, 3, H, D], whose end lies past 2^31 elements."""
    shape = Shape("tiny", TokenGrid(1, 5, 31), 2, 128) if machine.dry else FAR
    stored = torch.empty(2, shape.grid.tokens, 3, shape.heads, shape.head_dim,
                         dtype=torch.bfloat16, device=machine.device)  # fmt: skip
    assert machine.dry or stored.numel() > 2**31
    stored.normal_()
    q, k, v = (x.transpose(1, 2) for x in stored.unbind(2))
    q_blocks, k_blocks = Blocks.cut(shape.grid, 128), Blocks.cut(shape.grid, 64)
    sizes = (2, shape.heads, len(q_blocks), len(k_blocks))
    drawn = torch.rand(sizes, device=machine.device) < 0.03
    plan = BlockPlan.from_levels(torch.where(drawn, 0, SKIP).to(torch.int8), q_blocks, k_blocks,
                                 (0,)).with_rest(k_blocks.levels, "global")  # fmt: skip
    for form in machine.forms:

        def act(form: str = form) -> float:
            out, _ = triton_engine.execute(q, k, v, plan, form=form)
            written = bool(out.isfinite().all())
            return sampled_error(q, k, v, out, plan, blocks=2) if written else inf

        yield compare("offsets", shape.name, torch.bfloat16, form, LIMITS[torch.bfloat16], act)


def stages(machine: Machine) -> Iterator[Check]:
    """Pooling, draft scores, selection, lists and moments."""
    dtypes = list(LIMITS)[-1:] if machine.dry else list(LIMITS)
    for grid in ("text first",) if machine.dry else ("ragged", "text first", "no text"):
        plan = level_plan(machine, grid, (128, 64), "mixed", "global", batch=2)
        for dtype in dtypes:
            q, k, v = tokens(machine, plan, 128, dtype, "structured")
            limit = LIMITS[dtype]
            acts: dict[str, tuple[float, Act]] = {
                "block means": (1e-6, partial(means_error, k, plan.k_blocks)),
                "key buffer": (limit, partial(buffer_error, k, plan)),
                "draft scores": (1e-5, partial(draft_error, q, k, plan, 1)),
                "draft of pieces": (1e-5, partial(draft_error, q, k, plan, 4)),
                "moment": (limit, partial(moment_error, k, v, plan)),
            }
            for name, (bound, act) in acts.items():
                yield compare(name, f"{grid}, B 2, D 128", dtype, "kernel", bound, act)
        yield compare("lists", grid, torch.int8, "kernel", 0.0, partial(lists_error, plan))
    for blocks in (33,) if machine.dry else (33, 257, 1182, 1861):
        for name, select in selections().items():
            for ties in (False, True):
                label = f"select: {name}{', ties' * ties}"
                act = partial(select, machine, blocks, ties)
                yield compare(label, f"{blocks} blocks", torch.float32, "kernel", 0.0, act)


def relative(found: Tensor, want: Tensor) -> float:
    """Relative L2 error."""
    return float((found.double() - want.double()).norm() / want.double().norm())


def means_error(x: Tensor, blocks: Blocks) -> float:
    from vidsparse.kernels.triton_pool import block_means

    rows = triton_engine.query_rows(blocks, x.device)
    return relative(block_means(x, rows.start, rows.count, rows.size), blocks.mean(x.double()))


def buffer_error(x: Tensor, plan: BlockPlan) -> float:
    """Of the pooled rows; infinite unless tokens are equal bit by bit and all else is zero."""
    layout = triton_engine.layout_for(plan, 64, x.device)
    found = triton_engine.fill(x, x, layout).k[..., : x.shape[3]]
    want = torch.zeros_like(found, dtype=torch.float64)
    blocks = plan.k_blocks
    for level, first in layout.first.items():
        means, _, owner = reference.pool(x.double(), blocks, level)
        nth = torch.arange(len(owner), device=x.device) - torch.searchsorted(owner, owner)
        want[:, :, first + owner * (blocks.size >> level) + nth] = means
    tokens = len(blocks) * blocks.size
    same = torch.equal(found[:, :, :tokens].double(), want[:, :, :tokens])
    clean = not bool(found[want == 0].any())
    return relative(found, want) if same and clean else inf


def draft_error(q: Tensor, k: Tensor, plan: BlockPlan, pieces: int) -> float:
    """Of the estimator on this device against its form in torch on the CPU in float64."""
    from vidsparse.estimator import mean

    params = mean.Params(sub_blocks=pieces)
    cuts = plan.q_blocks, plan.k_blocks
    found = mean.estimate(q, k, *cuts, params).value
    return relative(
        found.cpu(), mean.estimate(q.cpu().double(), k.cpu().double(), *cuts, params).value
    )


def moment_error(k: Tensor, v: Tensor, plan: BlockPlan) -> float:
    from vidsparse.kernels.triton_taylor import taylor_state

    blocks = plan.k_blocks
    rows = triton_engine.query_rows(blocks, k.device)
    video = (~blocks.text).nonzero().flatten().to(k.device)
    found = taylor_state(k, v, rows.start, rows.count, rows.size, video)
    owner = blocks.owner.to(k.device)
    inside = ~blocks.text.to(k.device)[owner]
    centred = (k.double() - blocks.mean(k.double())[:, :, owner])[:, :, inside]
    return relative(found, centred.mT @ v.double()[:, :, inside] / int(inside.sum()))


def lists_error(plan: BlockPlan) -> int:
    """Rows of the key buffer that the lists name too often or too rarely."""
    block_n, size = 64, plan.k_blocks.size
    layout = triton_engine.layout_for(plan, block_n, plan.levels.device)
    lists = triton_engine.lists_for(plan, layout, block_n)
    entry = lists.entry.cpu().long()
    bits = torch.ones_like(entry) if lists.bits is None else lists.bits.cpu()
    found = torch.zeros(len(entry), layout.rows, dtype=torch.int64)
    lane = torch.arange(block_n)
    for row, count in enumerate(lists.count.tolist()):
        one, mask = entry[row, :count, None], bits[row, :count, None]
        wanted = mask >> (lane >> (one >> 24 & 0xF)) & 1
        at = (one & 0xFFFFFF) * block_n + lane
        found[row].index_add_(0, at.flatten(), wanted.flatten())
    want = torch.zeros_like(found)
    for j, level in ((j, n) for j in range(len(plan.k_blocks)) for n in layout.first):
        first, height = layout.first[level] + j * (size >> level), size >> level
        asked = plan.level_map().flatten(0, 2)[:, j].cpu() == level
        want[asked, first : first + height] += 1
    return int((found != want).sum())


Select = Callable[[Machine, int, bool], float]


def selections() -> dict[str, Select]:
    """Selector name -> share of the rows whose levels differ from the selector in torch."""
    from vidsparse.selector import pyramid, topk, topp

    levels: dict[str, Any] = {"levels": (0, 1, 4), "min_blocks": 2}
    methods: dict[str, tuple[Any, Any]] = {
        "topk": (topk, topk.Params()),
        "topp": (topp, topp.Params(p=0.7)),
        "quota": (pyramid, pyramid.Params(shares=(0.5, 0.3, 0.2), **levels)),
        "mass": (pyramid, pyramid.Params(mode="mass", mass=(0.3, 0.6, 0.95), **levels)),
    }

    def bind(module: Any, params: Any) -> Select:
        return lambda machine, blocks, ties: select_error(machine, module, params, blocks, ties)

    return {name: bind(*method) for name, method in methods.items()}


def select_error(machine: Machine, module: Any, params: Any, blocks: int, ties: bool) -> float:
    """The share of rows that differ. With ties, scores are multiples of 1."""
    from vidsparse.plan import Scores

    value = 2 * torch.randn(1, 2, 7, blocks)
    value = value.round() if ties else value
    forced = torch.rand(7, blocks) < 0.05
    count = torch.full((blocks,), 64)
    count[-1] = 5
    text = torch.zeros(blocks, dtype=torch.bool)
    cut = Blocks(count.cumsum(0) - count, count, text, 64)
    want = module.select(Scores(value.double(), "logit"), forced, 0.2, cut, params)
    scores = Scores(value.to(machine.device), "logit")
    found = module.select(scores, forced.to(machine.device), 0.2, cut, params).cpu()
    differs = (found.masked_fill(forced, 0) != want.masked_fill(forced, 0)).any(-1)
    return float(differs.double().mean())


def probe(machine: Machine) -> Iterator[str]:
    """A small call of everything per form; names those that answer.

    A form with a barrier bug hangs here. compute-sanitizer watches the same calls.
    """
    for form in machine.forms:
        plan = level_plan(machine, "ragged", (128, 64), "exact", "global")
        q, k, v = tokens(machine, plan, 128, torch.bfloat16)
        for qk in ("native", "int8"):
            triton_engine.execute(q, k, v, plan, form=form, qk=qk)
        rows = [x.transpose(1, 2) for x in (q, k, v)]
        config = method(0.3, kernel__form=form)
        attend(*rows, grid=GRIDS["ragged"], config=config)
        if not machine.dry:
            torch.cuda.synchronize()
        yield form
