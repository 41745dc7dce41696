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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from vidsparse.compare.arms import Arm, ClipFile, open_arm
from vidsparse.compare.measure import sha256
from vidsparse.interrupts import check, held, interruptible
from vidsparse.jobs.layout import slug
from vidsparse.quality.frames import Clip, iter_frames, write_preview
from vidsparse.vbench import names
from vidsparse.vbench.dimensions import (
    DIVERSITY_SAMPLES,
    FLICKER_SAMPLES,
    SAMPLES,
    SECOND,
    SECOND_CUSTOM,
    SECOND_SAMPLES,
)
from vidsparse.vbench.readme import readme

SCHEMA = "vidsparse.vbench/1"
MANIFEST, PROMPTS, VIDEOS = "manifest.json", "prompts.json", "videos"
ENCODE = "libx264, crf 10, yuv420p; odd sides get their last row or column twice"
"""What `write_preview` does at scale 1; the same for every arm."""
KEPT = "the source itself"


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


@dataclass(frozen=True)
class Sample:
    """A clip with its place: prompt, number among the samples of the prompt, folders below videos/.

    folders: "" for VBench 0.1.5.
    """

    file: ClipFile
    prompt: str
    index: int
    folders: tuple[str, ...] = ("",)
    name: str = field(default="", compare=False)


