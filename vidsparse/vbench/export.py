"""Arms of clips -> folders as VBench reads them, and a manifest that finds the way back.

DIR/<arm>/videos/   the clips alone, mp4, one fixed setting; VBench-2.0: a folder per dimension
DIR/<arm>/prompts.json   file name -> prompt
DIR/manifest.json   file -> arm, prompt, seed, sha256 of its source, how it was encoded
DIR/README.txt      how to run VBench on it
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any

from vidsparse.compare.arms import ClipFile
from vidsparse.compare.measure import sha256
from vidsparse.interrupts import check, held, interruptible
from vidsparse.quality.frames import iter_frames, write_preview
from vidsparse.vbench import names
from vidsparse.vbench.dimensions import SECOND, SECOND_CUSTOM
from vidsparse.vbench.placing import Placed, Rules, read_list
from vidsparse.vbench.readme import readme
from vidsparse.vbench.samples import folders as folders_of
from vidsparse.vbench.samples import numbered, open_arms

SCHEMA = "vidsparse.vbench/1"
MANIFEST, PROMPTS, VIDEOS = "manifest.json", "prompts.json", "videos"
ENCODE = "libx264, crf 10, yuv420p; odd sides get their last row or column twice"
"""What `write_preview` does at scale 1; the same for every arm."""
KEPT = "the source itself"
JOINED = ("arm", "clip", "prompt", "sha256")
"""What of a clip's line the results of VBench are joined by."""


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    sources: folder -> name of its arm, None: its preset. version: of VBench, 1 or 2. custom: names
    of our own and prompts.json, instead of those that the prompts of the benchmark have. fps: of
    clips that do not say. full_info: VBench's own list of prompts, to check against; it also says
    the dimensions. dimensions: of VBench-2.0, that all clips are for.
    """

    sources: Sequence[tuple[Path, str | None]]
    out: Path
    version: int = 1
    custom: bool = False
    fps: float | None = None
    full_info: Path | None = None
    dimensions: tuple[str, ...] = ()


class Listener:
    """Hears of progress; this one stays silent."""

    def say(self, text: str) -> None:
        """A line for the user."""

    def begin(self, clips: int) -> None:
        """So many clips are to be written."""

    def clip(self, arm: str, name: str) -> None:
        """One begins."""

    def end(self) -> None:
        """All are written, or it was broken off."""


def export(request: Request, listener: Listener | None = None) -> dict[str, Any]:
    """Write all, as one act; returns the manifest. Raises ValueError for a user's mistake."""
    listener = listener or Listener()
    _check(request)
    arms = open_arms(request.sources)
    rules = _rules(request)
    placed = {name: rules.place(samples) for name, samples in numbered(arms).items()}
    for note in rules.notes(placed):
        listener.say(f"note: {note}")
    folders = folders_of(arms)
    with whole(request.out) as folder:
        listener.begin(sum(map(len, placed.values())))
        try:
            clips: dict[str, Any] = {}
            for name, found in placed.items():
                clips |= _write_arm(folder, folders[name], name, found, request, listener)
        finally:
            listener.end()
        manifest = {
            "schema": SCHEMA,
            "version": request.version,
            "input": "custom" if request.custom else "standard",
            "encode": ENCODE,
            "arms": {folder: name for name, folder in folders.items()},
            "clips": clips,
        }
        (folder / "README.txt").write_text(readme(manifest), encoding="utf-8")
        text = json.dumps(manifest, indent=1)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Yield a hidden folder that takes the place of `out` at the end; after a failure nothing does.

    out: missing, empty, or an earlier export in which nothing else lies, which is replaced.
    Interrupts wait inside, but in `interruptible`. Raises ValueError for any other.
    """
    out = Path(os.path.realpath(out.expanduser()))
    with held():
        _check_place(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".vbench-", dir=out.parent))
        try:
            (fresh := aside / "new").mkdir()
            yield fresh
            check()
            _check_place(out)
            if out.exists():
                os.rename(out, aside / "old")
            try:
                os.rename(fresh, out)
            except OSError:
                with suppress(OSError):
                    os.rename(aside / "old", out)
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def read_manifest(file: Path) -> dict[str, Any]:
    """Of an export. Raises ValueError for what is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known = content["schema"] == SCHEMA and isinstance(content["arms"], dict)
        known &= all(line[key] is not None for line in content["clips"].values() for key in JOINED)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        known = False
    if not known:
        raise ValueError(f"{file} is no manifest that `vidsparse vbench export` wrote")
    return dict(content)


