"""What a machine does in a second, and where each figure is from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vidsparse.plain_values import read_file
from vidsparse.shipped import folder

SOURCES = ("measured", "published", "assumed")

UNITS = {
    "matmul": 1e12,
    "dense": 1e12,
    "sparse": 1e12,
    "bandwidth": 1e12,
    "exp": 1e12,
    "link": 1e12,
    "launch": 1e-6,
    "memory": 1e9,
}
"""Constant -> what a unit of it in `configs/machines.yaml` is in FLOP/s, bytes/s, 1/s, s, bytes."""


@dataclass(frozen=True)
class Constant:
    """value: see `UNITS`. error: its standard error, relative. source: one of `SOURCES`; origin:
    where exactly from."""

    value: float
    error: float
    source: str
    origin: str = ""


@dataclass(frozen=True)
class Machine:
    """constants: name -> value, the names of `UNITS`; exp is missing where rates contain it, link
    on a CPU.
    slower: stage -> time that it was measured to take / time by the constants. threads: of a CPU.
    names: parts of what torch calls a GPU. around: `slower` of the stages around listed tiles where
    nothing else is known of them.
    """

    name: str
    about: str
    constants: Mapping[str, Constant]
    slower: Mapping[str, Constant] = field(default_factory=dict)
    threads: int = 0
    names: tuple[str, ...] = ()
    around: Constant | None = None

    @property
    def is_gpu(self) -> bool:
        return not self.threads

    def sources(self) -> list[str]:
        """The kinds of sources of what its times follow from, the surest first."""
        used = [c for name, c in self.constants.items() if name != "memory"]
        return [s for s in SOURCES if any(c.source == s for c in (*used, *self.slower.values()))]


def in_words(sources: Sequence[str]) -> str:
    """Such as "measured, published and assumed"; one or more."""
    *before, last = sources
    return f"{', '.join(before)} and {last}" if before else last


def table() -> dict[str, Machine]:
    """The machines of `configs/machines.yaml`, by name."""
    found = {}
    for name, content in _content().items():
        constants = {key: _constant(key, content[key]) for key in UNITS}
        names, around = tuple(content["names"]), _constant("around", content["around"])
        found[name] = Machine(name, content["about"], constants, names=names, around=around)
    return found


def _content() -> dict[str, Any]:
    return read_file(folder("configs") / "machines.yaml")


def _constant(key: str, given: list[Any]) -> Constant:
    value, error, source, origin = given
    return Constant(float(value) * UNITS.get(key, 1.0), float(error), str(source), str(origin))
