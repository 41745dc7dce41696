"""A job's folder appears as one act: checked before, filled aside, renamed into place.

What was there stays until the new folder is complete. In between two renames nothing is there for
a moment; a process that is killed just then leaves both folders, and the next one finishes.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vidsparse.interrupts import check, held
from vidsparse.jobs.layout import ABOUT, SCHEMAS, read_sidecar
from vidsparse.jobs.workplace import Busy, Workplace, sweep


class Refused(ValueError):
    """A folder that must not, or cannot, be written; why and the cure, in one line."""


class NotPlaced(OSError):
    """The complete folder could not take its place; where it is now."""


@dataclass
class Stage:
    """A job's folder in the making. folder: to fill. note: what will be replaced, or empty."""

    folder: Path
    note: str
    target: Path
    published: bool = False

    def keep(self) -> Path:
        """Move the folder, unfinished, to a free name beside the target; returns that."""
        number = 1
        while os.path.lexists(place := self.target.with_name(f"{self.target.name}-part{number}")):
            number += 1
        os.rename(self.folder, place)
        return place


@contextmanager
def publishing(out: Path, id: str, *, overwrite: bool = False) -> Iterator[Stage]:
    """Yield a stage whose folder takes the place of `out` at the end; after a failure nothing does.

    out: missing, empty, or the folder of the job `id`; with `overwrite`, any folder that can be
    replaced. Entries in it that no job wrote are in the new one too. Interrupts wait inside, but in
    `interruptible`. Raises Refused before anything is done, NotPlaced at the end.
    """
    with held():
        try:
            target = Path(os.path.realpath(out))
            note = check_target(target, id, overwrite)
            missing = [path for path in target.parents if not path.exists()]
            place = Workplace(target)
        except (OSError, ValueError) as error:
            raise _refusal(out, error) from error
        try:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                sweep(target.parent)
                place.enter()
                named = place.new / target.name  # may a folder be called that here?
                named.mkdir()
                named.rmdir()
                note = check_target(target, id, overwrite)  # a repair may have brought it back
            except (OSError, ValueError) as error:
                raise _refusal(out, error) from error
            stage = Stage(place.new, note, target)
            yield stage
            check()
            try:
                _publish(place, id, overwrite)
            except OSError as error:
                kept = _set_aside(stage)
                why = f"{out}: cannot be put in place: {error}; the complete folder is {kept}"
                raise NotPlaced(why) from error
            stage.published = True
        finally:
            place.leave()
            for path in missing:
                with suppress(OSError):  # not made, or in use
                    path.rmdir()


def check_target(target: Path, id: str, overwrite: bool) -> str:
    """What will be replaced in a folder, in a sentence. Raises Refused, OSError."""
    try:
        os.lstat(target)
    except FileNotFoundError:
        return ""
    if not target.is_dir():
        raise Refused("this is no folder; choose another name")
    if _mounted(target) or Path.cwd().is_relative_to(target):
        what = "a file system is mounted on it" if _mounted(target) else "this command runs in it"
        raise Refused(f"{what}, so it cannot be replaced as a whole; name a folder below it")
    names = sorted(os.listdir(target))
    folders = [name for name in ABOUT if (target / name).is_dir()]
    if folders:
        raise Refused(f"a folder is called {folders[0]} there; move it away")
    if not names:
        return ""
    sidecar = read_sidecar(target, SCHEMAS)
    if sidecar is not None and sidecar.get("id") == id:
        return "it holds this job already, which is replaced once the new one is complete"
    if sidecar is not None:
        preset = sidecar.get("preset")
        preset = preset.get("name") if isinstance(preset, dict) else preset
        prompt = str(sidecar.get("prompt"))
        prompt = prompt if len(prompt) <= 60 else prompt[:60] + "..."
        what = f'another job, "{prompt}", preset {preset}, seed {sidecar.get("seed")}'
    else:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        what = ", ".join(names[:3]) + more
    if overwrite:
        return f"it holds {what}: files of the same names are replaced, others stay"
    raise Refused(f"it holds {what}; choose another folder, or replace it with --overwrite")


def _publish(place: Workplace, id: str, overwrite: bool) -> None:
    try:
        check_target(place.target, id, overwrite)
    except Refused as error:  # somebody has come in between
        raise FileExistsError(f"{place.target}: {error}") from error
    _sync(place.new)
    if place.target.exists():
        place.new.chmod(stat.S_IMODE(place.target.stat().st_mode))
        os.rename(place.target, place.old)
    try:
        os.rename(place.new, place.target)
    except OSError:
        if place.old.exists():
            os.rename(place.old, place.target)
        raise
    with suppress(OSError):  # the next run tries again
        if place.old.exists():
            place.clear_old()
    with suppress(OSError):
        _flush(place.target.parent)


def _set_aside(stage: Stage) -> Path:
    """Where a complete folder is now that cannot be put in its place."""
    try:
        return stage.keep()
    except OSError:
        place = Path(tempfile.mkdtemp(prefix="vidsparse-"))
        return Path(shutil.copytree(stage.folder, place, dirs_exist_ok=True))


def _refusal(out: Path, error: Exception) -> Refused:
    if isinstance(error, OSError) and not isinstance(error, Busy):
        return Refused(f"{out}: cannot write there: {error.strerror or error}")
    return Refused(f"{out}: {error.strerror if isinstance(error, OSError) else error}")


def _mounted(folder: Path) -> bool:
    """Is a file system mounted on it? ismount misses a part of the same one, mounted twice."""
    if os.path.ismount(folder):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    name = os.fsencode(folder)
    for plain, written in (
        (b"\\", b"\\134"),
        (b" ", b"\\040"),
        (b"\t", b"\\011"),
        (b"\n", b"\\012"),
    ):
        name = name.replace(plain, written)
    return any(line.split()[4] == name for line in lines)


def _sync(folder: Path) -> None:
    """Wait until the files of a folder are on the disk."""
    for path in folder.iterdir():
        _flush(path)
    with suppress(OSError):  # not all file systems can do it for folders
        _flush(folder)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
