"""From a section of plain values to its frozen dataclass: OmegaConf checks, the words are ours.

The types of the fields are the schema: bool, int, float, str, `int | float`, `int | str`, and
tuples of one of them. A section may have other words for a field: `other_words`, from the word to
the field and the function that makes the field's value of the word's.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import fields
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vidsparse.plain_values import read, short

ALLOWED = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
NUMBERS = 2**63
"""Bound of numbers: what a tensor holds."""


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raise the ValueError of a bad setting: key, value, what is allowed."""
    if not ok:
        raise ValueError(f"{key}={short(value)}: allowed is {allowed}")


def keys(kind: type) -> list[str]:
    """What a section of this dataclass may say: its fields, and other words for them."""
    return [*_types(kind), *getattr(kind, "other_words", ())]


def build(kind: type, stage: str, *layers: Mapping[str, Any]) -> Any:
    """The dataclass `kind` with the values of a section. Later layers win, the rest is default.

    Raises ValueError that names the key, its value and what is allowed.
    """
    if not any(layers):
        return kind()
    config = deepcopy(_defaults(kind))
    for layer in layers:
        for key, value in layer.items():
            require(key in keys(kind), f"{stage} key", key, ", ".join(keys(kind)))
            name, meaning = getattr(kind, "other_words", {}).get(key, (key, None))
            if meaning and name in layer:
                raise ValueError(
                    f"{stage}.{key}={short(value)} beside {stage}.{name}={short(layer[name])}: "
                    "both say the same, give one of them"
                )
            _assign(config, name, _types(kind)[name], value, f"{stage}.{key}")
            if meaning:
                config[name] = meaning(config[name])
    return OmegaConf.to_object(config)


@cache
def _defaults(kind: type) -> DictConfig:
    """To copy: making one of a dataclass takes several times longer."""
    config: DictConfig = OmegaConf.structured(kind)
    OmegaConf.set_readonly(config, False)  # as a frozen dataclass it would be
    return config


@cache
def _types(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _assign(config: DictConfig, name: str, wanted: Any, value: Any, key: str) -> None:
    """Set an entry of type `wanted`, known as `key` to the user. Raises ValueError."""
    if isinstance(value, str) and wanted is not str:
        with suppress(ValueError):  # "0.2" in quotes is a number where one is wanted
            value = read(value, key)
    if value is None:
        raise ValueError(f"{key} has no value: allowed is {_allowed(wanted)}")
    if get_origin(wanted) is tuple and isinstance(value, list):
        (item, _) = get_args(wanted)
        entries = OmegaConf.typed_dict({}, str, item)
        for n, entry in enumerate(value):  # one by one: OmegaConf does not say which is wrong
            _assign(entries, str(n), item, entry, f"{key}[{n}]")
        value = tuple(entries.values())
    # OmegaConf takes any integer for a truth, any value for text, and numbers of any size
    fits = wanted not in (bool, str) or isinstance(value, str) or value in (True, False)
    with suppress(OmegaConfBaseException, TypeError, ValueError, OverflowError):
        OmegaConf.update(config, name, value)
        found = config[name]
        if fits and (not isinstance(found, int | float) or abs(found) < NUMBERS):
            return
    raise ValueError(f"{key}={short(value)}: allowed is {_allowed(wanted)}")


def _allowed(wanted: Any) -> str:
    if get_origin(wanted) is tuple:
        return f"a list of {ALLOWED[get_args(wanted)[0]].split()[-1]}s, in brackets"
    if get_origin(wanted) is UnionType:
        return " or ".join(ALLOWED[option] for option in get_args(wanted))
    return ALLOWED[wanted]
