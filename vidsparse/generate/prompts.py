"""Files of prompts: text, one prompt a line, or JSONL with seed and size.

# a comment; empty lines are skipped       {"prompt": "a red circle", "seed": 3}
a red circle                               {"prompt": "a ring", "width": 96, "frames": 21}
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from vidsparse.generate.model_files import InputError
from vidsparse.generate.request import Request
from vidsparse.shipped import folder

SUFFIX = ".jsonl"
NUMBERS = {"seed": 0, "width": 1, "height": 1, "frames": 1}
"""Keys of a line beside "prompt" -> the least of their values."""
MOST = 2**63 - 1


@dataclass(frozen=True)
class Prompt:
    """A line. None leaves the choice to the number of the line (seed) or to the model."""

    prompt: str
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a file, JSONL if its name ends in .jsonl, else text.

    Raises InputError that names the file and the line.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"--prompts {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        bad = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"--prompts {file}, line {bad}: expected UTF-8") from error
    lines = [
        (number, line.strip())
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip() and not line.strip().startswith("#")
    ]
    read = _object if file.suffix.lower() == SUFFIX else _text
    found: dict[Prompt, int] = {}
    prompts = []
    for number, line in lines:
        try:
            one = read(line)
            earlier = found.setdefault(one, number)
            if one.seed is not None and earlier != number:
                raise ValueError(f"it is line {earlier} again: the same prompt, seed and size")
        except ValueError as wrong:
            raise InputError(f"--prompts {file}, line {number}: {wrong}") from wrong
        prompts.append(one)
    if not prompts:
        raise InputError(f"--prompts {file}: holds no prompt")
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


def _object(line: str) -> Prompt:
    try:
        content = json.loads(line, object_pairs_hook=_pairs, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object: {error.msg}, column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("expected a JSON object, not so many brackets") from error
    if not isinstance(content, dict):
        raise ValueError(f'expected a JSON object with a "prompt", got {line[:60]}')
    unknown = [key for key in content if key not in ("prompt", *NUMBERS)]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; there are prompt, {', '.join(NUMBERS)}")
    if not isinstance(content.get("prompt"), str):
        raise ValueError('expected a "prompt" that is text')
    for key, least in NUMBERS.items():
        value = content.get(key)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and least <= value <= MOST):
            raise ValueError(f"{key} {value!r}: expected a whole number {least} .. 2^63 - 1")
    return Prompt(**{**content, "prompt": _prompt(content["prompt"].strip())})


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
