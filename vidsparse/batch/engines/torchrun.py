"""torchrun: processes with equal shares of the tasks, on this machine or, with a shared disk, many.

Under `torchrun` or `accelerate launch` every process runs the command, takes its share of the first
one's tasks by accelerate's PartialState, and the first one waits for all. Started plainly, the
command starts torchrun itself and stays the one that a person sees.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import sleep
from typing import Any

from vidsparse.batch.task import Broken, Outcome, Task
from vidsparse.batch.worker import Worker, work
from vidsparse.compare.run import cores
from vidsparse.generate.model_files import InputError

POLL = 0.3
"""Seconds between two looks at the disk."""
SAYS = "vidsparse: "
"""How a line of a process begins that is for the user."""
PATIENCE = 60
"""Seconds that processes have to clean up when they are asked to end."""


def run(tasks: Sequence[Task], worker: Worker) -> Iterator[Outcome]:
    """As `vidsparse.batch` says."""
    if worker.device.startswith("cuda:"):
        raise InputError(
            f"--device {worker.device}: --engine torchrun gives each process its GPU; take "
            "--device cuda"
        )
    if _launched():
        if worker.resources.workers is not None:
            raise InputError(
                f"--workers {worker.resources.workers}: the command runs under a launcher, which "
                "decides on that; leave it out"
            )
        yield from _ranks(tasks, worker)
    elif tasks:
        yield from _start(tasks, worker, _processes(worker))


def follows() -> bool:
    """Whether this is a process of a launcher, and not its first."""
    return _launched() and os.environ["RANK"] != "0"


def share(tasks: Sequence[Task], worker: Worker) -> tuple[Any, list[Task], Worker]:
    """PartialState, the tasks of this process among those of the first, and its worker."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState(cpu=worker.device == "cpu")
    everyone: list[Any] = [list(tasks), worker.run]
    if state.num_processes > 1:
        broadcast_object_list(everyone)
    place = f":{state.local_process_index}" if worker.device == "cuda" else ""
    mine = worker.on(f"{worker.device}{place}")
    mine.listener, mine.run = worker.listener, everyone[1]
    with state.split_between_processes(everyone[0]) as own:
        return state, own, mine


def _launched() -> bool:
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= set(os.environ)


def _processes(worker: Worker) -> int:
    """How many to start here. Raises InputError."""
    import torch

    asked = worker.resources.workers
    found = torch.cuda.device_count() if worker.device != "cpu" else 0
    if asked is None and not found:
        raise InputError(
            "--engine torchrun: there is no GPU to count; add --workers N for N processes here, or "
            "start it on every machine with torchrun --nproc-per-node N -m vidsparse batch ..."
        )
    if asked is not None and found and asked > found:
        raise InputError(
            f"--workers {asked}: there are {found} GPUs here, and each process has its own; ray "
            "shares them by --gpus-per-worker"
        )
    return asked or found


def _ranks(tasks: Sequence[Task], worker: Worker) -> Iterator[Outcome]:
    """A process of a launcher: its share; of the first one then those of all others."""
    state, own, mine = share(tasks, worker)
    if state.process_index:  # the first one speaks for all
        _serve(own, mine)
        sys.exit(0)
    left = {task.id: task for task in tasks}
    for outcome in work(own, mine):
        if left.pop(outcome.id, None) is not None:  # else another run has made it
            yield outcome
        yield from _ended(left, mine)
    while left:
        sleep(POLL)
        yield from _ended(left, mine)


def _start(tasks: Sequence[Task], worker: Worker, processes: int) -> Iterator[Outcome]:
    """torchrun on this machine, watched by what it writes. Raises Broken, InputError."""
    with tempfile.TemporaryDirectory(prefix="vidsparse-batch-") as folder:
        file, log = Path(folder) / "tasks.pickle", Path(folder) / "log"
        file.write_bytes(pickle.dumps((list(tasks), worker.on(worker.device))))
        threads = str(max(1, cores() // processes))
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), "-m", __name__, str(file)]
        left = {task.id: task for task in tasks}
        with log.open("wb") as said:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment
            )
            try:
                while child.poll() is None:
                    sleep(POLL)
                    yield from _ended(left, worker)
                yield from _ended(left, worker)
            finally:
                _end(child)
        text = log.read_text(errors="replace")
    if child.returncode or left:
        why = next((line for line in text.splitlines() if line.startswith(SAYS)), None)
        if why is not None:
            raise InputError(why.removeprefix(SAYS))
        raise Broken(_what_died(text, child.returncode))


def _serve(own: Sequence[Task], worker: Worker) -> None:
    """Work for another process, which learns of it from the disk."""
    for outcome in work(own, worker):
        if outcome.status == "unfit":
            sys.exit(f"{SAYS}{outcome.error}")


def _ended(left: dict[str, Task], worker: Worker) -> Iterator[Outcome]:
    """What has come to an end of the tasks that are left, and is not left any more."""
    for task in list(left.values()):
        outcome = worker.look(task)
        if outcome is not None:
            del left[task.id]
            yield outcome


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask it to end, and wait."""
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _what_died(text: str, code: int) -> str:
    found = [
        line.strip() for line in text.splitlines() if "Error" in line and "ChildFailed" not in line
    ]
    exits = [
        line.partition("exitcode")[2].strip(" :")
        for line in text.splitlines()
        if "exitcode" in line
    ]
    why = f"exit code {exits[-1]}" if exits else f"torchrun ended with {code}"
    last = f"; its last error: {found[-1][:300]}" if found else ""
    return f"a process of --engine torchrun died ({why}), and torchrun ended the others{last}"


def main(file: str) -> None:
    """A process that `run` has started."""
    from vidsparse import interrupts

    tasks, worker = pickle.loads(Path(file).read_bytes())
    with interrupts.listening():
        _, own, mine = share(tasks, worker)
        _serve(own, mine)


if __name__ == "__main__":
    main(sys.argv[1])
