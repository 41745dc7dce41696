"""Where VBench looks for a sample: the folders, and the name by the prompt or of our own.

VBench 0.1.5 reads one flat folder, VBench-2.0 a folder per dimension, in which it stops at the
first clip that is missing. How many samples of a prompt are read depends on the dimension.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vidsparse.vbench import names
from vidsparse.vbench.dimensions import (
    DIMENSIONS,
    DIVERSITY,
    DIVERSITY_SAMPLES,
    FLICKER_SAMPLES,
    FLICKERING,
    SAMPLES,
    SECOND,
    SECOND_CUSTOM,
    SECOND_SAMPLES,
)
from vidsparse.vbench.samples import Sample

FLAT = ""
"""The folder of VBench 0.1.5 below videos/."""


@dataclass(frozen=True)
class Placed:
    """A sample with its name, and the folders below videos/ that it is to lie in."""

    sample: Sample
    name: str
    folders: tuple[str, ...]


@dataclass(frozen=True)
class Rules:
    """How a version of VBench finds clips.

    version: 1 (0.1.5) or 2 (2.0). custom: clips of any prompt, under names of our own. dimensions:
    of VBench-2.0, that all clips are for. listed: VBench's own prompts -> their dimensions, from
    `source`; empty: not given.
    """

    version: int = 1
    custom: bool = False
    dimensions: tuple[str, ...] = ()
    listed: Mapping[str, frozenset[str]] = field(default_factory=dict)
    source: Path | None = None

    def place(self, samples: Sequence[Sample]) -> list[Placed]:
        """Of one arm, in their order. Raises ValueError for what VBench would not read."""
        folders = [self._folders(sample) for sample in samples]
        if self.custom:
            chosen = names.custom([(sample.prompt, sample.index) for sample in samples])
        else:
            call = names.second if self.version == 2 else names.standard
            chosen = [call(sample.prompt, sample.index) for sample in samples]
        placed = [Placed(*one) for one in zip(samples, chosen, folders, strict=True)]
        _check_names(placed)
        return placed

    def notes(self, placed: Mapping[str, Sequence[Placed]]) -> Iterator[str]:
        """What the user should know. placed: by name of the arm."""
        everything = {_id(one) for found in placed.values() for one in found}
        for arm, found in placed.items():
            if lacking := len(everything - set(map(_id, found))):
                yield f"{arm} lacks {lacking} of {len(everything)} clips of other arms"
            unknown = sum(one.sample.file.sidecar is None for one in found)
            if unknown:
                yield f"{arm}: prompts of {unknown} clips are read from file names"
        if self.custom:
            return
        if not self.listed:
            yield "whether VBench has these prompts was not checked; --full-info checks it"
        elif self.version == 2:
            yield from self._incomplete(placed)
        elif missing := len(self.listed.keys() - {prompt for prompt, _ in everything}):
            yield f"{missing} of VBench's {len(self.listed)} prompts have no clip"

    def _incomplete(self, placed: Mapping[str, Sequence[Placed]]) -> Iterator[str]:
        """Dimensions that have clips, but not all."""
        for arm, found in placed.items():
            for dimension in SECOND:
                there = sum(dimension in one.folders for one in found)
                asked = samples_of(dimension) * sum(dimension in d for d in self.listed.values())
                if 0 < there < asked:
                    yield (
                        f"{arm}: {dimension} has {there} of {asked} clips, and VBench-2.0 stops at "
                        "the first that is missing"
                    )

    def _folders(self, sample: Sample) -> tuple[str, ...]:
        if self.listed and not self.custom and sample.prompt not in self.listed:
            raise ValueError(
                f"{sample.prompt!r} is no prompt of {self.source}, so VBench would never read the "
                "clip; --custom exports clips of other prompts"
            )
        of_list = self.listed.get(sample.prompt, frozenset())
        if self.version == 1:
            most = SAMPLES
            if FLICKERING in of_list:
                most = FLICKER_SAMPLES
            if sample.index >= most and not self.custom:
                more = "" if of_list else "; with --full-info 25 are taken where VBench filters"
                raise ValueError(_unread(sample, most, more))
            return (FLAT,)
        allowed = SECOND_CUSTOM if self.custom else SECOND
        dimensions = self.dimensions or tuple(d for d in allowed if d in of_list)
        if not dimensions:
            raise ValueError(
                f"{sample.prompt!r} is for no dimension that takes clips of any prompt: say which "
                f"with --dimension; there are {', '.join(allowed)}"
            )
        found = tuple(d for d in dimensions if self._reads(d, sample.index))
        if not found:
            raise ValueError(_unread(sample, max(map(samples_of, dimensions))))
        return found

    def _reads(self, dimension: str, index: int) -> bool:
        """Whether a dimension of VBench-2.0 reads this sample of a prompt."""
        return index < samples_of(dimension) or (self.custom and dimension != DIVERSITY)


def samples_of(dimension: str) -> int:
    """Samples of each of its prompts that a dimension of VBench-2.0 reads."""
    return DIVERSITY_SAMPLES if dimension == DIVERSITY else SECOND_SAMPLES


def read_list(file: Path, version: int) -> dict[str, frozenset[str]]:
    """Prompt -> dimensions, of VBench's own list. Raises ValueError for anything else."""
    known = SECOND if version == 2 else DIMENSIONS
    found: dict[str, frozenset[str]] = {}
    try:
        for entry in json.loads(file.read_text(encoding="utf-8")):
            prompt, dimensions = str(entry["prompt_en"]), frozenset(map(str, entry["dimension"]))
            if other := sorted(dimensions - set(known)):
                raise ValueError(f"{other[0]!r} is no dimension of --version {version}")
            found[prompt] = found.get(prompt, frozenset()) | dimensions
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"--full-info {file}: expected the list of prompts that comes with VBench ({error})"
        ) from error
    return found


def _unread(sample: Sample, most: int, more: str = "") -> str:
    return (
        f"{sample.prompt!r} has a sample number {sample.index}, VBench reads 0 to {most - 1}{more}"
    )


def _id(one: Placed) -> tuple[str, int]:
    return one.sample.prompt, one.sample.index


def _check_names(placed: Sequence[Placed]) -> None:
    taken: dict[tuple[str, str], Placed] = {}
    for one in placed:
        for folder in one.folders:
            other = taken.setdefault((folder, one.name), one)
            if other is not one:
                raise ValueError(
                    f"{other.sample.prompt!r} and {one.sample.prompt!r} would both be {one.name!r}"
                )
