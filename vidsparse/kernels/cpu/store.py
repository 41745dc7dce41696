"""Figures measured on this machine: once per process, and kept on disk for the next one.

A decision that follows from a measurement must not change with the noise of the next one, or the
same seed gives another video tomorrow. So figures are kept in the user's cache folder
(`$XDG_CACHE_HOME/vidsparse`, `~/.cache/vidsparse`), a JSON file for each key. What belongs to
another machine, torch or setting has another key; what cannot be read is measured again. Without a
folder to write to, figures hold for the process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vidsparse.kernels.cpu import machine

VERSION = 4
"""Part of every key: a change of what is measured, or a faster engine, makes old figures unread."""

Figures = dict[str, float]


@dataclass(frozen=True)
class Record:
    """figures: what was measured. measured: when, local time. problem: why they were not kept on
    disk, or None. reason: what kept a part of them from being measured, or None.
    """

    figures: Figures
    measured: str
    problem: str | None = None
    reason: str | None = None


class Unmeasured(Exception):
    """A measurement could not run: `figures` stand in for it in this process, `reason` says why."""

    def __init__(self, figures: Figures, reason: str) -> None:
        super().__init__(reason)
        self.figures, self.reason = figures, reason


_records: dict[str, Record] = {}
_locks: dict[str, threading.Lock] = {}

PATIENCE = 30.0
"""Seconds to wait for another process that measures, before measuring beside it."""


def recall(
    kind: str, key: dict[str, Any], measure: Callable[[], Figures], names: Sequence[str]
) -> Record:
    """The record of a key: from this process, else from disk, else measured now and kept.

    measure: returns non-negative finite numbers by these names, or raises `Unmeasured`. Other
    threads that ask meanwhile wait; so do other processes, which then read what the first one
    measured. What one kind measures may ask for another kind, not for its own.
    """
    name = _name(kind, key)
    record = _records.get(name)
    if record is None:
        with _locks.setdefault(kind, threading.Lock()):
            record = _records.get(name)
            if record is None:
                record = _records[name] = _kept_or_measured(name, kind, key, measure, names)
    return record


def forget(disk: bool = False) -> None:
    """Measure again when next asked; with `disk`, delete the kept figures too."""
    _records.clear()
    place = folder()
    if disk and place is not None:
        for file in place.glob("cpu-*.json"):
            with suppress(OSError):
                file.unlink()


def folder() -> Path | None:
    """Where figures are kept; None where there is no home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        if os.path.isabs(given):  # relative ones are invalid by its specification
            return Path(given) / "vidsparse"
        if sys.platform == "win32":
            return Path(os.environ["LOCALAPPDATA"]) / "vidsparse" / "Cache"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "vidsparse"
        return Path.home() / ".cache" / "vidsparse"
    except (RuntimeError, KeyError):
        return None


def _name(kind: str, key: dict[str, Any]) -> str:
    text = json.dumps(_whole(kind, key), sort_keys=True)
    return f"cpu-{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _whole(kind: str, key: dict[str, Any]) -> dict[str, Any]:
    """The key in the form in which JSON gives it back."""
    whole = {"version": VERSION, "kind": kind, **machine.fingerprint(), **key}
    found: dict[str, Any] = json.loads(json.dumps(whole))
    return found


def _kept_or_measured(
    name: str,
    kind: str,
    key: dict[str, Any],
    measure: Callable[[], Figures],
    names: Sequence[str],
) -> Record:
    place, whole = folder(), _whole(kind, key)
    file = place / name if place is not None else None
    if file is not None and (record := _read(file, whole, names)):
        return record
    with _alone(file, kind):
        if file is not None and (record := _read(file, whole, names)):
            return record
        now = time.strftime("%Y-%m-%d %H:%M")
        try:
            figures = measure()
        except Unmeasured as error:
            return Record(error.figures, now, reason=error.reason)
        if file is None:
            return Record(figures, now, "this user has no home folder")
        content = {"key": whole, "figures": figures, "measured": now}
        return Record(figures, now, _write(file, content))


def _read(file: Path, whole: dict[str, Any], names: Sequence[str]) -> Record | None:
    """What a file holds, if it is whole and of this key."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        figures = {name: float(content["figures"][name]) for name in names}
        measured = str(content["measured"])
        if content["key"] != whole:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sound = all(math.isfinite(n) and n >= 0 for n in figures.values())
    return Record(figures, measured) if sound else None


def _write(file: Path, content: dict[str, Any]) -> str | None:
    """All or nothing. Returns why it could not be written, or None."""
    part = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=file.parent, prefix=".part-")
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(content, out, indent=1, sort_keys=True)
        os.replace(part, file)
    except OSError as error:
        if part is not None:
            with suppress(OSError):
                os.unlink(part)
        return f"{file.parent} cannot be written: {error.strerror or error}"
    return None


@contextmanager
def _alone(file: Path | None, kind: str) -> Iterator[None]:
    """Hold the lock of all processes for measuring a kind, where there are such locks.

    Of processes that start together the first one measures; the others read its figures.
    """
    with ExitStack() as held:
        if file is not None:
            with suppress(ImportError, OSError):
                import fcntl

                file.parent.mkdir(parents=True, exist_ok=True)
                lock = held.enter_context(open(file.parent / f".measuring-{kind}", "w"))
                end = time.monotonic() + PATIENCE
                while not _locked(fcntl, lock) and time.monotonic() < end:
                    time.sleep(0.02)
        yield


def _locked(fcntl: Any, lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if hasattr(os, "register_at_fork"):  # the lock may be held by a thread that the child has not
    os.register_at_fork(after_in_child=_locks.clear)