def _check(request: Request) -> None:
    if not request.sources:
        raise ValueError("--from is missing: name at least one folder")
    if request.version not in (1, 2):
        raise ValueError(f"--version {request.version}: there are 1 (VBench 0.1.5) and 2 (2.0)")
    if request.fps is not None and not (isfinite(request.fps) and request.fps > 0):
        raise ValueError(f"--fps {request.fps}: expected a positive number")
    if request.version == 1 and request.dimensions:
        raise ValueError("--dimension is for --version 2: VBench 0.1.5 has one folder for all")
    allowed = SECOND_CUSTOM if request.custom else SECOND
    for name in request.dimensions:
        if name not in allowed:
            raise ValueError(f"--dimension {name}: there are {', '.join(allowed)}")
    if request.version == 2 and not request.dimensions and not request.full_info:
        raise ValueError(
            "VBench-2.0 has a folder per dimension: say which with --dimension, or give its list "
            "of prompts, --full-info VBench2_full_info.json"
        )
    _check_place(Path(os.path.realpath(request.out.expanduser())))


def _check_place(out: Path) -> None:
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise ValueError(f"--out {out} is a file, expected a folder")
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if not p.is_dir()}
    if not there:
        return
    try:
        manifest = read_manifest(out / MANIFEST)
    except ValueError:
        raise ValueError(f"--out {out} is not empty; choose another folder") from None
    ours = {*manifest["clips"], MANIFEST, "README.txt"}
    ours |= {f"{folder}/{PROMPTS}" for folder in manifest["arms"]}
    if foreign := sorted(there - ours):
        raise ValueError(
            f"--out {out} is an export, but {foreign[0]} is no part of it; choose another folder"
        )


def _rules(request: Request) -> Rules:
    listed = read_list(request.full_info, request.version) if request.full_info else {}
    return Rules(request.version, request.custom, request.dimensions, listed, request.full_info)


def _write_arm(
    folder: Path,
    place: str,
    arm: str,
    placed: Sequence[Placed],
    request: Request,
    listener: Listener,
) -> dict[str, Any]:
    """Write an arm's clips and prompts; returns their lines of the manifest."""
    lines: dict[str, Any] = {}
    prompts: dict[str, str] = {}
    for one in placed:
        sample = one.sample
        listener.clip(arm, one.name)
        first: Path | None = None
        for dimension in one.folders:
            videos = folder / place / VIDEOS / dimension
            videos.mkdir(parents=True, exist_ok=True)
            target = videos / one.name
            if os.path.lexists(target):
                raise ValueError(
                    f"{request.out}: this file system ignores case, and two prompts differ by it "
                    f"alone: {one.name!r}; write to another one"
                )
            encoded = _put(sample.file, target, request.fps, first)
            first = first or target
            prompts[f"{dimension}/{one.name}".lstrip("/")] = sample.prompt
            job = sample.file.sidecar or {}
            lines[target.relative_to(folder).as_posix()] = {
                "arm": arm,
                "clip": sample.file.name,
                "prompt": sample.prompt,
                "index": sample.index,
                "dimension": dimension or None,
                "seed": job.get("seed"),
                "sha256": sha256(sample.file.clip),
                "encode": encoded,
            }
    text = json.dumps(prompts, indent=1)
    (folder / place / PROMPTS).write_text(text + "\n", encoding="utf-8")
    return lines


def _put(file: ClipFile, target: Path, fps: float | None, first: Path | None) -> str:
    """Write a clip as mp4, or link it; first: where it is already. Returns how it was encoded."""
    source = file.clip.path
    kept = not file.clip.lossless and source.suffix.lower() == names.SUFFIX
    if first is not None or kept:
        _link(first or source, target)
        return KEPT if kept else ENCODE
    rate = (file.sidecar or {}).get("fps") or file.clip.fps or fps
    if rate is None:
        raise ValueError(f"{source} does not say its frames per second; give --fps")
    with interruptible():
        frames = iter_frames(file.clip, str(source))
        head = next(frames, None)
        if head is None:
            raise ValueError(f"{source} holds no frames")
        write_preview(target, chain([head], frames), rate)
    return ENCODE


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
