"""From a section of plain values to its frozen dataclass: names and types of fields, checked.

The types of the fields are the schema: bool, int, float, str, `int | float`, `int | str`, and
tuples of one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from types import UnionType
from typing import Any, ClassVar, Protocol, Union, get_args, get_origin, get_type_hints

from vidsparse.plain_values import scalar, short

ALLOWED = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
INTEGERS = 2**63
"""Bound of integers: what a tensor holds."""


class OtherWords(Protocol):
    """A section with keys that are another way to say a field."""

    other_words: ClassVar[Mapping[str, tuple[str, Callable[[float], float]]]]
    """Key -> (the field that it says, the field's value from the key's)."""


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raise the ValueError of a bad setting: key, value, what is allowed."""
    if not ok:
        raise ValueError(f"{key}={short(value)}: allowed is {allowed}")


def in_own_words(kind: type, section: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The section with every key that is another word for a field replaced by the field.

    Raises ValueError if it says the field too.
    """
    values = dict(section)
    words: Mapping[str, Any] = getattr(kind, "other_words", {})
    for word, (name, meaning) in words.items():
        if word not in values:
            continue
        value = _converted(float, values.pop(word), f"{stage}.{word}")
        if name in values:
            raise ValueError(
                f"{stage}.{word}={value!r} beside {stage}.{name}={short(values[name])}: "
                "both say the same, give one of them"
            )
        values[name] = meaning(value)
    return values


def build(kind: type, section: Mapping[str, Any], stage: str) -> Any:
    """The dataclass `kind` with the values of a section, the rest by default.

    Raises ValueError that names the key, its value and what is allowed.
    """
    types = _types(kind)
    values = in_own_words(kind, section, stage)
    for key in values:
        known = [*types, *getattr(kind, "other_words", ())]
        require(key in types, f"{stage} key", key, ", ".join(known))
    return kind(**{k: _converted(types[k], v, f"{stage}.{k}") for k, v in values.items()})


@cache
def _types(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _converted(wanted: Any, value: Any, key: str) -> Any:
    """A value as a field of the type wants it. Raises ValueError."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{key} has no value: allowed is {_allowed(wanted)}")
    if get_origin(wanted) is tuple:
        require(isinstance(value, list | tuple), key, value, _allowed(wanted))
        item = get_args(wanted)[0]
        return tuple(_converted(item, entry, f"{key}[{n}]") for n, entry in enumerate(value))
    options = get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
    candidates = [value]
    if isinstance(value, str) and options != (str,):
        candidates = [scalar(value), value]  # "0.2" in quotes is a number where one is wanted
    for candidate in candidates:
        for option in options:
            fits, found = _as(option, candidate)
            if fits:
                return found
    raise ValueError(f"{key}={short(value)}: allowed is {_allowed(wanted)}")


def _as(option: type, value: Any) -> tuple[bool, Any]:
    """Whether a value is one of the type, and that one."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if option is bool:
        return isinstance(value, bool) or (number and value in (0, 1)), bool(value)
    if option is int:
        return number and isinstance(value, int) and abs(value) < INTEGERS, value
    if option is float:
        fits = number and abs(value) < INTEGERS and math.isfinite(value)
        return fits, float(value) if fits else value
    return isinstance(value, option), value


def _allowed(wanted: Any) -> str:
    if get_origin(wanted) is tuple:
        many = {int: "integers", float: "numbers"}[get_args(wanted)[0]]
        return f"a list of {many}, in brackets"
    if get_origin(wanted) in (Union, UnionType):
        return " or ".join(ALLOWED[option] for option in get_args(wanted))
    return ALLOWED[wanted]
