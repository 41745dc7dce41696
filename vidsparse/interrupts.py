"""Interrupts: a signal that asks the process to end becomes one exception, and is never lost.

Python raises KeyboardInterrupt wherever the interpreter happens to be: between two renames, or in
a callback of fork or of garbage collection, which prints and drops it. So inside `listening` a
signal is remembered, and raised as `Interrupted` where that can do no harm:

    held             signals wait; `check` raises one that has come: between two frames, not in one
    interruptible    inside `held`, around long foreign work: signals raise at once

A second signal of the same wish (a terminal that closes sends two) does not break the cleaning up
after the first: another exception comes after `PATIENCE` at the earliest. Handlers belong to the
main thread; in other threads nothing here does anything.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
PATIENCE = 2.0
"""Seconds after an exception in which further signals raise none."""
LIMIT = 10.0
"""Seconds that a signal waits in `held` at most: another one that comes later raises at once."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end. signum: which."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class _State:
    """Of the process, as signals are. at_once: raise where the interpreter is."""

    on = False
    at_once = True
    pending = 0  # the signal that has come
    came = 0.0  # when
    raised = -PATIENCE  # when it was an exception the last time


_state = _State()


@contextmanager
def listening(*, last: bool = False) -> Iterator[None]:
    """Remember signals inside. At the end the handlers are put back, and get a pending signal.

    A signal that is ignored, as under nohup, stays so. Inside another `listening`: nothing.
    last: the process ends after it, and all is done or undone; a signal ends it without a word.
    """
    if _state.on or not _main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    mine = {s: h for s, h in before.items() if h is not None and h != signal.SIG_IGN}
    hook = sys.unraisablehook
    try:
        _state.on, _state.at_once, _state.pending, _state.raised = True, True, 0, -PATIENCE
        sys.unraisablehook = lambda dropped: _dropped(dropped, hook)
        for signum in mine:
            signal.signal(signum, _handle)
        yield
    finally:
        _state.at_once = False
        for signum, handler in mine.items():
            signal.signal(signum, signal.SIG_DFL if last else handler)
        sys.unraisablehook = hook
        _state.on = False
        signum = take()
        if signum and not last:
            signal.raise_signal(signum)


@contextmanager
def held() -> Iterator[None]:
    """Signals wait inside, also in a program that does not listen; a pending one raises after."""
    if not _main_thread():
        yield
        return
    with listening():
        before, _state.at_once = _state.at_once, False
        try:
            yield
        finally:
            _state.at_once = before
        if before:
            check()


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside `held`: signals raise at once here, wherever the interpreter is."""
    if not (_state.on and _main_thread()):
        yield
        return
    check()
    before, _state.at_once = _state.at_once, True
    try:
        yield
    finally:
        _state.at_once = before
    check()


def check() -> None:
    """Raise Interrupted if a signal is pending: one that waited, or that something swallowed."""
    if _state.pending and _main_thread():
        _state.raised = monotonic()
        raise Interrupted(_state.pending)


def pending() -> int:
    """Number of the signal that has come, or 0."""
    return _state.pending


def take() -> int:
    """As `pending`; it counts as dealt with."""
    signum, _state.pending = _state.pending, 0
    return signum


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _handle(signum: int, frame: Any) -> None:
    now = monotonic()
    if not _state.pending:
        _state.pending, _state.came = signum, now
    if now - _state.raised >= PATIENCE and (_state.at_once or now - _state.came > LIMIT):
        _state.raised = now
        raise Interrupted(_state.pending)


def _dropped(dropped: Any, hook: Any) -> None:
    """`sys.unraisablehook`: a callback swallowed an interrupt. It comes again a moment later."""
    if not isinstance(dropped.exc_value, Interrupted):
        hook(dropped)
    elif _state.on:
        _state.raised = -PATIENCE
        threading.Thread(target=_again, args=(dropped.exc_value.signum,), daemon=True).start()


def _again(signum: int) -> None:
    sleep(0.02)
    if _state.on and _state.pending:
        os.kill(os.getpid(), signum)  # raise_signal would not wake the main thread
