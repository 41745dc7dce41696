"""A model without its weights: what its small files say, checked; local or on the hub."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidsparse.generate.cards import Card, cards, recognise
from vidsparse.generate.model_files import INDEX, InputError, listed, locate, read, what_folder

SIZE_MULTIPLE = 16  # of pixels, whatever the model: the pipelines check it
LIBRARIES = ("diffusers", "transformers")
TRANSFORMER = "transformer/config.json"
INTERFACE = ("patch_size", "in_channels", "out_channels", "text_dim", "image_dim")
"""What two transformers of one pipeline have in common: they take turns on the same latents."""


@dataclass(frozen=True)
class Model:
    """A pipeline without its weights.

    name: of its folder, or of its id on the hub. source: folder, or id on the hub.
    files: its JSON files by name, "model_index.json" and "<component>/config.json"; absent: empty.
    card: of the checkpoint that it is; None: of none that we know.
    """

    name: str
    source: str
    files: Mapping[str, Mapping[str, Any]]
    card: Card | None = None

    @property
    def index(self) -> Mapping[str, Any]:
        """model_index.json."""
        return self.files[INDEX]

    @property
    def components(self) -> dict[str, tuple[str, str]]:
        """Component -> library and class, without those that the pipeline does without."""
        parts = {name: value for name, value in self.index.items() if isinstance(value, list)}
        return {n: (v[0], v[1]) for n, v in parts.items() if v != [None, None]}

    @property
    def transformers(self) -> list[str]:
        """Names of the transformers, in the order of their turns."""
        return [name for name in ("transformer", "transformer_2") if name in self.components]

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Settings of the checkpoint; empty if we do not know it."""
        return self.card.defaults if self.card else {}

    @property
    def prompts(self) -> tuple[str, ...]:
        """Examples for the checkpoint; empty if we do not know it."""
        return self.card.prompts if self.card else ()

    def refuse(self, what: str) -> InputError:
        """The error that says what is wrong with this model."""
        return InputError(f"--model {self.source}: {what}")

    def number(self, file: str, key: str, default: int) -> int:
        """A positive whole number of a config file. Raises InputError for anything else."""
        value = self.files.get(file, {}).get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 2**20:
            raise self.refuse(f"{file} says {key}: {value!r}; expected a whole number 1 .. 2^20")
        return value

    def head_dim(self, transformer: str) -> int | None:
        """Channels of a head of a transformer; None: its config does not say."""
        file = f"{transformer}/config.json"
        key = "attention_head_dim"
        return self.number(file, key, 1) if key in self.files.get(file, {}) else None


def find_model(source: str | None, say: Callable[[str], None] = lambda text: None) -> Model:
    """Read the small files of a model; None is the demo model. Raises InputError."""
    place = locate(source, say)
    index = read(place, INDEX)
    if not index and Path(place).is_dir():
        raise InputError(f"--model {place}: {what_folder(Path(place))}")
    if not isinstance(index.get("_class_name"), str):
        raise InputError(
            f"--model {place}: there is no {INDEX} of a diffusers pipeline in it: it names no "
            "_class_name; give the folder that save_pretrained wrote"
        )
    model = Model(_name(place), place, {INDEX: index})
    _check_components(model)
    files = {INDEX: index}
    for name in model.components:
        if name in (*model.transformers, "vae", "text_encoder", "scheduler"):
            file = config_file(name)
            files[file] = read(place, file)
    return Model(model.name, place, files, recognise(files))


def config_file(component: str) -> str:
    """Name of a component's config file inside the model."""
    return f"{component}/{'scheduler_config' if component == 'scheduler' else 'config'}.json"


def _name(place: str) -> str:
    """What a person would call a model: a snapshot's folder is named after its commit."""
    path = Path(place).resolve() if Path(place).is_dir() else Path(place)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.rpartition("--")[2]
    return path.name


def _check_components(model: Model) -> None:
    """Raise InputError unless each component is a library's class, or [null, null]."""
    for name, value in model.index.items():
        if not isinstance(value, list):
            continue
        pair = len(value) == 2 and all(isinstance(item, str) for item in value)
        if not pair and value != [None, None]:
            raise model.refuse(
                f"{INDEX} says {name}: {value!r}; expected a library and a class, as "
                '["diffusers", "AutoencoderKLWan"]'
            )


def pipeline_class(model: Model) -> Any:
    """The diffusers class of a model, which takes text alone. The import takes seconds.

    Raises InputError for what is not supported, or does not go together.
    """
    import diffusers

    from vidsparse.pipelines.families import adapters

    name = str(model.index["_class_name"])
    found: Any = getattr(diffusers, name, None)
    known = adapters()
    classes = {kind for _, kind in model.components.values()}
    supported = isinstance(found, type) and any(a.transformer.__name__ in classes for a in known)
    if not supported:
        raise model.refuse(
            f"{name} is not supported; `vidsparse models` lists the pipelines that are"
        )
    written = {card.facts.get(TRANSFORMER, {}).get("_class_name") for card in cards()}
    if not classes & written:
        raise model.refuse(
            f"a {name} can be accelerated from Python, by vidsparse.accelerate_pipeline; this "
            "command knows the sizes of Wan models alone"
        )
    for given in ("image", "video"):
        if given in inspect.signature(found.__call__).parameters:
            raise model.refuse(
                f"a {name} starts from {given}s, this command from text "
                "alone; call it from Python, after vidsparse.accelerate_pipeline"
            )
    for component in model.components:
        component_class(model, component)
    for file, content in model.files.items():
        if not content:
            raise model.refuse(f"{file} is missing; download it again")
    needed = inspect.signature(found).parameters.values()
    missing = {p.name for p in needed if p.default is p.empty} - {*model.components}
    if missing or not model.transformers:
        lacks = listed(sorted(missing or {"transformer"}))
        raise model.refuse(f"{INDEX} lacks {lacks}, which a {name} needs; download it again")
    _check_turns(model)
    return found


