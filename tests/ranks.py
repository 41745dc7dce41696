"""Acts in several processes of one machine, joined by gloo: what context parallelism needs of GPUs.

results = on_ranks(2, act, "an argument")   # act(rank, "an argument") in each; by rank
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 120
"""Seconds that an act may take, the start of its processes included."""


def on_ranks(count: int, act: Callable[..., Any], *given: Any, limit: float = LIMIT) -> list[Any]:
    """What `act(rank, *given)`, a function of a module, returns in each of `count` processes.

    Raises what the first failing process raised, with its traceback; the others are ended. Raises
    TimeoutError past `limit` seconds, as when one of them waits for another that will not come.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, count, act, given)
        running = mp.start_processes(
            _rank, args=arguments, nprocs=count, join=False, start_method="spawn"
        )
        end = monotonic() + limit
        try:
            while not running.join(timeout=max(0.0, end - monotonic()), grace_period=1):
                if monotonic() >= end:
                    waiting = [n for n, p in enumerate(running.processes) if p.is_alive()]
                    raise TimeoutError(f"ranks {waiting} of {act.__name__} ran past {limit} s")
        finally:
            for process in running.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(Path(folder, f"{n}.pt"), weights_only=False) for n in range(count)]


def _rank(
    rank: int, folder: str, count: int, act: Callable[..., Any], given: tuple[Any, ...]
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # enable_parallelism divides by it; a CPU has none
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count
    )
    torch.save(act(rank, *given), Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()
