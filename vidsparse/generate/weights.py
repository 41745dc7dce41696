"""The weight files of a model: there, whole, of the one format that runs no code; their size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from vidsparse.generate.model import Model, component_class, config_file
from vidsparse.generate.model_files import WEIGHT_FILES, InputError, listed, read_json

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Library -> how its weight files are called."""

POINTER = b"version https://git-lfs"
"""How a file begins that stands for another one, which Git LFS has not fetched."""


MOST = 65_536
"""Largest number in a config that stands for no side of a tensor: positions, training steps."""


@dataclass(frozen=True)
class Header:
    """What the weight files of a component hold. longest: of all sides of its tensors."""

    tensors: int = 0
    numbers: int = 0
    longest: int = 0


def weighty(model: Model) -> list[str]:
    """Components that have weights."""
    from torch import nn

    return [n for n in model.components if issubclass(component_class(model, n), nn.Module)]


def count_weights(model: Model, folder: Path) -> dict[str, int]:
    """Component -> numbers in its weight files, from their headers.

    Raises InputError for files that are missing, cut off, or of a format that can run code, and
    for a config that would build a model far larger than its weights.
    """
    for name in model.components:
        if not (folder / name).is_dir():
            raise model.refuse(f"folder {name} is missing; download it again")
    headers = {}
    for name in weighty(model):
        try:
            files = _files(folder / name, STEMS[model.components[name][0]])
            headers[name] = _header(files)
        except InputError as error:
            raise model.refuse(f"{name}/{error}") from error
    for name in model.components:
        _check_config(model, name, headers.get(name, Header(longest=2**20)))
    return {name: header.numbers for name, header in headers.items()}


def _check_config(model: Model, name: str, header: Header) -> None:
    """Raise InputError for numbers that no model with such weights has: building it never ends."""
    file = config_file(name)
    for key, value in model.files.get(file, {}).items():
        most = header.tensors if "layers" in key or "blocks" in key else None
        if most is None and model.components[name][0] == "diffusers":
            most = max(MOST, header.longest)
        for number in value if isinstance(value, list) else [value]:
            if most is not None and isinstance(number, int) and not -most <= number <= most:
                raise model.refuse(
                    f"{file} says {key}: {value!r}, which does not belong to its weights, "
                    f"{header.tensors} tensors; download it again"
                )


def _files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a component, one or all shards. Raises InputError."""
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        if whole.is_file():
            return [whole]
        raise InputError(f"{whole.name} is missing; {_instead(folder, stem)}")
    shards = read_json(index, index.name).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) and shards else {None}
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise InputError(f"{index.name} has no weight_map of file names; download it again")
    files = [folder / str(name) for name in sorted(map(str, names))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{index.name} names {listed(missing)}: missing; download it again")
    return files


def _instead(folder: Path, stem: str) -> str:
    """What lies where the weights should be, and the cure."""
    found = sorted(p.name for p in folder.iterdir() if p.suffix in WEIGHT_FILES)
    if not found:
        return "download it again"
    variants = [name for name in found if name.startswith(f"{stem}.") and "safetensors" in name]
    if variants:
        return (
            f"there is {listed(variants)}: load that variant with diffusers and save_pretrained it"
        )
    if any(not name.endswith(".safetensors") for name in found):
        return (
            f"{listed(found)} is not loaded, for such a file can run code: convert to safetensors, "
            "with the save_pretrained of diffusers or transformers"
        )
    return f"there is {listed(found)}: rename it, or download the model again"


def _header(files: list[Path]) -> Header:
    """Of safetensors files. Raises InputError if one is none, or cut off."""
    shapes = [shape for file in files for shape in _shapes(file)]
    sides = [side for shape in shapes for side in shape]
    return Header(len(shapes), sum(map(math.prod, shapes)), max(sides, default=0))


def _shapes(file: Path) -> list[list[int]]:
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as opened:
            if opened.read(len(POINTER)) == POINTER:
                raise InputError(
                    f"{file.name} cannot be loaded, it is a Git LFS pointer: `git lfs pull`"
                )
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            return [tensors.get_slice(name).get_shape() for name in names]
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file.name} cannot be loaded, it is cut off or no safetensors file ({error}); "
            "download it again"
        ) from error
