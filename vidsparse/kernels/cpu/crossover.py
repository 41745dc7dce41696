"""When sparse attention on this CPU is slower than dense attention, from timing both.

Which of the two is faster, and from which density on, differs between processors by more than a
factor of three: it depends on the units they have for bf16, on their caches, on how dense attention
of this torch uses them, on the number of threads. So a call of a new kind times whole calls, sparse
at two densities and dense, once on a machine (`store` keeps the figures), on the lengths next
to its own. The time of a sparse call is linear in its density d, through both points:

    sparse(d) = t(d1) + (d - d1) / (d2 - d1) (t(d2) - t(d1))

and the crossover is the density at which sparse takes less time than dense by `MARGIN` and the
noise of the measurement. The three run in turn, and what counts are medians of their ratios within
a round: what slows the machine down for longer than a round slows all three.

Of the steps of a run one in `Kind.period` makes what the others take over, the orders of heads.
There a round has a fresh sparse call more, and the time of a sparse call is the mean of a period:

    t(d) = t_kept(d) + (t_fresh(d1) - t_kept(d1)) / period

Both times grow with the number of heads, but not a sparse call's share that no head adds to. That
share cannot be told from a small call, where it is larger; so short calls are timed with as many
heads as make it small, and what it would give calls with more of them is left as a reserve.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vidsparse.grid import TokenGrid
from vidsparse.kernels.cpu import routes, store
from vidsparse.kernels.cpu.threads import fresh

Measured = TypeVar("Measured")
Act = Callable[[], object]

LENGTHS = (1024, 2048, 4096, 8192, 16384)
"""Tokens that are timed, the longer ones only where they take no longer than `AFFORDABLE`; beyond,
the crossover hardly falls. Calls shorter than the first are not for a measurement to decide, but
for `min_tokens`."""

TYPICAL = 2048
"""A length that is always affordable. From one to the next, twice as long, times grow at most
fourfold."""

DENSITIES = (0.2, 0.6)
MARGIN = 0.05
"""Gain, as a share of the dense time, for which a call is sparse: noise is no gain."""

HEAD_TOKENS = 4096
"""Heads x tokens that are timed at least, where a call has so many heads."""

QUIET = 0.02
"""Noise, as a share of the dense time or of a longer sparse one, with which a measurement is
content."""

LOUD = 0.1
"""Noise with which a measurement is of something else that ran: it holds for this process alone."""

BUSY = 0.7
"""Share of the threads, of several, with less of which others were running: the same."""

SAYS = 0.02
"""Seconds that a measurement must have lasted to say whose the threads were."""

SECONDS, MOST, LEAST, AFFORDABLE = 0.4, 25, 3, 2.0
"""Of one length: seconds after which no further round starts, most and fewest rounds, and seconds
that the fewest may take."""

FIGURES = ("dense", "sparse_low", "sparse_high", "noise")


class Trial(Protocol):
    """A whole sparse call: q, k, v [1, S, H, D] of a grid, at a density; as in the executor's."""

    def __call__(self, *qkv: Tensor, grid: TokenGrid, density: float, fresh: bool) -> object: ...


@dataclass(frozen=True)
class Kind:
    """Calls that one measurement speaks for.

    dtype: of q, as torch names it. heads: that are timed at most. threads: of torch. method: all
    settings that the time of a call depends on. period: steps of a run for which a fresh call is
    good.
    """

    dtype: str
    head_dim: int
    heads: int
    threads: int
    method: str
    period: int = 1


@dataclass(frozen=True)
class Times:
    """Seconds of whole calls of one kind and length: dense; sparse at `DENSITIES`.

    noise: standard error of the sparse times, as a share of the dense one or, where they are
    longer, of themselves. measured, problem: as of `store.Record`.
    """

    dense: float
    sparse: tuple[float, float]
    noise: float
    measured: str = ""
    problem: str | None = None

    def crossover(self) -> float:
        """Density from which on dense is as fast, or a line's continuation of it within -1 .. 2."""
        low, high = self.sparse
        slope = max(high - low, 1e-9) / (DENSITIES[1] - DENSITIES[0])
        goal = (1 - MARGIN - self.noise) * self.dense
        return min(max(DENSITIES[0] + (goal - low) / slope, -1.0), 2.0)


