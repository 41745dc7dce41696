"""Plan files: a pattern for each layer and head of a model, from `vidsparse bench patterns`.

    heads: 2
    layers: [[dense, multi-diagonal 2], [diagonal 64 + stripe 0, dense]]

What a pattern is called, the file's method says (`vidsparse.pattern`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vidsparse.fields import require
from vidsparse.plain_values import read_file


def of_layer(file: Path, layer: int, known: Callable[[str], bool], allowed: str) -> list[str]:
    """The patterns of a layer, one for each head.

    known: whether a name says all of a pattern; allowed: which do, in words. Raises ValueError that
    names the file and what is wrong.
    """
    content = read_file(file)
    heads, layers = content.get("heads"), content.get("layers")
    ok = isinstance(heads, int) and isinstance(layers, list)
    require(ok, f"{file}: plan", content, "heads: a number, layers: a list of patterns for each")
    assert isinstance(layers, list)
    if layer >= len(layers):
        raise ValueError(f"{file}: layer {layer}: the plan has {len(layers)} layers")
    found = layers[layer]
    ok = isinstance(found, list) and len(found) == heads and all(known(str(one)) for one in found)
    require(ok, f"{file}: layer {layer}", found, f"{heads} patterns, each {allowed}")
    return list(map(str, found))
