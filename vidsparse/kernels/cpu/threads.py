"""The worker pool of the CPU engine: one per process, each worker runs torch on one thread.

Many small operations per attention row pay an OpenMP barrier each when torch spreads every one of
them over threads; workers that each run whole rows on one thread do not.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

START_SECONDS = 60.0

_pool: ThreadPoolExecutor | None = None
_size = 0
_lock = threading.Lock()


def for_each(
    items: Iterable[Item], worker: Callable[[], Callable[[Item], None]], workers: int
) -> None:
    """Hand every item to one of `workers` threads, the next to whoever is free; wait for all.

    worker: called once in each thread; returns the function that takes an item, so that scratch
    memory is allocated once per thread. The threads run in the caller's grad and inference mode.
    The caller's number of torch threads is the same before and after. The first error (or an
    interrupt) drops the items that nobody has started, waits for those in work and is raised.
    """
    queue = deque(items)
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def work() -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad and not inference):
            try:
                act = worker()
                while queue:
                    try:
                        item = queue.popleft()
                    except IndexError:  # another worker took the last one
                        return
                    act(item)
            except BaseException:
                queue.clear()
                raise

    if workers == 1 and torch.get_num_threads() == 1:
        work()
        return
    with _lock:  # a pool that another call replaces still finishes what it was given
        pool = _pool_of(workers)
        futures = [pool.submit(work) for _ in range(workers)]
    try:
        for future in futures:
            future.result()
    finally:
        queue.clear()
        wait(futures)


def each(items: list[Item], act: Callable[[Item], None], on_threads: bool) -> None:
    """All items, one after the other, or `for_each` on as many threads as torch has."""
    if on_threads:
        for_each(items, lambda: act, min(torch.get_num_threads(), len(items)))
    else:
        for item in items:
            act(item)


def alone(act: Callable[[], Result], workers: int) -> Result:
    """What `act` returns, from a thread with one torch thread and none of the caller's modes.

    workers: size of the pool if one has to be made, as in `for_each`.
    """
    if torch.get_num_threads() == 1:
        return fresh(act)
    with _lock:
        future = _pool_of(workers).submit(act)
    return future.result()


def fresh(act: Callable[[], Result]) -> Result:
    """What `act` returns, from a thread with the caller's torch threads and none of its modes.

    Autocast, tracing, profiling, default devices and grad mode belong to the caller's thread.
    """
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(act).result()


def _pool_of(workers: int) -> ThreadPoolExecutor:
    """The pool, replaced if it has another size. Called under the lock."""
    global _pool, _size
    if _pool is None or _size != workers:
        if _pool is not None:
            _pool.shutdown(wait=False)
        # set_num_threads in a worker also changes the default of threads that start later
        threads = torch.get_num_threads()
        _pool = ThreadPoolExecutor(
            workers, thread_name_prefix="vidsparse", initializer=_single_threaded
        )
        _size = workers
        everyone = threading.Barrier(workers)
        started = [_pool.submit(everyone.wait, START_SECONDS) for _ in range(workers)]
        for future in started:
            future.result()
        torch.set_num_threads(threads)
    return _pool


def _single_threaded() -> None:
    """One intra-op thread here. The first look at a thread's number makes it final."""
    torch.set_num_threads(1)
    torch.get_num_threads()


def _forget() -> None:
    """A forked child has none of its parent's threads, and the lock may be held by one of them."""
    global _pool, _size, _lock
    _pool, _size, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
