"""From folders to a comparison on file: what `vidsparse compare` does.

from vidsparse.compare.run import Request, compare
comparison = compare(Request(Path("dense"), {"fast": Path("fast")}, Path("out")))
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite, isinf
from pathlib import Path
from typing import Literal

from vidsparse.compare import floor
from vidsparse.compare.arms import DECISIVE, Arm, ClipFile, align, check_conditions, open_arm
from vidsparse.compare.comparison import Comparison, Row
from vidsparse.compare.conventions import CONVENTIONS
from vidsparse.compare.files import write
from vidsparse.compare.measure import KEPT, OPTIONAL, Measured, Settings, measure
from vidsparse.compare.thresholds import Threshold

REPORT_MB = 15.0
"""Bound of report.html, if nobody sets one, in megabytes: what an issue tracker still takes."""
MOST_WORKERS = 256
"""Each holds a frame of both arms."""


class InputError(ValueError):
    """A user's mistake; the message is one line that says the cure."""


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    reference: file or folder. tests: name, or a number as text if it has none -> file or folder.
    out: folder to write to. align: how clips find each other, see `arms.align`. thresholds: what
    arms must reach. allow_lossy: thresholds may judge lossy files. allow_mismatch: fields of
    `arms.DECISIVE` that may differ. report_mb: upper bound of report.html, in megabytes.
    command: that asks, for the report.
    """

    reference: Path
    tests: Sequence[tuple[str | None, Path]]
    out: Path
    align: Literal["auto", "name", "manifest"] = "auto"
    settings: Settings = field(default_factory=Settings)
    thresholds: tuple[Threshold, ...] = ()
    allow_lossy: bool = False
    allow_mismatch: tuple[str, ...] = ()
    report_mb: float = REPORT_MB
    command: str = ""


class Listener:
    """Hears of progress; this one stays silent."""

    def say(self, text: str) -> None:
        """A line for the user."""

    def begin(self, clips: int) -> None:
        """So many pairs of clips are to be measured."""

    def pair(self, arm: str, clip: str) -> None:
        """A pair of clips begins."""

    def frame(self, done: int) -> None:
        """So many frames of the pair are done."""

    def end(self) -> None:
        """All is measured, or it was broken off."""


def compare(request: Request, listener: Listener | None = None) -> Comparison:
    """Measure, judge, write. Raises InputError for a user's mistake.

    What has been measured is kept in the output folder: a run that was interrupted, or that got
    another arm, measures only what is missing.
    """
    listener = listener or Listener()
    try:
        check(request)
        reference, tests = _arms(request)
        pairs, unmatched = _pairs(reference, tests, request)
        request.out.mkdir(parents=True, exist_ok=True)
        rows = _measure(pairs, request, listener)
        listener.say("writing")
        comparison = Comparison(
            reference=reference,
            tests=tests,
            rows=rows,
            settings=request.settings,
            unmatched=unmatched,
            warnings=_warnings(rows, unmatched),
            thresholds=request.thresholds,
            allowed=request.allow_mismatch,
            command=request.command,
        )
        write(comparison, request.out, report_mb=request.report_mb)
        return comparison
    except InputError:
        raise
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        raise InputError(f"{what}{error.strerror or error}") from error
    except ValueError as error:
        raise InputError(" ".join(str(error).split())) from error


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check(request: Request) -> None:
    """Raise ValueError for what no clip is needed to refuse."""
    settings = request.settings
    for name in settings.optional:
        if name not in OPTIONAL:
            raise ValueError(
                f"--metrics {name}: there are psnr, ssim, flicker, {', '.join(OPTIONAL)}"
            )
    for name in settings.compat:
        if name not in CONVENTIONS:
            raise ValueError(f"--compat {name}: there are {', '.join(CONVENTIONS)}")
    for name in request.allow_mismatch:
        if name not in DECISIVE:
            raise ValueError(f"--allow-mismatch {name}: there are {', '.join(DECISIVE)}")
    if not 1 <= settings.workers <= MOST_WORKERS:
        raise ValueError(f"--workers {settings.workers}: expected an integer 1 .. {MOST_WORKERS}")
    if settings.fps is not None and not (isfinite(settings.fps) and settings.fps > 0):
        raise ValueError(f"--fps {settings.fps:g}: expected a positive number")
    if not 0.5 <= request.report_mb <= 1000:
        raise ValueError(f"--report-mb {request.report_mb:g}: expected a number in 0.5 .. 1000")
    if not request.tests:
        raise ValueError("--test is missing: name at least one file or folder")
    if request.out.exists() and not request.out.is_dir():
        raise ValueError(f"--out {request.out} is a file, expected a folder")
    needed = {t.measure for t in request.thresholds} & set(OPTIONAL) - set(settings.optional)
    if needed:
        raise ValueError(f"--fail-under needs --metrics {','.join(sorted(needed))}")


def _arms(request: Request) -> tuple[Arm, list[Arm]]:
    reference = open_arm(request.reference, "reference")
    tests: list[Arm] = []
    for name, path in request.tests:
        arm = open_arm(path, "test", name)
        taken = [other.name for other in tests]
        if arm.name in taken and name is not None:
            raise ValueError(f"--test {name}={path}: there are two arms named {name!r}")
        number = 2
        base = arm.name
        while arm.name in taken:
            arm = Arm(f"{base} ({number})", arm.clips)
            number += 1
        tests.append(arm)
    return reference, tests


def _pairs(
    reference: Arm, tests: Sequence[Arm], request: Request
) -> tuple[list[tuple[str, ClipFile, ClipFile]], list[str]]:
    """(arm, reference, test) of everything that is to be measured, and clips without a partner."""
    found: list[tuple[str, ClipFile, ClipFile]] = []
    unmatched: list[str] = []
    for arm in tests:
        pairs, rest = align(reference, arm, request.align)
        unmatched += [line for line in rest if line not in unmatched]
        for ours, theirs in pairs:
            check_conditions(ours, theirs, request.allow_mismatch)
            lossy = [f.clip.path for f in (ours, theirs) if not f.clip.lossless]
            if lossy and request.thresholds and not request.allow_lossy:
                raise ValueError(
                    f"{lossy[0]} is lossy: its codec can move PSNR by 9 dB either way, so "
                    "--fail-under would judge the codec; compare lossless files, or --allow-lossy"
                )
            found.append((arm.name, ours, theirs))
    return found, unmatched


def _measure(
    pairs: Sequence[tuple[str, ClipFile, ClipFile]], request: Request, listener: Listener
) -> list[Row]:
    rows: list[Row] = []
    floors: dict[Path, floor.Floor] = {}
    listener.begin(len(pairs))
    try:
        for arm, ours, theirs in pairs:
            listener.pair(arm, ours.name)
            try:
                done = measure(ours, theirs, request.settings, request.out / KEPT, listener.frame)
            except ValueError as error:
                raise ValueError(f"{ours.name} of {arm}: {error}") from error
            rows.append(Row(arm, ours, theirs, done, _floor(ours, theirs, floors)))
    finally:
        listener.end()
    return rows


def _floor(ours: ClipFile, theirs: ClipFile, known: dict[Path, floor.Floor]) -> floor.Floor | None:
    """The lower of the two files' codec floors; None if both are lossless."""
    found = []
    for file in (ours, theirs):
        if file.clip.lossless:
            continue
        path = file.clip.path
        if path not in known:
            exact = floor.exact(file.original, file.clip) if file.original else None
            known[path] = exact or floor.guessed(file.clip)
        found.append(known[path])
    return min(found, key=lambda one: one.psnr) if found else None


def _warnings(rows: Sequence[Row], unmatched: Sequence[str]) -> list[str]:
    found = []
    for row in rows:
        for file in (row.reference, row.test):
            if not file.clip.lossless and row.floor is not None:
                loss = "nothing" if isinf(row.floor.psnr) else f"about {row.floor.psnr:.1f} dB"
                found.append(
                    f"{file.clip.path.name} is lossy ({file.clip.codec}); its codec alone costs "
                    f"{loss}: its figures are not ranked with lossless ones"
                )
    if unmatched:
        found.append(f"without a counterpart, not measured: {', '.join(unmatched)}")
    first: Measured | None = rows[0].measured if rows else None
    if first is not None:
        found += [f"{name} was not measured: {why}" for name, why in first.lacking.items()]
    return list(dict.fromkeys(found))
