"""What makes two jobs the same job: all that decides the pixels, hashed.

The versions of packages are no part of it, nor what a job leaves to the machine, as the number of
threads, the route of the CPU engine and the density above which it goes dense: they are conditions
that the sidecar records, and the same job done again under others replaces its folder. What is
pinned of these is a part.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import IO, Any

WHOLE = 16 * 2**20
"""Files up to this many bytes are read whole for a fingerprint."""
SAMPLES, SAMPLE = 2048, 4096
"""Of larger files that are no safetensors: how many pieces, evenly spaced, of how many bytes."""


def job_id(facts: Mapping[str, Any]) -> str:
    """32 hex digits, equal exactly if the facts are. facts: JSON values, also nested."""
    text = json.dumps(_plain(facts), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def fingerprint(folder: Path, index: Mapping[str, Any]) -> str:
    """32 hex digits that tell a pipeline's weights and settings from those of another.

    index: its model_index.json. Of every file of the components: its name, its size, and the whole
    of it up to 16 MiB; beyond, of a safetensors file the names, types and shapes and 4 KiB at the
    begin and in the middle of every tensor, of other files samples. So whatever training has moved
    is told apart, wherever the folder lies and whatever it is called, without reading all of the
    weights; a single number changed by hand in a large file may not be.
    """
    digest = hashlib.sha256(json.dumps(index, sort_keys=True).encode())
    for part in sorted(name for name, value in index.items() if isinstance(value, list)):
        for file in _files(folder / part):
            name = file.relative_to(folder).as_posix()
            digest.update(f"\0{name}\0".encode(errors="surrogateescape"))
            try:
                with file.open("rb") as stream:
                    _add(digest, stream, file.stat().st_size)
            except OSError:  # loading it will say so
                digest.update(b"unreadable")
    return digest.hexdigest()[:32]


def snapshot(path: Path) -> str | None:
    """owner/name@commit of a folder in the cache of the Hugging Face hub, else None."""
    parts = path.absolute().parts
    for (home, kind), commit in zip(pairwise(parts), parts[2:], strict=False):
        if kind == "snapshots" and re.fullmatch(r"models--.+", home):
            owner_and_name = home.removeprefix("models--").replace("--", "/")
            return f"{owner_and_name}@{commit}" if re.fullmatch("[0-9a-f]{40}", commit) else None
    return None


def _plain(value: Any) -> Any:
    """With 5.0 as 5: however a number was written, it decides the same pixels."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    number = float(value)  # NumPy's are numbers too
    if isinstance(value, Integral):
        return int(value)
    return int(number) if number.is_integer() else number


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder in the order of their names, hidden ones left out."""
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts):
            yield path


def _add(digest: Any, stream: IO[bytes], size: int) -> None:
    digest.update(f"{size}\0".encode())
    for start, length in _pieces(stream, size):
        stream.seek(start)
        digest.update(stream.read(length))


def _pieces(stream: IO[bytes], size: int) -> Iterable[tuple[int, int]]:
    """(start, length) of what a fingerprint reads of a file."""
    if size <= WHOLE:
        return [(0, size)]
    begin = int.from_bytes(stream.read(8), "little") + 8  # of the numbers, if it is a safetensors
    try:
        header = json.loads(stream.read(begin - 8)) if begin < WHOLE else {}
        tensors = [value["data_offsets"] for key, value in header.items() if key != "__metadata__"]
        ranges = [(begin + start, begin + end) for start, end in sorted(tensors)]
    except (ValueError, KeyError, TypeError, AttributeError):
        ranges, begin = [], 0
    if not ranges:
        step = (size - SAMPLE) / (SAMPLES - 1)
        return [(int(i * step), SAMPLE) for i in range(SAMPLES)]
    pieces = [(0, begin)]
    for start, end in ranges:
        middle = (start + end) // 2
        pieces += [(at, min(SAMPLE, end - at)) for at in (start, middle)]
    return pieces