def kind(dtype: torch.dtype, head_dim: int, heads: int, method: str, period: int = 1) -> Kind:
    """The kind of a call of so many heads (times batch) on the caller's torch threads."""
    threads = torch.get_num_threads()
    timed = min(heads, max(threads, HEAD_TOKENS // LENGTHS[0]))
    return Kind(str(dtype).removeprefix("torch."), head_dim, timed, threads, method, period)


def density(kind: Kind, tokens: int, trial: Trial) -> float:
    """Density from which on dense attention is as fast for a call, in 0 .. 1; 0: always.

    tokens: at least `LENGTHS[0]`. Between two lengths the density is interpolated over the
    logarithm of the length. trial: a sparse call, for what is not known yet; it runs in another
    thread.
    """
    found = between(near(kind, tokens, trial), tokens, Times.crossover)
    return min(max(found, 0.0), 1.0)


def near(kind: Kind, tokens: int, trial: Trial) -> dict[int, Times]:
    """Length -> times: of the two lengths around a call's, or of the one that is nearest to it."""
    tokens = min(tokens, _longest(kind, tokens, trial))
    below = max(length for length in LENGTHS if length <= tokens)
    lengths = (below, 2 * below) if tokens > below else (below,)
    return {length: times(kind, length, trial) for length in lengths}


def between(
    found: Mapping[int, Measured], tokens: int, figure: Callable[[Measured], float]
) -> float:
    """A figure of the times at one or two lengths, over the logarithm of the length."""
    below, *above = sorted(found)
    first = figure(found[below])
    if not above:
        return first
    return first + math.log2(tokens / below) * (figure(found[above[0]]) - first)


def _longest(kind: Kind, tokens: int, trial: Trial) -> int:
    """The longest of the lengths that is timed for a call: the next one after its own, if that is
    affordable, which the one before tells."""
    length = TYPICAL
    while length < min(tokens, LENGTHS[-1]):
        here = times(kind, length, trial)
        share = heads(kind, 2 * length) / heads(kind, length)
        if LEAST * 4 * share * (here.dense + sum(here.sparse)) > AFFORDABLE:
            break
        length *= 2
    return length


def heads(kind: Kind, length: int) -> int:
    """Heads that are timed at a length, one a thread at least."""
    return min(kind.heads, max(kind.threads, HEAD_TOKENS // length))


_known: dict[tuple[Kind, int], Times] = {}


def times(kind: Kind, length: int, trial: Trial) -> Times:
    """The times of a kind and length, the same on every call of a process."""
    kind = replace(kind, heads=heads(kind, length))
    key = (kind, length)
    if key not in _known:
        probe = routes.probe(kind.threads)  # before, or its time would be in ours
        route = {"onednn": probe.onednn, "bf16": probe.bf16}
        record = store.recall(
            "crossover",
            {**asdict(kind), "length": length, "route": route},
            lambda: fresh(lambda: measure(kind, length, trial)),
            FIGURES,
        )
        dense, low, high, noise = (record.figures[name] for name in FIGURES)
        _known[key] = Times(dense, (low, high), noise, record.measured, record.problem)
    return _known[key]


def forget() -> None:
    """Look, or measure, again when next asked."""
    _known.clear()


def measure(kind: Kind, length: int, trial: Trial) -> store.Figures:
    """Figures of alternating calls: CPU time of one thread, wall time of several.

    Raises `store.Unmeasured`, with these figures, if the machine was too busy for others.
    """
    clock = time.thread_time if kind.threads == 1 else time.perf_counter
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (1, length, kind.heads, kind.head_dim)
    made = (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            for _ in range(3))  # fmt: skip
    q, k, v = (x.to(getattr(torch, kind.dtype)) for x in made)
    grid = TokenGrid(length // 256, 16, 16)
    inner = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def sparse(density: float, fresh: bool) -> Act:
        return lambda: trial(q, k, v, grid=grid, density=density, fresh=fresh)

    whole = sparse(DENSITIES[0], True)
    single = kind.period == 1
    acts: list[Act] = [
        lambda: F.scaled_dot_product_attention(*inner),
        *(sparse(density, single) for density in DENSITIES),
        *([] if single else [whole]),
    ]
    with torch.inference_mode():
        whole()  # plans of a new grid, memory, new shapes in oneDNN
        start = time.perf_counter(), time.process_time()
        figures = _figures(acts, clock, kind.period)
        wall, used = time.perf_counter() - start[0], time.process_time() - start[1]
    if kind.threads > 1 and wall > SAYS and used < BUSY * wall * kind.threads:
        share = used / (wall * kind.threads)
        raise store.Unmeasured(
            figures, f"the machine was busy, {share:.0%} of its threads were ours"
        )
    if figures["noise"] > LOUD:
        raise store.Unmeasured(figures, f"the machine was busy, noise {figures['noise']:.2f}")
    return figures


def _figures(acts: Sequence[Act], clock: Callable[[], float], period: int = 1) -> store.Figures:
    """Time dense, sparse at the low and at the high density in turn until the noise is small.

    A fourth act is a fresh call at the low density, one in a period.
    """
    rounds: list[list[float]] = []
    end = clock() + SECONDS
    while True:
        now = [clock()]
        for act in acts:
            act()
            now.append(clock())
        dense, *sparse = (after - before for before, after in pairwise(now))
        extra = (sparse[2] - sparse[0]) / period if len(sparse) == 3 else 0.0
        rounds.append([dense, sparse[0] + extra, sparse[1] + extra])
        ratios = [[one[n] / max(one[0], 1e-9) for one in rounds] for n in (1, 2)]
        noise = max(standard_error(one) / max(1.0, statistics.median(one)) for one in ratios)
        enough = noise <= QUIET or now[-1] > end or len(rounds) == MOST
        if len(rounds) >= LEAST and enough:
            break
    dense = statistics.median(one[0] for one in rounds)
    low, high = (dense * statistics.median(values) for values in ratios)
    return dict(zip(FIGURES, (dense, low, high, noise), strict=True))


def standard_error(values: list[float]) -> float:
    """Of the median, from the middle half, as if that were of a normal distribution."""
    if len(values) < 2:
        return math.inf
    low, _, high = statistics.quantiles(values)
    return math.sqrt(math.pi / 2 / len(values)) * (high - low) / 1.349
