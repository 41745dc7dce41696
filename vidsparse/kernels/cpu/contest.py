"""Which route the rows of a call take on this machine: timed against each other, errors as a gate.

Products of our own (`routes.products`) or torch's attention on what a row gathers (`fused`): which
is faster differs between processors by more than a factor of two, as torch's attention runs in
units that a product of fp32 scores cannot use. So once on a machine, for a dtype and class of head
dims, both run whole rows, from the gather to the output, of query blocks of 64 and of 128.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from vidsparse.blocks import Blocks
from vidsparse.config import CPU_ROUTES
from vidsparse.grid import TokenGrid
from vidsparse.kernels import reference
from vidsparse.kernels.cpu import engine, fused, routes, store
from vidsparse.kernels.cpu.routes import Route
from vidsparse.kernels.cpu.threads import alone
from vidsparse.plan import SKIP, BlockPlan

VARIABLE = "VIDSPARSE_CPU_ROUTE"
"""Environment variable that pins the route where `kernel.cpu_route` is auto."""

BLOCKS = (64, 128)
CLASSES = (64, 128, 256)
"""Head dims that are timed; a call takes the figures of the next one."""

MIN_GAIN = 1.1
"""How much faster than products torch's attention must be, at some size of query blocks."""

MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 1e-3}
"""Relative L2 error that its rows may have: that of dense attention in the dtype."""

WORTH = 1.15
"""Gain of query blocks of 128 over 64 that outweighs their error, which is 15 % larger."""

SECONDS, MOST, LEAST = 0.1, 40, 5
"""Of a size of query blocks: seconds after which no further round starts, most and fewest."""

GATHERED = "torch's attention on gathered keys"
TOKENS, ROWS, DENSITY = 2048, 256, 0.2
FIGURES = tuple(f"{name}_{block}" for block in BLOCKS for name in ("ms", "products", "error"))


@dataclass(frozen=True)
class Contest:
    """By size of query blocks, ms: time of the rows by torch's attention; products: by products of
    our own; error: relative L2 of torch's attention, at most `limit`. reason: why it was not
    measured. measured, problem: as of `store.Record`."""

    ms: dict[int, float]
    products: dict[int, float]
    error: dict[int, float]
    limit: float
    measured: str = ""
    problem: str | None = None
    reason: str | None = None

    @property
    def refusal(self) -> str | None:
        """Why rows do not take torch's attention, None if they do."""
        if self.reason:
            return self.reason
        if (worst := max(self.error.values())) > self.limit:
            return f"error {worst:.1e}, allowed {self.limit:.0e}"
        best = max(self.gain(block) for block in BLOCKS)
        return None if best >= MIN_GAIN else f"{best:.3f}x as fast, needed {MIN_GAIN}x"

    def gain(self, block: int) -> float:
        """Time of products / of torch's attention."""
        return self.products[block] / max(self.ms[block], 1e-9)

    @property
    def block(self) -> int:
        """The size of query blocks for torch's attention: the larger one costs precision of the
        method, and must gain `WORTH` by that."""
        if self.reason or self.ms[BLOCKS[0]] < WORTH * self.ms[BLOCKS[1]]:
            return BLOCKS[0]
        return BLOCKS[1]


NONE = Contest({}, {}, {}, 0.0, reason="there is no such kernel for this dtype")


def pinned(given: str = "auto") -> str:
    """The route that is asked for: `kernel.cpu_route`, else the environment's, else auto.

    Raises ValueError for another word in the environment.
    """
    if given != "auto":
        return given
    found = os.environ.get(VARIABLE) or "auto"
    if found not in CPU_ROUTES:
        raise ValueError(f"{VARIABLE}={found!r}: allowed is {', '.join(CPU_ROUTES)}")
    return found


def refusal(given: str, dtype: torch.dtype | None) -> str | None:
    """Why a pinned route does not compute calls, in one line with the cure; None if it does."""
    route = pinned(given)
    name = f"{'kernel.cpu_route' if given != 'auto' else VARIABLE}={route!r}"
    if route == "sdpa" and dtype is not None and dtype not in fused.DTYPES:
        return f"{name}: not for {dtype}; use cpu_route=native"
    if route == "mixed" and dtype not in (None, torch.bfloat16):
        return f"{name}: for bfloat16 alone, not for {dtype}; use cpu_route=native"
    if route == "onednn" and dtype != torch.float64:
        why = routes.probe(torch.get_num_threads()).refusal
        return f"{name}: {why}; use cpu_route=native" if why else None
    return None


