"""Sizes of a video: which a model takes, and how many tokens they are."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vidsparse.generate.model import Model, component_class, family_of
from vidsparse.generate.model_files import InputError, first_line

SIZE_MULTIPLE = 16  # of pixels, whatever the model: the pipelines check it

LENGTHS = {"AutoencoderKLAllegro": (4, 0), "AutoencoderKLCogVideoX": (8, 1)}
"""Autoencoder -> (n, k): it takes k frames and whole multiples of n more. Of the others the first
frame is a latent frame of its own, and any number of latent frames follows: CogVideoX decodes those
in pairs."""


@dataclass(frozen=True)
class Grid:
    """How pixels become tokens. Each is a size (frames, height, width).

    scale: pixels per latent; of frames, all but the first. patch: latents per token.
    length: (n, k), a video has k frames and whole multiples of n more.
    most: tokens that the model has positions for, per axis; None: any number.
    """

    scale: tuple[int, int, int]
    patch: tuple[int, int, int]
    length: tuple[int, int]
    most: int | None = None

    @property
    def offset(self) -> int:
        """Frames of the shortest video; 1 where the first is a latent frame of its own."""
        return self.length[1]

    @property
    def steps(self) -> tuple[int, int, int]:
        """Sizes are multiples of these; frames are, plus `offset`."""
        _, height, width = (s * p for s, p in zip(self.scale, self.patch, strict=True))
        return self.length[0], math.lcm(SIZE_MULTIPLE, height), math.lcm(SIZE_MULTIPLE, width)

    def tokens(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Token grid of a video of a size that the model takes."""
        time = (frames - self.offset) // self.scale[0] + self.offset
        latents = time, height // self.scale[1], width // self.scale[2]
        time, rows, columns = (-(-n // p) for n, p in zip(latents, self.patch, strict=True))
        return time, rows, columns


def read_grid(model: Model) -> Grid:
    """From the configs of autoencoder and transformer. Raises InputError for odd values."""
    transformer = model.transformers[0]
    settings = config(model, transformer)
    packed = family_of(model).packed
    time, height, width = _patch(model, transformer, settings)
    file, key = f"{transformer}/config.json", "rope_max_seq_len"
    longest = settings.get(key)
    temporal, spatial = _compression(model)
    return Grid(
        scale=(temporal, spatial, spatial),
        patch=(time, height * packed, width * packed),
        most=None if longest is None else model.number(file, key, longest),
        length=LENGTHS.get(model.components["vae"][1], (temporal, 1)),
    )


def config(model: Model, component: str) -> dict[str, Any]:
    """Settings of a component: of its config file, else the defaults of its class."""
    parameters = inspect.signature(component_class(model, component).__init__).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    return {**defaults, **model.files.get(f"{component}/config.json", {})}


def check_size(model: Model, height: int, width: int, frames: int | None = None) -> int:
    """Number of tokens of a video, of an image without frames.

    Raises InputError for what the model rounds or refuses.
    """
    grid = read_grid(model)
    sizes = {"frames": frames, "height": height, "width": width}
    for axis, (name, size) in enumerate(sizes.items()):
        if size is not None:
            step, offset = grid.steps[axis], 0 if axis else grid.offset
            _check_multiple(name, size, step, offset, _most(grid, axis))
    return math.prod(grid.tokens(1 if frames is None else frames, height, width))


def shape_like(
    model: Model, picture: tuple[int, int], height: int | None, width: int | None, area: int
) -> tuple[int, int]:
    """A size (height, width) that the model takes, in the proportions of a picture's.

    height or width: kept if given. area: pixels to come near to, if neither is. A side is rounded
    to the nearest multiple, the proportions suffer for it.
    """
    _, *steps = read_grid(model).steps
    wanted: tuple[float, float]
    tall = picture[0] / picture[1]
    if height is not None:
        wanted = (height, height / tall)
    elif width is not None:
        wanted = (width * tall, width)
    else:
        wanted = (math.sqrt(area * tall), math.sqrt(area / tall))
    near = [max(step, round(side / step) * step) for side, step in zip(wanted, steps, strict=True)]
    return height or near[0], width or near[1]


def longest_video(model: Model, frames: int) -> int:
    """The most frames up to a number that the model takes; 0 if it takes none so short."""
    grid = read_grid(model)
    step = grid.steps[0]
    return max(0, (frames - grid.offset) // step * step + grid.offset)


def _patch(model: Model, transformer: str, settings: Mapping[str, Any]) -> tuple[int, int, int]:
    """Latents per token: `patch_size`, one number for both sides, two, or three with the time's."""
    file, patch = f"{transformer}/config.json", settings.get("patch_size", 1)
    time = settings.get("patch_size_t") or 1
    usual = inspect.signature(component_class(model, transformer)).parameters["patch_size"].default
    listed = isinstance(patch, list | tuple)
    sides = list(patch) if listed else [patch, patch]
    if not listed or (len(sides) == 2 and isinstance(usual, tuple) and len(usual) == 2):
        sides = [time, *sides]
    if len(sides) != 3 or not all(type(p) is int and 0 < p < 2**31 for p in sides):
        raise model.refuse(f"{file} says patch_size: {patch!r}; expected three whole numbers >= 1")
    return sides[0], sides[1], sides[2]


def _compression(model: Model) -> tuple[int, int]:
    """Frames and pixels of a side per latent, as the autoencoder's config or its class says."""
    settings = config(model, "vae")
    found = []
    for axis in ("temporal", "spatial"):
        keys = (f"scale_factor_{axis}", f"{axis}_compression_ratio")
        told = next((key for key in keys if key in settings), None)
        if told is None or (settings[told] is None and told == keys[1]):
            found.append(_compression_of_class(model, axis, settings))
        else:
            found.append(model.number("vae/config.json", told, settings[told]))
    return found[0], found[1]


def _compression_of_class(model: Model, axis: str, settings: Mapping[str, Any]) -> int:
    """What an autoencoder works out by itself, asked of one without numbers."""
    import torch

    channels = settings.get("block_out_channels") or [0]
    plain = 2 ** (len(channels) - 1) if axis == "spatial" else 1
    with torch.device("meta"):
        try:
            made = component_class(model, "vae").from_config(dict(model.files["vae/config.json"]))
        except Exception as error:
            raise model.refuse(f"vae cannot be built: {first_line(error)}") from error
    return int(getattr(made, f"{axis}_compression_ratio", plain))


def _most(grid: Grid, axis: int) -> int | None:
    """Pixels or frames that the model has positions for."""
    if grid.most is None:
        return None
    pixels = grid.scale[axis] * grid.patch[axis] * grid.most
    step = grid.steps[axis]
    return pixels // step * step if axis else pixels - grid.scale[0] + 1


def _check_multiple(name: str, value: int, step: int, offset: int, most: int | None) -> None:
    """Raise InputError unless 0 < value <= most is a multiple of `step`, plus `offset`."""
    if most is not None and value > most:
        raise InputError(f"--{name} {value}: this model has positions for {most} at most")
    if value > 0 and (value - offset) % step == 0:
        return
    below = (value - offset) // step * step + offset
    near = [str(n) for n in (below, below + step) if n > 0] or [str(offset or step)]
    plus = f" plus {offset}" if offset else ""
    raise InputError(
        f"--{name} {value}: this model takes multiples of {step}{plus}; near it: {', '.join(near)}"
    )
