"""How the CPU engine multiplies matrices: which routes this machine has, measured once per process.

fp32: torch's default route, or oneDNN, which is up to twice as fast on AVX-512 CPUs. oneDNN is
switched on by a flag of torch that permits lower precision, so a probe must find full precision.
bf16: attention weights times values in bf16, if the CPU is faster at it than at fp32.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vidsparse.kernels import cpu_threads

MAX_ERROR = 1e-6
"""An fp32 product is exact enough if its error is at most this share of its largest entry."""

MIN_GAIN = 1.2
"""A route must be this much faster than the default to be taken."""

MIN_PRODUCT = 2e6
"""FLOP from which oneDNN is faster; a call of it costs some 15 us more than the default route."""

_FLAGS = getattr(getattr(torch.backends, "mkldnn", None), "matmul", None)
_lock = threading.Lock()
_users = 0
_before = "none"
_probed: Probe | None = None


@dataclass(frozen=True)
class Probe:
    """Figures of this machine, single-threaded.

    onednn_gain, onednn_error: fp32 128 x 64 x 1024 product through oneDNN, time of the default
        route / its time (0.0 if this torch has no such flag), and largest error against float64
        relative to the largest entry.
    bf16_gain: time of 128 x 1024 weights times 1024 x 64 values on the best fp32 route / time in
        bf16, the rounding of the weights included.
    """

    onednn_gain: float
    onednn_error: float
    bf16_gain: float

    @property
    def onednn(self) -> bool:
        """True if fp32 products may and should take oneDNN."""
        return self.onednn_gain >= MIN_GAIN and self.onednn_error <= MAX_ERROR

    @property
    def bf16(self) -> bool:
        """True if weights times values should run in bf16 for bf16 input."""
        return self.bf16_gain >= MIN_GAIN


@contextmanager
def onednn(enabled: bool) -> Iterator[None]:
    """fp32 matmul through oneDNN inside the block, if enabled.

    The flag is global to the process: overlapping blocks are counted, the last one restores what
    was set before the first. Other fp32 matmuls that run meanwhile take the same route.
    """
    global _users, _before
    if not enabled or _FLAGS is None:
        yield
        return
    with _lock:
        if _users == 0:
            _before, _FLAGS.fp32_precision = _FLAGS.fp32_precision, "bf16"
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _FLAGS.fp32_precision = _before


_probe_lock = threading.Lock()


def probe(workers: int = 1) -> Probe:
    """Measure once per process (about 0.05 s); later calls return the same figures."""
    global _probed
    with _probe_lock:
        if _probed is None:
            results: list[Probe] = []
            cpu_threads.for_each([None], lambda: lambda _: results.append(_measure()), workers)
            _probed = results[0]
        return _probed


def _measure() -> Probe:
    generator = torch.Generator("cpu").manual_seed(0)  # the caller's random state stays as it is
    q, k, v = (
        torch.randn(n, 64, generator=generator, dtype=torch.float32, device="cpu")
        for n in (128, 1024, 1024)
    )
    exact = q.double() @ k.double().T
    score, out = torch.empty_like(exact, dtype=torch.float32), torch.empty_like(q)

    def scores(flag: bool) -> None:
        with onednn(flag):
            torch.mm(q, k.T, out=score)

    gain, error, route = 0.0, 0.0, False
    if _FLAGS is not None and hasattr(_FLAGS, "fp32_precision"):
        gain = _gain(lambda: scores(False), lambda: scores(True))
        error = float((score.double() - exact).abs().max() / exact.abs().max())
        route = gain >= MIN_GAIN and error <= MAX_ERROR
    weights = torch.softmax(score, -1)
    low, low_v, low_out = weights.bfloat16(), v.bfloat16(), out.bfloat16()

    def in_fp32() -> None:
        with onednn(route):
            torch.mm(weights, v, out=out)

    def in_bf16() -> None:
        low.copy_(weights)
        torch.mm(low, low_v, out=low_out)

    return Probe(gain, error, _gain(in_fp32, in_bf16))


def _gain(first: Callable[[], None], second: Callable[[], None], repeat: int = 60) -> float:
    """CPU time of the first / of the second, the shortest of `repeat` alternating calls each.

    The shortest time is the one that other work on the machine disturbs least.
    """
    best = [math.inf, math.inf]
    for _ in range(repeat):
        for side, act in enumerate((first, second)):
            start = time.thread_time_ns()
            act()
            best[side] = min(best[side], time.thread_time_ns() - start)
    return best[0] / best[1]