def component_class(model: Model, component: str) -> Any:
    """Class of a component. Raises InputError unless diffusers or transformers has it."""
    import diffusers
    import transformers

    library, name = model.components[component]
    modules = {"diffusers": diffusers, "transformers": transformers}
    found = getattr(modules.get(library), name, None)
    if not isinstance(found, type):
        raise model.refuse(
            f"{INDEX} says {component}: {library}.{name}; only classes of "
            f"{' and '.join(LIBRARIES)} are loaded, never code that comes with a model"
        )
    return found


def _check_turns(model: Model) -> None:
    """Raise InputError unless the transformers of the model can take turns."""
    ratio = model.index.get("boundary_ratio")
    number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if ratio is not None and not (number and 0 <= ratio <= 1):
        raise model.refuse(f"{INDEX} says boundary_ratio: {ratio!r}; expected null or 0 .. 1")
    if (ratio is None) != (len(model.transformers) == 1):
        raise model.refuse(
            f"{INDEX} says boundary_ratio: {ratio!r} and names {' and '.join(model.transformers)}; "
            "it is a number with two transformers, null with one"
        )
    first, *others = (model.files[f"{name}/config.json"] for name in model.transformers)
    for other in others:
        unlike = [key for key in INTERFACE if first.get(key) != other.get(key)]
        if unlike:
            raise model.refuse(f"its transformers do not go together: unlike {', '.join(unlike)}")


@dataclass(frozen=True)
class Grid:
    """How pixels become tokens. Each is a size (frames, height, width).

    scale: pixels per latent; of frames, all but the first. patch: latents per token.
    most: tokens that the model has positions for, per axis.
    """

    scale: tuple[int, int, int]
    patch: tuple[int, int, int]
    most: int

    @property
    def steps(self) -> tuple[int, int, int]:
        """Sizes are multiples of these; frames are, plus `offset`."""
        time, height, width = (s * p for s, p in zip(self.scale, self.patch, strict=True))
        return time, math.lcm(SIZE_MULTIPLE, height), math.lcm(SIZE_MULTIPLE, width)

    @property
    def offset(self) -> int:
        """Frames of the shortest video: the first frame is a latent of its own."""
        return 1 + self.scale[0] * (self.patch[0] - 1)

    def tokens(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Token grid of a video of a size that the model takes."""
        latents = (frames - 1) // self.scale[0] + 1, height // self.scale[1], width // self.scale[2]
        time, rows, columns = (n // p for n, p in zip(latents, self.patch, strict=True))
        return time, rows, columns


def read_grid(model: Model) -> Grid:
    """From the configs of autoencoder and transformer. Raises InputError for odd values."""
    file = f"{model.transformers[0]}/config.json"
    patch = model.files[file].get("patch_size", [1, 2, 2])
    whole = isinstance(patch, list) and all(type(p) is int and 0 < p < 2**31 for p in patch)
    if not whole or len(patch) != 3:
        raise model.refuse(f"{file} says patch_size: {patch!r}; expected three whole numbers >= 1")
    spatial = model.number("vae/config.json", "scale_factor_spatial", 8)
    temporal = model.number("vae/config.json", "scale_factor_temporal", 4)
    most = model.number(file, "rope_max_seq_len", 1024)
    return Grid((temporal, spatial, spatial), (patch[0], patch[1], patch[2]), most)


def check_size(model: Model, height: int, width: int, frames: int) -> int:
    """Number of tokens of the video. Raises InputError for what the model rounds or refuses."""
    grid = read_grid(model)
    sizes = {"frames": frames, "height": height, "width": width}
    for axis, (name, size) in enumerate(sizes.items()):
        step, offset = grid.steps[axis], 0 if axis else grid.offset
        most = grid.scale[axis] * grid.patch[axis] * grid.most
        most = most // step * step if axis else most - grid.scale[0] + 1
        _check_multiple(name, size, step, offset, most)
    return math.prod(grid.tokens(frames, height, width))


def _check_multiple(name: str, value: int, step: int, offset: int, most: int) -> None:
    """Raise InputError unless 0 < value <= most is a multiple of `step`, plus `offset`."""
    if value > most:
        raise InputError(f"--{name} {value}: this model has positions for {most} at most")
    if value > 0 and (value - offset) % step == 0:
        return
    below = (value - offset) // step * step + offset
    near = [str(n) for n in (below, below + step) if n > 0] or [str(offset or step)]
    plus = f" plus {offset}" if offset else ""
    raise InputError(
        f"--{name} {value}: this model takes multiples of {step}{plus}; near it: {', '.join(near)}"
    )
