"""The hidden folder beside a job's folder, in which it is made: one owner, stale ones repaired.

    .unfinished-<hash of the name>/
        lock    held with flock by the process that works there; holds the name it works for
        new/    the folder of the job, being filled
        old/    what the job's folder held before, from one rename to the next

Whether a workplace is left over says the lock, which the system frees with the process, not its
age. Where the file system has no locks, nothing is taken for left over.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from time import sleep

from vidsparse.jobs.layout import METRICS, files_of

try:
    import fcntl
except ImportError:  # no POSIX system: no locks
    fcntl = None  # type: ignore[assignment]

PREFIX = ".unfinished-"
TRIES, PAUSE = 40, 0.05  # seconds: of the pause between two tries


class Busy(OSError):
    """Another process works there."""


class Workplace:
    """Of one target folder. `enter` makes it and takes the lock, `leave` removes it."""

    def __init__(self, target: Path) -> None:
        self.target = target
        digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]
        self.path = target.parent / f"{PREFIX}{digest}"
        self.new, self.old = self.path / "new", self.path / "old"
        self._lock: int | None = None

    def enter(self) -> None:
        """Own the workplace, in which `new` is an empty folder. Raises OSError; Busy is one."""
        for left in range(TRIES, -1, -1):
            with suppress(FileNotFoundError):  # its owner has just removed it
                self.path.mkdir(exist_ok=True)
                self._lock = _lock(self.path)
            if self._lock is not None:
                break
            if not left and not self.target.parent.is_dir():
                raise FileNotFoundError(errno.ENOENT, "its folder vanished", str(self.target))
            if not left:  # a sweep holds it for a moment, a job for long
                raise Busy(errno.EBUSY, "another run is writing there now", str(self.target))
            sleep(PAUSE)
        assert self._lock is not None
        try:
            os.write(self._lock, os.fsencode(self.target.name))
            self.repair()
            self.new.mkdir()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Remove the workplace and free it. Twice does no harm."""
        if self._lock is not None:
            with suppress(OSError):
                _remove(self.new)
            _unlock(self.path, self._lock)
            self._lock = None

    def repair(self) -> None:
        """Finish what a process that was killed has left here; the lock is held.

        A complete new folder takes its place if nothing is there, else the old one comes back.
        """
        if (self.new / METRICS).is_file():
            try:
                os.rename(self.new, self.target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        if self.old.exists():
            if self.target.exists():
                self.clear_old()
            else:
                os.rename(self.old, self.target)
        _remove(self.new)

    def clear_old(self) -> None:
        """Move what is not of the old job from `old` to the target, then remove `old`."""
        ours = files_of(self.old)
        for entry in list(self.old.iterdir()):
            place = self.target / entry.name
            if entry.name not in ours and not os.path.lexists(place):
                os.rename(entry, place)
        _remove(self.old)


def sweep(parent: Path) -> None:
    """Repair and remove the workplaces in a folder whose processes are gone."""
    for path in parent.glob(f"{PREFIX}*"):
        if not re.fullmatch("[0-9a-f]{12}", path.name.removeprefix(PREFIX)):
            continue
        with suppress(OSError):  # what cannot be repaired now stays for the next run
            if not (path / "lock").exists():
                path.rmdir()  # its process ended before it had the lock
                continue
            lock = _lock(path)
            if lock is None:
                continue
            try:
                name = os.fsdecode((path / "lock").read_bytes())
                left = Workplace(parent / name) if name else None
                if left is not None and left.path == path:
                    left.repair()
            finally:
                _unlock(path, lock)


def _lock(path: Path) -> int | None:
    """Handle of a workplace's lock; None if another process has it. Raises OSError."""
    file = path / "lock"
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(file)):  # else its owner has removed it
            return handle
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):  # this file system has no locks
            if not os.fstat(handle).st_size:
                return handle
            os.close(handle)
            what = f"a run is writing there, or was killed; if it was, remove {path}"
            raise Busy(errno.EBUSY, what, str(path)) from error
    os.close(handle)
    return None


def _unlock(path: Path, handle: int) -> None:
    """Free a workplace; it is removed unless something in it could not be."""
    if not any((path / name).exists() for name in ("new", "old")):
        with suppress(OSError):
            (path / "lock").unlink()
        with suppress(OSError):
            path.rmdir()
    os.close(handle)


def _remove(folder: Path) -> None:
    """Remove a folder in which a dying encoder may still open a file."""
    for left in range(TRIES, -1, -1):
        try:
            if folder.exists():
                shutil.rmtree(folder)
            return
        except OSError:
            if not left:
                raise
            sleep(PAUSE)
