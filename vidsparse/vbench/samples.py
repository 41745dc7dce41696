"""Sources of clips -> arms, and every clip's number among the samples of its prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from vidsparse.compare.arms import Arm, ClipFile, open_arm
from vidsparse.jobs.layout import slug
from vidsparse.quality.frames import Clip, iter_frames
from vidsparse.vbench import names

Key = tuple[str, tuple[Any, ...]]
"""(prompt, what tells its samples apart) of a clip."""


@dataclass(frozen=True)
class Sample:
    """A clip, its prompt, and its number among the samples of the prompt, from 0."""

    file: ClipFile
    prompt: str
    index: int


def open_arms(sources: Sequence[tuple[Path, str | None]]) -> list[Arm]:
    """The arms of all sources; dense videos that lie beside sparse ones are an arm of their own."""
    arms: dict[str, dict[str, ClipFile]] = {}
    dense: dict[str, ClipFile] = {}
    for path, name in sources:
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


def folders(arms: Sequence[Arm]) -> dict[str, str]:
    """Name of an arm -> its folder. Raises ValueError if two would share one."""
    found: dict[str, str] = {}
    for arm in arms:
        folder = slug(arm.name) or "arm"
        same = [other for other, taken in found.items() if taken == folder]
        if same:
            raise ValueError(f"arms {same[0]!r} and {arm.name!r} would share a folder; add =NAME")
        found[arm.name] = folder
    return found


def numbered(arms: Sequence[Arm]) -> dict[str, list[Sample]]:
    """Name of an arm -> its samples; those of a prompt in the order of their seeds, alike in all.

    Raises ValueError for clips that cannot be told apart or matched.
    """
    numbers = _numbers(arms)
    return {arm.name: list(_samples(arm, numbers)) for arm in arms}


def _equal(a: Clip, b: Clip) -> bool:
    """Whether two clips show the same frames; their files differ by random identifiers."""
    pairs = zip_longest(iter_frames(a), iter_frames(b))
    return all(x is not None and y is not None and np.array_equal(x, y) for x, y in pairs)


def _key(file: ClipFile) -> Key:
    job = file.sidecar
    if job is None:
        name = file.name + names.SUFFIX
        return names.prompt_of(name), (names.index_of(name),)
    return str(job["prompt"]), tuple(job[k] for k in ("seed", "height", "width", "frames"))


def _numbers(arms: Sequence[Arm]) -> dict[Key, int]:
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


def _samples(arm: Arm, numbers: Mapping[Key, int]) -> Iterator[Sample]:
    taken: dict[Key, ClipFile] = {}
    for file in arm.clips.values():
        key = _key(file)
        if key in taken:
            raise ValueError(
                f"{taken[key].clip.path} and {file.clip.path} show the same prompt and seed at "
                "the same size: leave one of them"
            )
        taken[key] = file
        yield Sample(file, key[0], numbers[key])
