"""Ray Data: a pool of actors, each with a pipeline of its own, on this machine or on a cluster.

A task whose actor dies is begun again by another one. Ray does so without end, workers count.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vidsparse.batch.task import Broken, Outcome, Resources, Task
from vidsparse.batch.worker import Worker
from vidsparse.compare.run import cores
from vidsparse.generate.model_files import InputError, first_line

CURE = (
    "`ray status` says what runs, `ray start --head` starts a cluster; one with tokens wants "
    "RAY_AUTH_MODE=token"
)
REACH = 10.0  # seconds for a connection
STORE = 100 * 2**20
"""Bytes for objects on this machine: tasks and outcomes are small, videos go to the disk."""

SETTINGS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # an actor without a GPU keeps the variables it has
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_USAGE_STATS_ENABLED": "0",
}
SAYS = ("enable_progress_bars", "print_on_execution_start")
"""Settings of Ray Data that are off, as the batch has one bar of its own."""


class Actor:
    """A worker in a process of Ray."""

    def __init__(self, tasks: Sequence[Task], worker: Worker) -> None:
        self.tasks, self.worker = tasks, worker

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """place: of tasks -> their outcomes, pickled."""
        made = [self.worker(self.tasks[int(place)]) for place in batch["place"]]
        return {"outcome": [pickle.dumps(outcome) for outcome in made]}


def run(tasks: Sequence[Task], worker: Worker) -> Iterator[Outcome]:
    """As `vidsparse.batch` says."""
    _check(worker.resources)
    with _connected(worker) as (size, needs):
        import ray
        from ray.data import ActorPoolStrategy

        actors = min(size, len(tasks))
        items = [{"place": place} for place in range(len(tasks))]
        places = ray.data.from_items(items, override_num_blocks=len(tasks))
        # One task in flight for each actor: a second one would wait while others are idle.
        pool = ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1)
        made = places.map_batches(
            Actor,
            fn_constructor_args=(tasks, worker.on(worker.device)),
            batch_size=1,
            compute=pool,
            **needs,
        )
        try:
            for batch in made.iter_batches(batch_size=1, prefetch_batches=0):
                yield pickle.loads(batch["outcome"][0])
        except ray.exceptions.RayError as error:
            raise Broken(f"Ray has given up: {first_line(error)}") from error


def _check(asked: Resources) -> None:
    """Raise InputError for what needs no Ray to be refused."""
    if asked.device.startswith("cuda:"):
        raise InputError(
            f"--device {asked.device}: --engine ray gives each worker its GPU; take --device cuda"
        )
    if asked.device == "cpu" and asked.gpus is not None:
        raise InputError(f"--gpus-per-worker {asked.gpus:g}: on a CPU there are none; leave it out")
    place = re.fullmatch(r"(?:ray://)?\[?([^/\]]+)\]?:(\d{1,5})", asked.address or "")
    if place:  # Ray would try for minutes, and end the process
        try:
            socket.create_connection((place[1], int(place[2])), timeout=REACH).close()
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise InputError(f"--ray-address {asked.address}: {why}; {CURE}") from error


@contextmanager
def _connected(worker: Worker) -> Iterator[tuple[int, dict[str, Any]]]:
    """Ray, as it was before at the end; yields how many actors, and what each of them needs.

    Raises InputError.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)  # read when it is imported
    try:
        import ray
        from ray.data import DataContext
    except ImportError as error:
        raise InputError(
            f"--engine ray: {first_line(error)}; pip install 'vidsparse[ray]', or take another "
            "engine"
        ) from error
    asked, ours = worker.resources, not ray.is_initialized()
    gpus = 0.0 if asked.device == "cpu" else asked.gpus or 1.0
    here = asked.address is None
    cpus = max(1, cores() // (asked.workers or 1)) if here and not gpus else 1
    if ours:
        _start(ray, asked.address, max(cores(), cpus * (asked.workers or 1)))
    context, log = DataContext.get_current(), logging.getLogger("ray.data")
    before = {name: getattr(context, name) for name in SAYS}
    level = log.level
    try:
        log.setLevel(logging.CRITICAL)  # what it raises is said once
        for name in SAYS:
            setattr(context, name, False)
        room = _all(ray, gpus)
        if gpus and here and (asked.workers or 0) > room:
            raise InputError(
                f"--workers {asked.workers}: the GPUs here have room for {room}; take a smaller "
                "--gpus-per-worker"
            )
        yield asked.workers or room, {"num_gpus": gpus, "num_cpus": cpus}
    finally:
        log.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)
        if ours:
            ray.shutdown()


def _start(ray: Any, address: str | None, cpus: int) -> None:
    """Connect, to a cluster or to one that is started here. Raises InputError."""
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    local: dict[str, Any] = {"num_cpus": cpus, "include_dashboard": False}
    local |= {"object_store_memory": STORE, "address": "local"}  # whatever RAY_ADDRESS names
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with _silent():
            ray.init(**quiet, **({"address": address} if address is not None else local))
    except Exception as error:  # of the network, of a version: none of them is ours
        where = f"--ray-address {address}" if address is not None else "--engine ray"
        raise InputError(f"{where}: {first_line(error)}; {CURE}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has set its own


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing reaches stderr inside: Ray says there, in C++, at which level it logs."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _all(ray: Any, gpus: float) -> int:
    """How many actors there is room for, without a GPU one. Raises InputError for none."""
    if not gpus:
        return 1
    found = ray.cluster_resources().get("GPU", 0.0)
    room = int(found / gpus + 1e-6)
    if not room:
        raise InputError(
            f"--gpus-per-worker {gpus:g}: Ray sees {found:g} GPUs; take --device cpu, or a cluster "
            "that has some by --ray-address"
        )
    return room