def export(request: Request, listener: Listener | None = None) -> dict[str, Any]:
    """Write all, as one act; returns the manifest. Raises ValueError for a user's mistake."""
    listener = listener or Listener()
    _check(request)
    arms = _arms(request)
    samples = {arm.name: list(_samples(arm, _numbers(arms))) for arm in arms}
    listed = _listed(request.full_info) if request.full_info else {}
    placed = {name: _placed(found, request, listed) for name, found in samples.items()}
    _notes(placed, request, listed, listener)
    folders = _folders(arms)
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
        known = content["schema"] == SCHEMA and isinstance(content["clips"], dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
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


def _arms(request: Request) -> list[Arm]:
    """The arms of all sources; dense videos that lie beside sparse ones are an arm of their own."""
    arms: dict[str, dict[str, ClipFile]] = {}
    dense: dict[str, ClipFile] = {}
    for path, name in request.sources:
        arm = open_arm(path, "test", name)
        if arm.name in arms:
            raise ValueError(f"--from {path}: there are two arms named {arm.name!r}; add =NAME")
        arms[arm.name] = dict(arm.clips)
        if not any(file.arm == "sparse" for file in arm.clips.values()):
            continue
        for clip, file in open_arm(path, "reference").clips.items():
            if file.arm != "dense":
                continue
            first = dense.setdefault(clip, file)
            if first is not file and not _equal(first.clip, file.clip):
                raise ValueError(
                    f"{first.clip.path} and {file.clip.path} are dense videos of one prompt and "
                    "seed, and differ: export one of their folders at a time"
                )
    if dense:
        arms["dense"] = {**dense, **arms.get("dense", {})}
    return [Arm(name, clips) for name, clips in arms.items()]


def _equal(a: Clip, b: Clip) -> bool:
    """Whether two clips show the same frames; their files differ by random identifiers."""
    pairs = zip_longest(iter_frames(a), iter_frames(b))
    return all(x is not None and y is not None and np.array_equal(x, y) for x, y in pairs)


def _folders(arms: Sequence[Arm]) -> dict[str, str]:
    """Name of an arm -> its folder. Raises ValueError if two would share one."""
    found: dict[str, str] = {}
    for arm in arms:
        folder = slug(arm.name) or "arm"
        same = [other for other, taken in found.items() if taken == folder]
        if same:
            raise ValueError(f"arms {same[0]!r} and {arm.name!r} would share a folder; add =NAME")
        found[arm.name] = folder
    return found


def _key(file: ClipFile) -> tuple[str, tuple[Any, ...]]:
    """(prompt, what tells its samples apart) of a clip."""
    job = file.sidecar
    if job is None:
        return names.prompt_of(file.name + names.SUFFIX), (
            names.index_of(file.name + names.SUFFIX),
        )
    return str(job["prompt"]), tuple(job[k] for k in ("seed", "height", "width", "frames"))


def _numbers(arms: Sequence[Arm]) -> dict[tuple[str, tuple[Any, ...]], int]:
    """Numbers of the samples: those of a prompt in the order of their seeds, alike in all arms."""
    by_prompt: dict[str, set[tuple[Any, ...]]] = {}
    for arm in arms:
        for file in arm.clips.values():
            prompt, sample = _key(file)
            by_prompt.setdefault(prompt, set()).add(sample)
    numbers = {}
    for prompt, found in by_prompt.items():
        if len({len(sample) for sample in found}) > 1:
            raise ValueError(
                f"{prompt!r}: some clips say their seed and some do not, so they cannot be matched"
            )
        for n, sample in enumerate(sorted(found)):
            numbers[prompt, sample] = sample[0] if len(sample) == 1 else n
    return numbers


def _samples(arm: Arm, numbers: Mapping[tuple[str, tuple[Any, ...]], int]) -> Iterator[Sample]:
    taken: dict[Any, ClipFile] = {}
    for file in arm.clips.values():
        key = _key(file)
        if key in taken:
            raise ValueError(
                f"{taken[key].clip.path} and {file.clip.path} show the same prompt and seed at "
                "the same size: leave one of them"
            )
        taken[key] = file
        yield Sample(file, key[0], numbers[key])


def _listed(file: Path) -> dict[str, set[str]]:
    """Prompt -> dimensions, of VBench's own list. Raises ValueError for anything else."""
    found: dict[str, set[str]] = {}
    try:
        for entry in json.loads(file.read_text(encoding="utf-8")):
            found.setdefault(str(entry["prompt_en"]), set()).update(entry["dimension"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"--full-info {file}: expected the list of prompts that comes with VBench ({error})"
        ) from error
    return found


def _placed(
    samples: Sequence[Sample], request: Request, listed: Mapping[str, set[str]]
) -> list[Sample]:
    """With the folders and the name of every sample. Raises ValueError for what VBench ignores."""
    found = []
    for sample in samples:
        if request.full_info and not request.custom and sample.prompt not in listed:
            raise ValueError(
                f"{sample.prompt!r} is no prompt of {request.full_info}, so VBench would never "
                "read the clip; --custom exports clips of other prompts"
            )
        dimensions = listed.get(sample.prompt, set())
        folders = request.dimensions or tuple(sorted(dimensions)) if request.version == 2 else ("",)
        if not request.custom:
            _check_number(sample, request.version, dimensions | set(folders) - {""})
        found.append((sample, folders))
    if request.custom:
        chosen = names.custom([(sample.prompt, sample.index) for sample in samples])
    else:
        call = names.second if request.version == 2 else names.standard
        chosen = [call(sample.prompt, sample.index) for sample in samples]
    placed = [
        Sample(sample.file, sample.prompt, sample.index, folders, name)
        for (sample, folders), name in zip(found, chosen, strict=True)
    ]
    _check_names(placed)
    return placed


def _check_number(sample: Sample, version: int, dimensions: set[str]) -> None:
    if version == 2:
        most = DIVERSITY_SAMPLES if dimensions == {"Diversity"} else SECOND_SAMPLES
    else:
        most = FLICKER_SAMPLES if "temporal_flickering" in dimensions else SAMPLES
    if sample.index >= most:
        more = "" if dimensions else "; with --full-info 25 are taken where VBench filters them"
        raise ValueError(
            f"{sample.prompt!r} has a sample number {sample.index}, VBench reads 0 to {most - 1}"
            f"{more}"
        )


def _check_names(placed: Sequence[Sample]) -> None:
    taken: dict[tuple[str, str], Sample] = {}
    for sample in placed:
        for folder in sample.folders:
            other = taken.setdefault((folder, sample.name), sample)
            if other is not sample:
                raise ValueError(
                    f"{other.prompt!r} and {sample.prompt!r} would both be {sample.name!r}"
                )


def _notes(
    placed: Mapping[str, Sequence[Sample]],
    request: Request,
    listed: Mapping[str, set[str]],
    listener: Listener,
) -> None:
    everything = {(s.prompt, s.index) for found in placed.values() for s in found}
    for name, found in placed.items():
        if lacking := len(everything - {(s.prompt, s.index) for s in found}):
            listener.say(f"note: {name} lacks {lacking} of {len(everything)} clips of other arms")
        unknown = sum(s.file.sidecar is None for s in found)
        if unknown:
            listener.say(f"note: {name}: prompts of {unknown} clips are read from file names")
    if request.custom:
        return
    if not listed:
        listener.say(
            "note: whether VBench has these prompts was not checked; --full-info checks it"
        )
    elif missing := len(listed.keys() - {prompt for prompt, _ in everything}):
        listener.say(f"note: {missing} of VBench's {len(listed)} prompts have no clip")


def _write_arm(
    folder: Path,
    place: str,
    arm: str,
    samples: Sequence[Sample],
    request: Request,
    listener: Listener,
) -> dict[str, Any]:
    """Write an arm's clips and prompts; returns their lines of the manifest."""
    lines: dict[str, Any] = {}
    prompts: dict[str, str] = {}
    for sample in samples:
        listener.clip(arm, sample.name)
        first: Path | None = None
        for dimension in sample.folders:
            videos = folder / place / VIDEOS / dimension
            videos.mkdir(parents=True, exist_ok=True)
            target = videos / sample.name
            if os.path.lexists(target):
                raise ValueError(
                    f"{request.out}: this file system ignores case, and two prompts differ by it "
                    f"alone: {sample.name!r}; write to another one"
                )
            encoded = _put(sample.file, target, request.fps, first)
            first = first or target
            prompts[f"{dimension}/{sample.name}".lstrip("/")] = sample.prompt
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
        write_preview(target, file.clip, rate)
    return ENCODE


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
