"""Captures on disk: a safetensors file for each step and layer.

Tensors q, k, v: bfloat16 [heads, S, D], after norm and RoPE, tokens in raster order with the text
where `grid` says. The metadata has one entry, "vidsparse", JSON of the fields of `About`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vidsparse.grid import TokenGrid
from vidsparse.quality.frames import atomic_output

SCHEMA = "vidsparse.capture/1"
CURE = "delete it, and capture again"


@dataclass(frozen=True)
class About:
    """run: id of all that decides the values. model, prompt: of the run, in words. step, steps,
    layer, layers: where the call stands, from 0. heads: which, from 0. grid: fields of TokenGrid.
    """

    run: str
    model: str
    prompt: str
    step: int
    steps: int
    layer: int
    layers: int
    heads: tuple[int, ...]
    grid: dict[str, object]
    schema: str = SCHEMA


@dataclass(frozen=True)
class Capture:
    """One file. q, k, v: bfloat16 [heads, S, D]."""

    about: About
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def grid(self) -> TokenGrid:
        return TokenGrid(**{k: tuple(v) if k == "cuts" else v for k, v in self.about.grid.items()})  # type: ignore[arg-type]


def file_of(folder: Path, step: int, layer: int) -> Path:
    return folder / f"step{step:03d}-layer{layer:03d}.safetensors"


def write(folder: Path, about: About, q: Tensor, k: Tensor, v: Tensor) -> Path:
    """Save a call, q, k, v [heads, S, D] of any float dtype; the file appears as one act."""
    path = file_of(folder, about.step, about.layer)
    named = zip("qkv", (q, k, v), strict=True)
    tensors = {name: x.to("cpu", torch.bfloat16).contiguous() for name, x in named}
    with atomic_output(path) as part:
        part.write_bytes(save(tensors, {"vidsparse": json.dumps(asdict(about))}))
    return path


def read_about(path: Path) -> About:
    """Of a file. Raises ValueError if it is none of ours, or no whole one."""
    try:
        with safe_open(path, "pt") as file:
            fields = json.loads((file.metadata() or {})["vidsparse"])
        if fields["schema"] != SCHEMA:
            raise KeyError(fields["schema"])
        return About(**{**fields, "heads": tuple(fields["heads"])})
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path} is no whole capture of {SCHEMA!r}: {CURE}") from error


def read(path: Path) -> Capture:
    """A file. Raises ValueError if it is none of ours, no whole one, or not finite."""
    about = read_about(path)
    try:
        with safe_open(path, "pt") as file:
            found = Capture(about, *(file.get_tensor(name) for name in "qkv"))
        rows = len(about.heads), found.grid.tokens
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no whole capture: {CURE}") from error
    for name in "qkv":
        x = getattr(found, name)
        if x.dtype != torch.bfloat16 or x.shape != (*rows, found.q.shape[-1]):
            raise ValueError(
                f"{path} is no whole capture, {name} is {x.dtype} {[*x.shape]} for {rows[0]} heads "
                f"and {rows[1]} tokens: {CURE}"
            )
        if not x.isfinite().all():
            raise ValueError(
                f"{path}: {name} has values that are not finite, so no error can be measured on "
                f"it: {CURE}, with --dtype fp32 if they come from the model"
            )
    return found


def captures(folder: Path) -> Iterator[Path]:
    """The files of a folder, by step and layer."""
    return iter(sorted(folder.glob("step*-layer*.safetensors")))


def missing(
    folder: Path, run: str, steps: Sequence[int], layers: Sequence[int], heads: Sequence[int]
) -> list[tuple[int, int]]:
    """(step, layer) of the calls that a folder lacks.

    Raises ValueError if it holds captures of another run, or of other heads.
    """
    for path in captures(folder):
        about = read_about(path)
        if about.run != run:
            raise ValueError(
                f"{folder} holds captures of another run ({about.model}, {about.prompt!r:.60}): "
                "choose another --out"
            )
    lacking = []
    for step in steps:
        for layer in layers:
            path = file_of(folder, step, layer)
            if not path.exists():
                lacking.append((step, layer))
            elif read_about(path).heads != tuple(heads):
                raise ValueError(f"{path} has other heads than {[*heads]}: choose another --out")
    return lacking
