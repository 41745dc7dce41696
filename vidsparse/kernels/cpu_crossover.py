"""When sparse attention on this CPU is slower than dense attention, from timing both.

Which of the two is faster, and from which density on, differs between processors by more than a
factor of three: it depends on the units they have for bf16, on their caches, on how dense attention
of this torch uses them, on the number of threads. So a call of a new kind times whole calls, sparse
at two densities and dense, once on a machine (`cpu_store` keeps the figures), on the lengths next
to its own. With t the times, H heads of which h were timed, F the time of a call of two blocks,
which hardly depends on the number of heads, and d the density:

    dense = H/h t_dense      sparse(d) = F + H/h (t(d) - F),  t(d) linear through both points

and the crossover is the density at which sparse takes `MARGIN` less time than dense.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vidsparse.kernels import cpu_matmul, cpu_store, cpu_threads
from vidsparse.plan import TokenGrid

LENGTHS = (1024, 2048, 4096, 8192, 16384)
"""Tokens that are timed, the longer ones only where they take no longer than `AFFORDABLE`; beyond,
the crossover hardly falls. Calls shorter than the first are not for a measurement to decide, but
for `min_tokens`."""

TYPICAL = 2048
"""The length from whose times those of the longer ones are foretold."""

DENSITIES = (0.2, 0.6)
MARGIN = 0.05
"""Gain, as a share of the dense time, for which a call is sparse: noise is no gain."""

SECONDS, MOST, LEAST, AFFORDABLE = 0.25, 9, 2, 1.0
"""Of one length: seconds after which no further round starts, most and fewest rounds, and seconds
that the fewest may take."""

FIGURES = ("dense", "sparse_low", "sparse_high", "fixed")

Trial = Callable[[Tensor, Tensor, Tensor, TokenGrid, float], object]
"""A whole sparse call: q, k, v [1, S, H, D] of a grid, at a density."""


@dataclass(frozen=True)
class Kind:
    """Calls that one measurement speaks for.

    dtype: of q, as torch names it. heads: that are timed, at most one a thread. threads: of torch.
    method: all settings that the time of a call depends on.
    """

    dtype: str
    head_dim: int
    heads: int
    threads: int
    method: str


@dataclass(frozen=True)
class Times:
    """Seconds of whole calls of one kind and length: dense; sparse at `DENSITIES`; of two blocks.

    measured, problem: as of `cpu_store.Record`.
    """

    dense: float
    sparse: tuple[float, float]
    fixed: float
    measured: str = ""
    problem: str | None = None

    def crossover(self, scale: float) -> float:
        """Density from which on dense is as fast, or a line's continuation of it within -1 .. 2.

        scale: heads of a call / timed ones.
        """
        low, high = (self.fixed + scale * max(t - self.fixed, 0.0) for t in self.sparse)
        slope = max(high - low, 1e-9) / (DENSITIES[1] - DENSITIES[0])
        goal = (1 - MARGIN) * scale * self.dense
        return min(max(DENSITIES[0] + (goal - low) / slope, -1.0), 2.0)


def kind(dtype: torch.dtype, head_dim: int, heads: int, method: str) -> Kind:
    """The kind of a call of so many heads (times batch) on the caller's torch threads."""
    threads = torch.get_num_threads()
    return Kind(str(dtype).removeprefix("torch."), head_dim, min(heads, threads), threads, method)


def density(kind: Kind, heads: int, tokens: int, trial: Trial) -> float:
    """Density from which on dense attention is as fast for a call, in 0 .. 1; 0: always.

    heads: of the call, times batch. tokens: at least `LENGTHS[0]`. Between two lengths the density
    is interpolated over the logarithm of the length. trial: a sparse call, for what is not known
    yet; it runs in another thread.
    """
    scale = heads / kind.heads
    tokens = min(tokens, _longest(kind, trial) if tokens > TYPICAL else TYPICAL)
    below = max(length for length in LENGTHS if length <= tokens)
    found = times(kind, below, trial).crossover(scale)
    if tokens > below:
        above = times(kind, 2 * below, trial).crossover(scale)
        found += math.log2(tokens / below) * (above - found)
    return min(max(found, 0.0), 1.0)


def _longest(kind: Kind, trial: Trial) -> int:
    """The longest of the lengths that is timed for a kind."""
    typical = times(kind, TYPICAL, trial)
    least = LEAST * (typical.dense + sum(typical.sparse)) / TYPICAL**2
    affordable = (length for length in LENGTHS if least * length**2 <= AFFORDABLE)
    return max((TYPICAL, *affordable))


_known: dict[tuple[Kind, int], Times] = {}


def times(kind: Kind, length: int, trial: Trial) -> Times:
    """The times of a kind and length, the same on every call of a process."""
    key = (kind, length)
    if key not in _known:
        probe = cpu_matmul.probe(kind.threads)  # before, or its time would be in ours
        route = {"onednn": probe.onednn, "bf16": probe.bf16}
        record = cpu_store.recall(
            "crossover",
            {**asdict(kind), "length": length, "route": route},
            lambda: cpu_threads.fresh(lambda: measure(kind, length, trial)),
            FIGURES,
        )
        dense, low, high, fixed = (record.figures[name] for name in FIGURES)
        _known[key] = Times(dense, (low, high), fixed, record.measured, record.problem)
    return _known[key]


def forget() -> None:
    """Look, or measure, again when next asked."""
    _known.clear()


def measure(kind: Kind, length: int, trial: Trial) -> cpu_store.Figures:
    """Shortest times of alternating calls: CPU time of one thread, wall time of several."""
    clock = time.thread_time if kind.threads == 1 else time.perf_counter
    generator = torch.Generator("cpu").manual_seed(0)
    dtype = getattr(torch, kind.dtype)

    def inputs(tokens: int) -> list[Tensor]:
        shape = (1, tokens, kind.heads, kind.head_dim)
        made = (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
                for _ in range(3))  # fmt: skip
        return [x.to(dtype) for x in made]

    q, k, v = inputs(length)
    a, b, c = inputs(128)
    grid, small = TokenGrid(length // 256, 16, 16), TokenGrid(1, 8, 16)
    inner = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    acts: dict[str, Callable[[], object]] = {
        "dense": lambda: F.scaled_dot_product_attention(*inner),
        "sparse_low": lambda: trial(q, k, v, grid, DENSITIES[0]),
        "sparse_high": lambda: trial(q, k, v, grid, DENSITIES[1]),
        "fixed": lambda: trial(a, b, c, small, DENSITIES[0]),
    }
    best = dict.fromkeys(acts, math.inf)
    with torch.inference_mode():
        acts["fixed"](), acts["sparse_low"]()  # plans of a new grid, memory, new shapes in oneDNN
        end = clock() + SECONDS
        for n in range(MOST):
            if n >= LEAST and clock() > end:
                break
            for name, act in acts.items():
                start = clock()
                act()
                best[name] = min(best[name], clock() - start)
    return best
