"""A task belongs to one process at a time, on this machine or on another that shares the disk.

    .batch/<id>.lock    held, by `filelock`, while the task is made; the system frees it with the
                        process
    .batch/<id>.json    how often the task was begun in a run; gone when it is made or has failed

The lock of a task that is done is removed: whoever gets it later looks first whether it is done. A
disk without locks of the system is refused: files that stand for locks would outlive a process that
is killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

PLACE = ".batch"
POLL = 0.5  # seconds between two tries of a run that waits


@contextmanager
def claimed(home: Path, id: str, *, waits: bool) -> Iterator[bool]:
    """Yield whether the task is ours inside. waits: until whoever has it lets go. Raises OSError.

    home: folder of the batch, in which `prepare_home` was called.
    """
    lock = _lock(home, id, timeout=-1 if waits else 0)
    try:
        lock.acquire(poll_interval=POLL)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _lock(home: Path, name: str, timeout: float = -1) -> BaseFileLock:
    path = home / PLACE / f"{name}.lock"
    return FileLock(path, timeout=timeout, fallback_to_soft=False)


def prepare_home(home: Path) -> None:
    """Make the folder of a batch and try out what claims need. Raises OSError."""
    (home / PLACE).mkdir(parents=True, exist_ok=True)
    with _lock(home, "trial"):
        pass


def begin(home: Path, id: str, run: str) -> int:
    """How often a run has begun the task, this time too. The task is claimed. Raises OSError."""
    file = home / PLACE / f"{id}.json"
    count = 0
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(file.read_text(encoding="utf-8"))
        count = int(content["begun"]) if content["run"] == run else 0
    file.write_text(json.dumps({"run": run, "begun": count + 1}), encoding="utf-8")
    return count + 1


def end(home: Path, id: str, *, done: bool) -> None:
    """Forget the count of a claimed task; a done one's lock too."""
    for suffix in (".json", ".lock") if done else (".json",):
        with suppress(OSError):
            (home / PLACE / f"{id}{suffix}").unlink()
