"""Plain values from what users write: YAML text, overrides, nested dicts, numbers of libraries.

Plain are None, bool, int, float, str, lists of these and dicts with names as keys. OmegaConf reads
and writes the YAML; here stands what it may be asked to read: no tags, no anchors, no second
document, so a file of settings reads nothing, runs nothing and grows no larger than it is. Nothing
is interpolated: text with "${" is refused wherever it stands.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

MAX_BYTES = 65_536
"""Largest file of settings; the presets have some hundred bytes."""

MAX_DEPTH = 8
"""Deepest nesting; settings need three levels."""

MAX_VALUES = 4096
"""Most keys and values in one text."""

ODD_NUMBER = re.compile(
    r"[-+]?(0[0-7_]+|0[xb][0-9a-f_]+|[1-9][0-9_]*(:[0-5]?[0-9])+[0-9_.]*|[0-9_]{400,})", re.I
)
"""Numbers of base 8, 16, 2 and 60 of YAML 1.1, which to most eyes are others, and endless ones."""


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


def an(value: object) -> str:
    """The type of a value with its article, for messages."""
    return f"a {type(value).__name__}" if value is not None else "None"


def stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when a file does, or when another one gets its name; None: there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


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
        if "${" in text:  # maybe in a comment only; to OmegaConf it may be a syntax error
            plain(yaml.load(text, Loader=yaml.BaseLoader), what)
        found = OmegaConf.from_dotlist([f"value={text}"])
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
        why = why.replace("found unhashable key", "a list or mapping as key: expected a name")
        raise ValueError(f"{what}{where} is not valid YAML: {why}") from None
    except OmegaConfBaseException:
        raise ValueError(f"{what}: a key without a name") from None
    values: Any = OmegaConf.to_container(found)
    return plain(values["value"], what)


def write(values: dict[str, Any]) -> str:
    """YAML text of plain values; `read` gives them back."""
    return OmegaConf.to_yaml(OmegaConf.create(values))


def override_list(overrides: str | Iterable[str] | None) -> list[str]:
    """Overrides as a list. Raises TypeError for what is not text or a series of texts."""
    if overrides is None:
        return []
    if isinstance(overrides, str):
        return [overrides]
    if isinstance(overrides, bytes | Mapping) or not isinstance(overrides, Iterable):
        raise TypeError(
            f"overrides are {an(overrides)}: expected strings such as 'schedule.density=0.2'"
        )
    found = list(overrides)
    for item in found:
        if not isinstance(item, str):
            raise TypeError(
                f"override {short(item)} is {an(item)}: expected a string such as "
                "'schedule.density=0.2'"
            )
    return found


def read_overrides(overrides: list[str]) -> dict[str, Any]:
    """Overrides as sections of plain values."""
    found: dict[str, Any] = {}
    for item in overrides:
        path, equals, text = item.partition("=")
        section, dot, key = (part.strip() for part in path.partition("."))
        if not (equals and dot and section and key):
            raise ValueError(f"override={short(item)}: allowed is section.key=value")
        what = f"override {short(item)}"
        plain([section, key], what, "key")
        found.setdefault(section, {})[key] = read(text, what)
    return found


def plain(value: Any, what: str, key: str = "", depth: int = 0) -> Any:
    """Plain values from nested ones of a caller; NumPy, torch and OmegaConf values are taken apart.

    What is nothing of the kind stays for the check of the field it is given to. what: names the
    values in messages. Raises ValueError for interpolation and for nesting without end.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"{what}: {key} is nested deeper than {MAX_DEPTH} levels")
    value = _opened(value)
    if isinstance(value, str):
        return _literal(str.__str__(value), what, key)  # of a subclass, its text
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ValueError(f"{what}: key {short(name)} in {key or 'it'}: expected a name")
            _literal(name, what, _join(key, name))
        return {str(n): plain(v, what, _join(key, n), depth + 1) for n, v in value.items()}
    if isinstance(value, list | tuple | range):
        if len(value) > MAX_VALUES:
            raise ValueError(f"{what}: {key} has {len(value):,} entries")
        return [plain(v, what, f"{key}[{n}]", depth + 1) for n, v in enumerate(value)]
    return value


def _opened(value: Any) -> Any:
    """Python's own value for a scalar or a row of another library; others as they are."""
    if OmegaConf.is_config(value):  # unresolved: to look inside the usual way is to resolve it
        return OmegaConf.to_container(value, resolve=False)
    of_library = type(value).__module__.partition(".")[0] in ("numpy", "torch")
    if of_library and hasattr(value, "tolist") and getattr(value, "ndim", 0) <= 1:
        with suppress(RuntimeError):  # a tensor without data
            return value.tolist()
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
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        word = event.value if isinstance(event, yaml.ScalarEvent) and event.implicit[0] else ""
        tag = getattr(event, "tag", None)
        refusals = {
            "a second document begins: expected one": documents > 1,
            "anchors (&) and aliases (*) are not allowed: write the value out": (
                getattr(event, "anchor", None) is not None
            ),
            f"the tag {short(tag)} is not allowed: write plain values": tag is not None,
            "a merge key (<<) is not allowed: write the keys out": word == "<<",
            f"{short(word)} is no plain number: write it in decimal, in quotes if it is text": (
                ODD_NUMBER.fullmatch(word)
            ),
            f"nested deeper than {MAX_DEPTH} levels": depth > MAX_DEPTH,
            f"more than {MAX_VALUES:,} values": count > MAX_VALUES,
        }
        for refusal, applies in refusals.items():
            if applies:
                line = event.start_mark.line + 1  # type: ignore[union-attr]
                raise ValueError(f"{what}, line {line}: {refusal}")


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)
