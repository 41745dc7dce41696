"""Files of prompts: text, one prompt a line, or JSONL with what differs from line to line.

# a comment; empty lines are skipped       {"prompt": "a red circle", "seed": 3}
a red circle                               {"prompt": "a ring", "width": 96, "frames": 21}
                                           {"prompt": "it turns", "image": "ring.png",
                                            "preset": "fast", "overrides": ["schedule.density=0.2"]}
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import Request
from vidsparse.shipped import folder

SUFFIX = ".jsonl"
NUMBERS = {"seed": 0, "width": 1, "height": 1, "frames": 1}
"""Keys of a line beside "prompt" -> the least of their values."""
TEXTS = ("preset", "image", "last_image")
"""Further keys, of text, for those who take whole lines."""
WHOLE = (*NUMBERS, *TEXTS, "overrides")
MOST = 2**63 - 1
STDIN = Path("-")


@dataclass(frozen=True)
class Prompt:
    """A line. None leaves the choice to the number of the line (seed), the caller or the model.

    image, last_image: paths as they are written. overrides: of the preset. line: its number.
    """

    prompt: str
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    preset: str | None = None
    overrides: tuple[str, ...] = ()
    image: str | None = None
    last_image: str | None = None
    line: int = field(default=0, compare=False)


def read_prompts(
    file: Path, option: str = "--prompts", keys: Sequence[str] = tuple(NUMBERS)
) -> list[Prompt]:
    """The prompts of a file, JSONL if its name ends in .jsonl, else text; "-" is stdin, and JSONL
    if it begins with a brace.

    option: what the file is called in errors. keys: that a line may have beside "prompt", of
    `WHOLE`. Raises InputError that names the file and the line.
    """
    try:
        raw = sys.stdin.buffer.read() if file == STDIN else file.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{option} {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        bad = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{option} {file}, line {bad}: expected UTF-8") from error
    lines = [
        (number, line.strip())
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip() and not line.strip().startswith("#")
    ]
    objects = file.suffix.lower() == SUFFIX
    if file == STDIN:
        objects = bool(lines) and lines[0][1].startswith("{")
    found: dict[Prompt, int] = {}
    prompts = []
    for number, line in lines:
        try:
            one = replace(_object(line, keys) if objects else _text(line), line=number)
            earlier = found.setdefault(one, number)
            if one.seed is not None and earlier != number:
                same = (
                    "the same prompt, seed and size" if set(keys) == {*NUMBERS} else "all the same"
                )
                raise ValueError(f"it is line {earlier} again: {same}")
        except ValueError as wrong:
            raise InputError(f"{option} {file}, line {number}: {wrong}") from wrong
        prompts.append(one)
    if not prompts:
        raise InputError(f"{option} {file}: holds no prompt")
    return prompts


def shipped(name: str) -> list[Prompt]:
    """A set that comes with vidsparse: "real" or "demo"."""
    return read_prompts(folder("configs/prompts") / f"{name}.txt")


def requests(base: Request, prompts: Sequence[Prompt], samples: int = 1) -> list[Request]:
    """A request per prompt and sample; what a line leaves open is as in `base`.

    The seeds of a line are its own, or `samples` times its place from 0, plus that of `base`, and
    those that follow. Raises InputError if two requests are the same.
    """
    if samples < 1:
        raise InputError(f"--samples {samples}: expected an integer >= 1")
    found: dict[Any, int] = {}
    made = []
    for place, one in enumerate(prompts):
        first = base.seed + samples * place if one.seed is None else one.seed
        size = {k: getattr(one, k) for k in ("width", "height", "frames")}
        given = {k: v for k, v in size.items() if v is not None}
        for seed in range(first, first + samples):
            request = replace(base, prompt=one.prompt, seed=seed, **given)
            key = (request.prompt, seed, request.width, request.height, request.frames)
            other = found.setdefault(key, place)
            if other != place:
                raise InputError(
                    f"prompts {other + 1} and {place + 1} are the same with seed {seed}: "
                    f"{one.prompt!r}"
                )
            made.append(request)
    return made


def _text(line: str) -> Prompt:
    if line.startswith("{"):
        raise ValueError(f"this looks like JSON; call the file {SUFFIX} for that")
    return Prompt(_prompt(line))


def _object(line: str, keys: Sequence[str]) -> Prompt:
    try:
        content = json.loads(line, object_pairs_hook=_pairs, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object: {error.msg}, column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("expected a JSON object, not so many brackets") from error
    if not isinstance(content, dict):
        raise ValueError(f'expected a JSON object with a "prompt", got {line[:60]}')
    unknown = [key for key in content if key not in ("prompt", *keys)]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; there are prompt, {', '.join(keys)}")
    if not isinstance(content.get("prompt"), str):
        raise ValueError('expected a "prompt" that is text')
    for key, least in NUMBERS.items():
        value = content.get(key)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and least <= value <= MOST):
            raise ValueError(f"{key} {value!r}: expected a whole number {least} .. 2^63 - 1")
    for key in TEXTS:
        value = content.get(key)
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise ValueError(f"{key} {value!r}: expected text")
    changes = content.get("overrides") or []
    changes = [changes] if isinstance(changes, str) else changes
    if not isinstance(changes, list) or not all(isinstance(change, str) for change in changes):
        raise ValueError(f'overrides {changes!r}: expected a list such as ["schedule.density=0.2"]')
    own = {**content, "overrides": tuple(changes)}
    return Prompt(**{**own, "prompt": _prompt(content["prompt"].strip())})


def _prompt(text: str) -> str:
    if not text:
        raise ValueError("the prompt is empty")
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise ValueError(f"the prompt holds the control character {character!r}")
    return text


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"{key!r} comes twice")
        content[key] = value
    return content


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no value")
