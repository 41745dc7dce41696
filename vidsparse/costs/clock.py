"""Seconds of work on a machine, with what they depend on, so that errors can be carried along."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vidsparse.costs.machine import Constant, Machine
from vidsparse.costs.stage import Stage

MODEL_ERROR = 0.08
"""Standard error of the model itself, relative: on top of that of its constants."""

ERRORS = 2
"""Standard errors that are shown as an error bar: that of 95 %."""

WHOLE = "whole"
"""What a stage follows from that was measured as a whole."""


@dataclass(frozen=True)
class Timed:
    """Seconds by stage and by the constant that they are proportional or inverse to."""

    parts: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by stage."""
        found: dict[str, float] = defaultdict(float)
        for (stage, _), seconds in self.parts.items():
            found[stage] += seconds
        return dict(found)

    def limit(self, stage: str) -> str:
        """The constant that most of the seconds of a stage follow from; "" without seconds."""
        of = {name: t for (one, name), t in self.parts.items() if one == stage}
        return max(of, key=lambda name: of[name]) if of else ""

    def __add__(self, other: Timed) -> Timed:
        keys = {**self.parts, **other.parts}
        return Timed({key: self.parts.get(key, 0.0) + other.parts.get(key, 0.0) for key in keys})

    def times(self, count: float) -> Timed:
        """So many of it."""
        return Timed({key: count * seconds for key, seconds in self.parts.items()})


def timed(work: Iterable[Stage], machine: Machine) -> Timed:
    """What stages take; those of one name are added."""
    total = Timed()
    for stage in work:
        total += _of(stage, machine)
    return total


def constant(stage: str, limit: str, machine: Machine) -> Constant:
    """What the seconds of a stage follow from, where that is `limit`."""
    return machine.slower[stage] if limit == WHOLE else machine.constants[limit]


def _of(stage: Stage, machine: Machine) -> Timed:
    constants = machine.constants
    amounts = {stage.unit: stage.flops, "bandwidth": stage.bytes, "exp": stage.exps}
    amounts["link"] = stage.sent
    times = {name: n / constants[name].value for name, n in amounts.items() if name in constants}
    limit = max(times, key=lambda name: times[name])
    parts = {limit: times[limit], "launch": stage.launches * constants["launch"].value}
    if stage.name in machine.slower:
        parts = {WHOLE: sum(parts.values()) * machine.slower[stage.name].value}
    return Timed({(stage.name, name): seconds for name, seconds in parts.items() if seconds})


def error(time: Timed, machine: Machine) -> float:
    """Standard error of the seconds, relative: those of constants are independent of each other."""
    return math.sqrt(MODEL_ERROR**2 + _carried(_shares(time, machine)))


def ratio_error(dense: Timed, sparse: Timed, machine: Machine) -> float:
    """Standard error of dense / sparse, relative: what both depend on counts by its difference."""
    one, other = _shares(dense, machine), _shares(sparse, machine)
    differ = {c: one.get(c, 0.0) - other.get(c, 0.0) for c in {**one, **other}}
    return math.sqrt(_carried(differ))


def _shares(time: Timed, machine: Machine) -> dict[Constant, float]:
    """Constant -> its share of the seconds. Equal ones are one: they were found out together."""
    found: dict[Constant, float] = defaultdict(float)
    for (stage, limit), seconds in time.parts.items():
        found[constant(stage, limit, machine)] += seconds / time.seconds
    return dict(found)


def _carried(shares: Mapping[Constant, float]) -> float:
    """Variance from the errors of the constants."""
    return sum((share * one.error) ** 2 for one, share in shares.items())
