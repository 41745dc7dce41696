"""How fast and how exact the routes of matrix products are on this machine.

oneDNN is switched on by a flag of torch that permits lower precision and holds for the whole
process, so what it does is found out in a child process: the products that other threads multiply
meanwhile are not ours to risk.

    python -c CHILD     stdin: {"path": sys.path}     stdout: figures, as JSON, in the last line
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TIMEOUT = 120.0
"""Seconds until a child that gives no answer is ended; importing torch takes it 1 to 4."""

REPEAT, ENOUGH, AT_LEAST = 60, 0.1, 5
"""Most alternating calls of a comparison; seconds after which it ends; fewest calls."""

CHILD = (
    "import json, sys; sys.path[:] = json.load(sys.stdin)['path']; "
    "from vidsparse.kernels.cpu import probe; probe.main()"
)


def in_child() -> dict[str, float]:
    """The figures of `measure`, with the flag, from a child process.

    Raises RuntimeError that says in a few words why there are none.
    """
    command = [_python(), "-P", "-c", CHILD]
    try:
        done = subprocess.run(
            command,
            input=json.dumps({"path": sys.path}),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the child process gave no answer in {TIMEOUT:.0f} s") from None
    except (OSError, ValueError) as error:
        raise RuntimeError(f"no child process could be started: {error}") from None
    try:
        found = json.loads(done.stdout.splitlines()[-1])
        figures = {str(name): float(value) for name, value in found.items()}
    except (IndexError, ValueError, AttributeError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"the child process ended with {done.returncode}: {last}") from None
    if not all(math.isfinite(value) for value in figures.values()):
        raise RuntimeError(f"the child process measured {figures}")
    return figures


def _python() -> str:
    """The interpreter; an application that holds one would start itself once more."""
    program = sys.executable or ""
    if getattr(sys, "frozen", False) or not PurePath(program).name.lower().startswith("python"):
        raise RuntimeError(f"no child process: {program or 'this program'} is not Python itself")
    return program


def main() -> None:
    """In the child."""
    torch.set_num_threads(1)
    flags: Any = torch.backends.mkldnn
    print(json.dumps(measure(flags.matmul)))


def measure(flags: Any = None) -> dict[str, float]:
    """Figures of this machine on the thread that calls, which should have one torch thread.

    flags: `torch.backends.mkldnn.matmul`, of a process of our own; None: no product takes oneDNN.

    onednn_gain: fp32 128 x 64 x 1024 product, time of the default route / time through oneDNN.
    onednn_error: its largest error against float64, relative to the largest entry. onednn_loss:
    the largest error of other products / that of the default route, the worst of several forms.
    bf16_gain: time of 128 x 1024 weights times 1024 x 64 values on the faster exact fp32 route /
    in bf16, the rounding of the weights included.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # the caller's random state stays as it is
    q, k, v = (_random(generator, n, 64) for n in (128, 1024, 1024))
    score, out = q.new_empty(128, 1024), torch.empty_like(q)

    def scores(flag: bool) -> None:
        _switch(flags, flag)
        torch.mm(q, k.T, out=score)

    found = {"onednn_gain": 0.0, "onednn_error": 0.0, "onednn_loss": 0.0}
    scores(False)
    if flags is not None:
        found["onednn_gain"] = _gain(lambda: scores(False), lambda: scores(True))
        found["onednn_error"] = _error(score, q.double() @ k.double().T)
        found["onednn_loss"] = _loss(flags, generator)
    weights = torch.softmax(score, -1)
    low, low_v, low_out = weights.bfloat16(), v.bfloat16(), out.bfloat16()

    def in_fp32() -> None:
        torch.mm(weights, v, out=out)

    def in_bf16() -> None:
        low.copy_(weights)
        torch.mm(low, low_v, out=low_out)

    _switch(flags, flags is not None)
    with_flag = _gain(in_fp32, in_bf16)
    _switch(flags, False)
    found["bf16_gain"] = with_flag if flags is None else min(with_flag, _gain(in_fp32, in_bf16))
    return found


def _switch(flags: Any, on: bool) -> None:
    if flags is not None:
        flags.fp32_precision = "bf16" if on else "ieee"


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _error(found: Tensor, exact: Tensor) -> float:
    """Largest error relative to the largest entry."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def _loss(flags: Any, generator: torch.Generator) -> float:
    """How much less exact other products are with the flag: tall, deep, batched, with a bias."""
    a, b, c = (_random(generator, *s) for s in ((300, 700), (700, 500), (500,)))
    deep, wide = _random(generator, 64, 4096), _random(generator, 4096, 96)
    batch = _random(generator, 6, 77, 128)
    forms: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (torch.mm, (a, b)),
        (torch.mm, (deep, wide)),
        (torch.mm, (wide.T, deep.T)),
        (torch.bmm, (batch, batch.mT)),
        (torch.matmul, (batch, b[:128])),
        (torch.addmm, (c, a, b)),
        (F.linear, (a, b.T.contiguous(), c)),
        (torch.mv, (b.T, a[0])),
    ]
    worst = 0.0
    for act, given in forms:
        exact = act(*(x.double() for x in given))
        errors = []
        for on in (False, True):
            _switch(flags, on)
            errors.append(_error(act(*given), exact))
        worst = max(worst, errors[1] / max(errors[0], 1e-9))
    return worst


def _gain(first: Callable[[], None], second: Callable[[], None]) -> float:
    """CPU time of the first / of the second, the shortest of alternating calls each.

    The shortest time is the one that other work on the machine disturbs least.
    """
    best = [math.inf, math.inf]
    end = time.perf_counter() + ENOUGH
    for n in range(REPEAT):
        if n >= AT_LEAST and time.perf_counter() > end:
            break
        for side, act in enumerate((first, second)):
            start = time.thread_time_ns()
            act()
            best[side] = min(best[side], time.thread_time_ns() - start)
    return best[0] / max(best[1], 1)
