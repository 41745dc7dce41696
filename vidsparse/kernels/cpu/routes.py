"""How the CPU engine multiplies matrices: which routes this machine has, from figures kept for it.

fp32: torch's default route, or oneDNN, which is up to twice as fast on CPUs with AVX-512. oneDNN is
switched on by a flag of torch that permits lower precision: `probe` must have found that on
this machine it gives full precision all the same. With AMX oneDNN computes in bf16; there the flag
is never touched.
bf16: attention weights times values in bf16, if the CPU is faster at it than at fp32.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vidsparse.kernels.cpu import machine, store, threads
from vidsparse.kernels.cpu import probe as cpu_probe

MAX_ERROR = 1e-6
"""An fp32 product is exact enough if its error is at most this share of its largest entry."""

MAX_LOSS = 4.0
"""Other threads' products lose nothing if their error grows at most by this factor; in bf16 it
grows by a thousand. Another order of the sums alone moves it by two."""

MIN_GAIN = 1.2
"""A route must be this much faster than the default to be taken."""

MIN_PRODUCT = 2e6
"""FLOP from which oneDNN is faster; a call of it costs some 15 us more than the default route."""

FIGURES = ("onednn_gain", "onednn_error", "bf16_gain", "onednn_loss")

_FLAGS: Any = getattr(getattr(torch.backends, "mkldnn", None), "matmul", None)
_lock = threading.Lock()
_users = 0
_before = "none"


@dataclass(frozen=True)
class Probe:
    """Figures as in `probe.measure`. reason: why oneDNN was not measured, or None.

    measured: when, or None if these are not measured figures. problem: why the figures hold for
    this process only, or None.
    """

    onednn_gain: float
    onednn_error: float
    bf16_gain: float
    onednn_loss: float = 0.0
    reason: str | None = None
    measured: str | None = None
    problem: str | None = None

    @property
    def refusal(self) -> str | None:
        """Why fp32 products do not take oneDNN, or None if they do."""
        if self.reason:
            return self.reason
        if self.onednn_error > MAX_ERROR:
            return f"error {self.onednn_error:.1e}, allowed {MAX_ERROR:.0e}"
        if self.onednn_loss > MAX_LOSS:
            return f"products of other shapes lose a factor of {self.onednn_loss:.0f} in precision"
        if self.onednn_gain < MIN_GAIN:
            return f"{self.onednn_gain:.2f}x as fast, needed {MIN_GAIN}x"
        return None

    @property
    def onednn(self) -> bool:
        """True if fp32 products may and should take oneDNN."""
        return self.refusal is None

    @property
    def bf16(self) -> bool:
        """True if weights times values should run in bf16 for bf16 input."""
        return self.bf16_gain >= MIN_GAIN


@dataclass(frozen=True)
class Route:
    """How rows are computed. onednn: fp32 products through oneDNN. low: for bf16 input, weights
    times values in bf16. fused: torch's attention on what a row gathers, no products of our own.
    """

    onednn: bool = False
    low: bool = False
    fused: bool = False

    @property
    def name(self) -> str:
        """native, onednn, mixed, onednn+mixed or sdpa."""
        if self.fused:
            return "sdpa"
        taken = [name for name, on in (("onednn", self.onednn), ("mixed", self.low)) if on]
        return "+".join(taken) or "native"


def products(dtype: torch.dtype, workers: int = 1) -> Route:
    """The fastest products of this machine for input of a dtype, from the figures of `probe`."""
    found = probe(workers)
    return Route(
        onednn=found.onednn and dtype != torch.float64, low=found.bf16 and dtype == torch.bfloat16
    )


_probe_lock = threading.Lock()
_probed: Probe | None = None


def probe(workers: int = 1) -> Probe:
    """The figures of this machine, the same on every call of a process.

    Measured when first asked for on a machine: 0.1 s, on a CPU that may gain from oneDNN the start
    of a child process more (1 to 4 s).
    """
    global _probed
    with _probe_lock:
        if _probed is None:
            reason = _never()
            kind = "native" if reason else "onednn"
            measure = partial(_here if reason else _child, workers)
            record = store.recall(kind, {}, measure, FIGURES)
            gain, error, bf16_gain, loss = (record.figures[name] for name in FIGURES)
            why = reason or record.reason
            _probed = Probe(gain, error, bf16_gain, loss, why, record.measured, record.problem)
        return _probed


def described(dtype: torch.dtype | None = None, matmul: str = "auto") -> str:
    """How products of a dtype are multiplied here, with the figures; None: of all dtypes."""
    found = probe(torch.get_num_threads())
    refusal = "kernel.cpu_matmul=native" if matmul == "native" else found.refusal
    text = f"fp32 by torch's own products (oneDNN rejected: {refusal})"
    if refusal is None:
        text = (
            f"fp32 through oneDNN, {found.onednn_gain:.2f}x as fast as torch's own products, "
            f"error {found.onednn_error:.1e}"
        )
    if dtype == torch.float64:
        return "fp64 by torch's own products"
    if dtype not in (None, torch.bfloat16):
        return text
    gain = f"{found.bf16_gain:.2f}x as fast"
    if found.bf16:
        return f"{text}; for bf16 weights times values in bfloat16, {gain} as in float32"
    return f"{text}; for bf16 weights times values in float32 (bfloat16 rejected: {gain})"


def forget() -> None:
    """Look, or measure, again when next asked."""
    global _probed
    with _probe_lock:
        _probed = None


def _never() -> str | None:
    """Why oneDNN is not even tried, or None."""
    if not hasattr(_FLAGS, "fp32_precision") or not torch.backends.mkldnn.is_available():
        return "this torch has no switch for it"
    if any(flag.startswith("amx") for flag in machine.flags()):
        return "on a CPU with AMX it computes in bf16"
    if "avx512f" not in machine.flags():
        return "on a CPU without AVX-512 it is no faster"
    return None


def _here(workers: int) -> store.Figures:
    """Without the flag, in a thread of this process."""
    return threads.alone(cpu_probe.measure, workers)


def _child(workers: int) -> store.Figures:
    try:
        return cpu_probe.in_child()
    except RuntimeError as error:
        raise store.Unmeasured(_here(workers), str(error)) from None


@contextmanager
def onednn(enabled: bool) -> Iterator[None]:
    """fp32 matmul through oneDNN inside the block, if enabled.

    The flag is global to the process: overlapping blocks are counted, the last one restores what
    was set before the first, unless somebody else has set it meanwhile. Other fp32 products that
    run meanwhile take the same route, which is why it must be exact.
    """
    global _users, _before
    if not enabled or _FLAGS is None:
        yield
        return
    with _lock:
        if _users == 0:
            _before = _own_setting()
            _FLAGS.fp32_precision = "bf16"
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _FLAGS.fp32_precision == "bf16":
                _FLAGS.fp32_precision = _before


def _own_setting() -> str:
    """The flag as it was set, "none" if it only follows the setting of all backends."""
    shown: str = _FLAGS.fp32_precision
    _FLAGS.fp32_precision = "none"
    inherited: bool = _FLAGS.fp32_precision == shown
    return "none" if inherited else shown


def _forget() -> None:
    """A forked child has none of its parent's calls, whose flag it inherits."""
    global _users, _lock, _probe_lock
    _lock, _probe_lock = threading.Lock(), threading.Lock()
    if _users:
        _users = 0
        _FLAGS.fp32_precision = _before


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
