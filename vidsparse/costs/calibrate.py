"""The CPU at hand as a machine: what it does in a second at the shapes of one model.

Attention is not measured here: what whole calls take is known to the executor, which decides by it
whether calls are sparse. Linear layers and elementwise operations are timed at the model's own
widths, in a second or two, and kept as all figures of a CPU are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import itemgetter
from statistics import median

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from vidsparse import registry
from vidsparse.attention import trial_of
from vidsparse.config import Keep, SparseConfig
from vidsparse.costs import clock, stages
from vidsparse.costs.forward import Forward
from vidsparse.costs.machine import Constant, Machine
from vidsparse.costs.run import form, method
from vidsparse.costs.stage import AROUND
from vidsparse.grid import TokenGrid
from vidsparse.kernels.cpu import machine as cpu
from vidsparse.kernels.cpu import store
from vidsparse.kernels.cpu.crossover import between
from vidsparse.kernels.cpu.threads import fresh
from vidsparse.kernels.executor import Executor, Timing

FIGURES = ("matmul", "bandwidth", "launch")

SECONDS, LEAST, MOST = 0.5, 3, 50
"""Of one kind of operations: seconds after which none starts again, fewest and most rounds."""

ROWS, NUMBERS = 8192, 2**25
"""Rows that are timed at most, and numbers in a tensor of them."""

SHAPES = 3
"""Shapes of linear layers that are timed, those with the most work first."""

ERROR = 0.06
"""Standard error of a rate that was measured on a quiet machine, relative; longer sequences than
those that were timed, and a machine that is less quiet, add to it."""


def calibrated(forward: Forward, config: SparseConfig) -> tuple[Machine, float]:
    """This CPU, and the density above which calls like those of the forward are dense on it."""
    threads = torch.get_num_threads()
    base = _plain(forward, threads)
    executor: Executor = registry.executor("cpu")
    asked = form(forward, config, base, trial_of(config, forward.hoisted))
    timings = {one.tokens: one for one in executor.timings(asked)}
    if not timings:
        return base, 1.0
    return _with_attention(base, forward, config, timings), executor.crossover(asked)


def _plain(forward: Forward, threads: int) -> Machine:
    """Without attention: at the rate of linear layers, until it is known."""
    rows = min(forward.tokens, ROWS, max(1, NUMBERS // forward.width))
    linears = sorted(forward.linears, key=lambda one: -one.flops)[:SHAPES]
    shapes = [(one.inputs, one.outputs, one.count) for one in linears]
    key = {
        "dtype": forward.dtype,
        "rows": rows,
        "width": forward.width,
        "shapes": shapes,
        "threads": threads,
    }
    dtype = getattr(torch, forward.dtype)
    record = store.recall(
        "layers", key, lambda: fresh(lambda: measure(dtype, rows, forward.width, shapes)), FIGURES
    )
    origin = f"at {rows:,} rows, {record.measured}"
    constants = {n: Constant(record.figures[n], ERROR, "measured", origin) for n in FIGURES}
    for name in ("dense", "sparse"):
        constants[name] = Constant(constants["matmul"].value, 1.0, "assumed", "as linear layers")
    memory = float(psutil.virtual_memory().total)
    constants["memory"] = Constant(memory, 0.0, "measured")
    threaded = f"{threads} thread{'s' * (threads > 1)}"
    return Machine("this CPU", f"{cpu.name()}, {threaded}", constants, threads=threads)


def _with_attention(
    base: Machine, forward: Forward, config: SparseConfig, timings: dict[int, Timing]
) -> Machine:
    """With rates of dense and sparse attention from whole calls of one or two lengths."""
    tokens = forward.tokens
    found = {length: _rates(base, forward, config, one) for length, one in timings.items()}
    rates = [between(found, tokens, itemgetter(n)) for n in range(3)]
    longest = max(timings)
    far = 0.0 if tokens <= longest else 0.05 * (tokens / longest - 1) ** 0.5
    error = ERROR + min(far, 0.3) + max(one.noise for one in timings.values())
    origin = f"whole calls of {' and '.join(f'{n:,}' for n in sorted(timings))} tokens"
    dense, sparse, around = (Constant(rate, error, "measured", origin) for rate in rates)
    return Machine(
        base.name,
        base.about,
        {**base.constants, "dense": dense, "sparse": sparse},
        dict.fromkeys(AROUND, around),
        base.threads,
    )


def _rates(
    base: Machine, forward: Forward, config: SparseConfig, one: Timing
) -> tuple[float, float, float]:
    """FLOP/s of dense attention and of listed tiles; time of all around the tiles / as modelled."""
    grid = TokenGrid(1, 1, one.tokens)
    small = replace(forward, grid=grid, heads=one.heads)
    work = stages.dense_layer(small)[0].flops
    (low, first), (high, last) = sorted(one.sparse.items())
    slope = max((last - first) / (high - low), 1e-9)
    fixed = max(first - slope * low, 1e-9)
    how = method(forward, replace(config, keep=Keep()), base)  # as calls are timed
    around = [s for s in stages.sparse_layer(small, how, 0.0) if s.name in AROUND]
    rates = {**base.constants, "sparse": Constant(work / slope, 0.0, "measured")}
    modelled = clock.timed(around, Machine("", "", rates)).seconds
    return work / one.dense, work / slope, fixed / modelled


def measure(
    dtype: torch.dtype, rows: int, width: int, shapes: list[tuple[int, int, int]]
) -> store.Figures:
    """FLOP/s of linear layers, bytes/s of what stands between them, seconds of an operation."""
    generator = torch.Generator("cpu").manual_seed(0)

    def noise(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return made.to(dtype)

    with torch.inference_mode():
        flops = seconds = 0.0
        for inputs, outputs, count in shapes:
            x, weight, bias = noise(rows, inputs), noise(outputs, inputs), noise(outputs)
            seconds += count * _seconds(partial(F.linear, x, weight, bias))
            flops += count * 2.0 * rows * inputs * outputs
        x, row = noise(1, rows, width), noise(1, 1, width).float()
        between_layers = _seconds(partial(layer, x, row, noise(1, rows, 4 * width)))
        one = noise(1)
        host = _seconds(lambda: [one + one for _ in range(100)]) / 100
    touched = float(stages.TOUCHED * rows * width)
    return {"matmul": flops / seconds, "bandwidth": touched / between_layers, "launch": host}


def layer(x: Tensor, row: Tensor, wide: Tensor) -> Tensor:
    """What stands between the linear layers of a block: norms, modulation, rotary embedding, an
    activation over four times the channels, residuals; with the casts to float32 and back that
    blocks of Wan have. x [1, rows, C], row float32 [1, 1, C], wide [1, rows, 4 C]."""
    width = x.shape[-1]
    for _ in range(2):
        normed = (F.layer_norm(x.float(), (width,)) * (1 + row) + row).to(x.dtype)
        x = (x.float() + normed * row).to(x.dtype)
    x = x + F.layer_norm(x.float(), (width,)).to(x.dtype)
    for _ in range(2):
        q = F.rms_norm(x.float(), (width,)).to(x.dtype)
        even, odd = q.unflatten(-1, (-1, 2)).unbind(-1)
        turn = row[..., ::2]
        out = torch.empty_like(q)
        out[..., 0::2] = even * turn - odd * turn
        out[..., 1::2] = even * turn + odd * turn
        x = out
        x = F.rms_norm(x.float(), (width,)).to(x.dtype)
    return x + F.gelu(wide, approximate="tanh")[..., :width]


def _seconds(act: Callable[[], object]) -> float:
    """Median of some runs, after one that is not counted: CPU time of one thread, wall time of
    several, as the crossover is timed."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    act()
    found: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(found) < LEAST or (time.perf_counter() < end and len(found) < MOST):
        start = clock()
        act()
        found.append(clock() - start)
    return median(found)