def choose(dtype: torch.dtype, head_dim: int, given: str = "auto") -> Route:
    """The route of a call; the same for a pinned one everywhere, for auto on this machine."""
    route = pinned(given)
    if route != "auto":
        onednn = route == "onednn" and dtype != torch.float64  # a flag for nothing, never probed
        return Route(onednn, route == "mixed", route == "sdpa")
    found = routes.products(dtype, torch.get_num_threads())
    if contest(dtype, head_dim).refusal is not None:
        return found
    return replace(found, fused=True)


def block(dtype: torch.dtype, head_dim: int, given: str = "auto") -> int:
    """Tokens of a query block that the route of a call needs to be fast; of a pinned one fixed."""
    if not choose(dtype, head_dim, given).fused:
        return BLOCKS[0]
    return BLOCKS[1] if pinned(given) != "auto" else contest(dtype, head_dim).block


_known: dict[tuple[torch.dtype, int], Contest] = {}


def contest(dtype: torch.dtype, head_dim: int) -> Contest:
    """The figures of this machine for a dtype and head dim, the same on every call of a process."""
    if dtype not in fused.DTYPES or not hasattr(torch.ops.aten, fused.OPERATOR):
        return NONE
    depth = next((d for d in CLASSES if d >= head_dim), head_dim)
    key = dtype, depth
    if key not in _known:
        products = routes.products(dtype, torch.get_num_threads())
        record = store.recall(
            "route",
            {"dtype": str(dtype), "head_dim": depth, "products": products.name},
            partial(alone, partial(measure, dtype, depth, products), torch.get_num_threads()),
            FIGURES,
        )
        ms, others, error = (
            {block: record.figures[f"{name}_{block}"] for block in BLOCKS}
            for name in ("ms", "products", "error")
        )
        notes = record.measured, record.problem, record.reason
        _known[key] = Contest(ms, others, error, MAX_ERROR[dtype], *notes)
    return _known[key]


def forget() -> None:
    """Look, or measure, again when next asked."""
    _known.clear()


def measure(dtype: torch.dtype, head_dim: int, products: Route) -> store.Figures:
    """Whole rows of one head on one thread, both routes in turn: shortest CPU times of each.

    256 queries; 2,048 keys in blocks of 64, a fifth listed at random, the rest by centroids.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    q, k, v = (
        torch.randn(1, 1, n, head_dim, generator=generator, device="cpu").to(dtype)
        for n in (ROWS, TOKENS, TOKENS)
    )
    k_blocks = Blocks.cut(TokenGrid(1, 1, TOKENS), 64)
    found: store.Figures = {}
    with torch.inference_mode():
        for block in BLOCKS:
            q_blocks = Blocks.cut(TokenGrid(1, 1, ROWS), block)
            shape = (1, 1, len(q_blocks), len(k_blocks))
            drawn = torch.rand(shape, generator=generator, device="cpu")
            levels = torch.where(drawn < DENSITY, 0, SKIP).to(torch.int8)
            plan = BlockPlan.from_levels(levels, q_blocks, k_blocks, (0,))
            plan = plan.with_rest(k_blocks.levels)
            acts = [
                partial(engine.execute, q, k, v, plan, workers=1, route=route)
                for route in (products, Route(fused=True))
            ]
            want, _ = reference.execute(q.double(), k.double(), v.double(), plan)
            found[f"error_{block}"] = float((acts[1]()[0] - want).norm() / want.norm())
            found[f"products_{block}"], found[f"ms_{block}"] = _milliseconds(acts)
    if not all(map(math.isfinite, found.values())):
        raise store.Unmeasured(dict.fromkeys(FIGURES, 0.0), "it gives numbers that are not finite")
    return found


def _milliseconds(acts: Sequence[Callable[[], object]]) -> list[float]:
    """CPU time of each act, the shortest of alternating calls: what other work disturbs least."""
    best, end = [math.inf] * len(acts), time.thread_time() + SECONDS
    for n in range(MOST):
        if n >= LEAST and time.thread_time() > end:
            break
        for side, act in enumerate(acts):
            start = time.thread_time_ns()
            act()
            best[side] = min(best[side], (time.thread_time_ns() - start) / 1e6)
    return best


def described(dtype: torch.dtype, head_dim: int, given: str = "auto") -> str:
    """The route of a call and why, with the figures of the rejected ones."""
    route, asked = choose(dtype, head_dim, given), pinned(given)
    if asked != "auto":
        return f"route {route.name}, asked for"
    found = contest(dtype, head_dim)
    if route.fused:
        gains = " and ".join(f"{found.gain(b):.2f}x at blocks of {b}" for b in BLOCKS)
        return f"{GATHERED}, {gains} as fast as products, error {max(found.error.values()):.1e}"
    return f"{routes.described(dtype)}; {GATHERED} rejected: {found.refusal}"
