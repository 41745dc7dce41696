"""A model without its weights: what its small files say, checked; local or on the hub."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidsparse.generate.cards import Card, recognise
from vidsparse.generate.model_files import INDEX, InputError, listed, locate, read, what_folder

if TYPE_CHECKING:
    from vidsparse.pipelines.adapter import Adapter

LIBRARIES = ("diffusers", "transformers")
INTERFACE = ("patch_size", "in_channels", "out_channels", "text_dim", "image_dim")
"""What two transformers of one pipeline have in common: they take turns on the same latents."""


PRECISE = ("AutoencoderKLWan",)
"""Classes that are published for fp32; the pipelines that hold them cast what they give them."""


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
    """The diffusers class of a model. The import takes seconds.

    Raises InputError for what is not supported, or does not go together.
    """
    found, name = supported_class(model), str(model.index["_class_name"])
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


def supported_class(model: Model) -> Any:
    """The diffusers class of a model, whatever lacks beside it. Raises InputError if it is none of
    ours."""
    import diffusers

    name = str(model.index["_class_name"])
    found: Any = getattr(diffusers, name, None)
    if not isinstance(found, type) or _family(model) is None:
        raise model.refuse(
            f"{name} is not supported; `vidsparse models` lists the pipelines that are"
        )
    return found


def with_pipeline(model: Model, name: str) -> Model:
    """The model with its parts in another pipeline of its family. Raises InputError."""
    family = _family(model)
    known = [] if family is None else [n for n in family.pipelines if "Modular" not in n]
    if name not in known:
        raise InputError(f"--pipeline {name}: expected one of {', '.join(known) or 'none'}")
    index = {**model.index, "_class_name": name}
    return replace(model, files={**model.files, INDEX: index})


def family_of(model: Model) -> Adapter:
    """The facts about the family of a model that `pipeline_class` has taken."""
    family = _family(model)
    assert family is not None
    return family


def _family(model: Model) -> Adapter | None:
    from vidsparse.pipelines.families import adapters

    classes = {kind for _, kind in model.components.values()}
    return next((a for a in adapters() if a.transformer.__name__ in classes), None)


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
