"""Plain values from what users write: YAML text, nested dicts, numbers of other libraries.

Plain are None, bool, int, float, str, lists of these and dicts with names as keys. The YAML is the
part of the language that can say nothing else: no tags, no anchors, no second document, no key
twice; so a file of settings reads nothing, runs nothing and grows no larger than it is. Nothing is
interpolated: text with "${" is refused wherever it stands.
"""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 65_536
"""Largest file of settings; the presets have some hundred bytes."""

MAX_DEPTH = 8
"""Deepest nesting; settings need three levels."""

NULLS = ("", "~", "null")
TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
INTEGER = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)(e[-+]?[0-9]+)?|[-+]?\.(inf)|\.nan", re.I)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxtuple = self.maxlist = self.maxdict = 12
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        """Python does not print an integer of more than 4,300 digits."""
        return repr(x) if abs(x) < 10**40 else "an integer of more than 40 digits"


def short(value: object) -> str:
    """`repr` of a value of any size and nesting on one line, for messages."""
    return re.sub(r"\s*\n\s*", " ", _Short().repr(value))


def read_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ValueError that names the file and what is wrong."""
    what = f"config file {str(path)!r}"
    try:
        if path.is_dir():
            raise ValueError(f"{what} is a directory: expected a YAML file")
        if not path.is_file():
            raise ValueError(f"{what} does not exist")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{what} has more than {MAX_BYTES:,} bytes: that is no file of settings")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 text: save it as UTF-8") from error
    values = read(text, what)
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise ValueError(
            f"{what}: expected sections, such as schedule: {{density: 0.2}}, found {found}"
        )
    if not values:
        raise ValueError(f"{what}: expected sections, such as schedule: {{density: 0.2}}")
    return values


def read(text: str, what: str) -> Any:
    """The value that YAML text says. what: names the text in messages. Raises ValueError."""
    try:
        _check_events(text, what)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
        raise ValueError(f"{what}{where} is not valid YAML: {why}") from error
    return None if node is None else _value(node, what, "")


def scalar(text: str) -> bool | int | float | str | None:
    """What an unquoted word of YAML means."""
    low = text.strip().lower()
    if low in NULLS:
        return None
    if low in TRUTHS:
        return TRUTHS[low]
    if len(low) <= 40 and INTEGER.fullmatch(low):
        return int(low)
    if len(low) <= 400 and FLOAT.fullmatch(low):
        return float(low.replace(".inf", "inf").replace(".nan", "nan"))
    return text


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes wherever `scalar` would take it for something else."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = None if scalar(data) == data and data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def write(values: dict[str, Any]) -> str:
    """YAML text of plain values; `read` gives them back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def plain(values: Any, what: str, key: str = "", depth: int = 0) -> Any:
    """Plain values from nested ones of a caller; NumPy, torch and OmegaConf values are taken apart.

    What is nothing of the kind stays for the check of the field it is given to. what: names the
    values in messages. Raises ValueError for interpolation and for nesting without end.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"{what}: {key} is nested deeper than {MAX_DEPTH} levels")
    values = _opened(values)
    if isinstance(values, str):
        return _literal(values, what, key)
    if isinstance(values, Mapping):
        for name in values:
            if not isinstance(name, str):
                raise ValueError(f"{what}: key {short(name)} in {key or 'it'}: expected a name")
            _literal(name, what, _join(key, name))
        return {str(n): plain(v, what, _join(key, n), depth + 1) for n, v in values.items()}
    if isinstance(values, list | tuple | range):
        if len(values) > MAX_BYTES:
            raise ValueError(f"{what}: {key} has {len(values):,} entries")
        return [plain(v, what, f"{key}[{n}]", depth + 1) for n, v in enumerate(values)]
    return values


def _opened(value: Any) -> Any:
    """Python's own value for a scalar or an array of another library; others as they are."""
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and isinstance(value, omegaconf.DictConfig | omegaconf.ListConfig):
        # unresolved: to look into such a container the usual way is to resolve it
        return omegaconf.OmegaConf.to_container(value, resolve=False)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass, its text
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if type(value).__module__.partition(".")[0] in ("numpy", "torch") and hasattr(value, "tolist"):
        return value.tolist() if getattr(value, "ndim", 2) <= 1 else value
    return value


def _literal(text: str, what: str, key: str) -> str:
    if "${" in text:
        raise ValueError(
            f"{what}: {key or 'value'}={short(text)} asks for interpolation, which settings do not "
            "have: write the value itself"
        )
    return text


def _check_events(text: str, what: str) -> None:
    """Refuse what YAML can say beyond plain values, before anything is built."""
    depth = documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{what}, line {event.start_mark.line + 1}" if event.start_mark else what
        documents += isinstance(event, yaml.DocumentStartEvent)
        if documents > 1:
            raise ValueError(f"{where}: a second document begins: expected one")
        if getattr(event, "anchor", None) is not None:
            raise ValueError(
                f"{where}: anchors (&) and aliases (*) are not allowed: write the value out"
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise ValueError(f"{where}: the tag {short(tag)} is not allowed: write plain values")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"{where}: nested deeper than {MAX_DEPTH} levels")


def _value(node: yaml.Node, what: str, key: str) -> Any:
    if isinstance(node, yaml.ScalarNode):
        text = _literal(node.value, what, key)
        return scalar(text) if node.style is None else text
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, what, f"{key}[{n}]") for n, item in enumerate(node.value)]
    found: dict[str, Any] = {}
    for name, value in node.value:
        line = name.start_mark.line + 1
        if not isinstance(name, yaml.ScalarNode):
            raise ValueError(f"{what}, line {line}: a list or mapping as key: expected a name")
        own = _literal(name.value, what, _join(key, name.value))
        if own in found:
            raise ValueError(f"{what}, line {line}: {_join(key, own)} stands twice")
        found[own] = _value(value, what, _join(key, own))
    return found


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)
