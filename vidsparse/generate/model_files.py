"""A model as its small files describe it, local or on the hub; the weights stay where they are."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vidsparse.shipped import demo_model, folder

SIZE_MULTIPLE = 16  # of pixels, whatever the model: the pipelines check it


class InputError(ValueError):
    """A mistake in what the user asked for: what was expected, what came, the cure, in one line."""


@dataclass(frozen=True)
class Model:
    """A pipeline without its weights.

    name: of its folder. source: what `from_pretrained` takes. index, vae, transformer: its JSON
    files. defaults, prompts: from configs/models.
    """

    name: str
    source: str
    index: dict[str, Any]
    vae: dict[str, Any]
    transformer: dict[str, Any]
    defaults: dict[str, Any]
    prompts: tuple[str, ...]


def find_model(source: str | None, say: Callable[[str], None] = lambda text: None) -> Model:
    """Read the small files of a model; None is the demo model. Raises InputError."""
    if source is None:
        try:
            source = str(demo_model())
        except FileNotFoundError as error:
            raise InputError(f"{error}; or choose a model with --model") from error
    path = Path(source)
    if not path.is_dir():
        # owner/name is an id on the hub, unless it starts with a folder that exists here
        first = path.parts[0] if path.parts else "."
        if path.exists() or first in (".", "..", "/", "~") or Path(first).is_dir():
            raise InputError(f"--model {source}: there is no such folder")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            raise InputError(
                f"--model {source}: there is no such folder, and no model on the Hugging Face "
                "hub has such a name: they are called owner/name"
            )
        say(f"looking for {source} on the Hugging Face hub")
    index = _read(source, "model_index.json")
    if "_class_name" not in index:
        raise InputError(
            f"--model {source}: there is no model_index.json of a diffusers pipeline in it; give "
            "the folder that save_pretrained wrote"
        )
    name = path.resolve().name if path.is_dir() else path.name
    defaults, prompts = _defaults(name)
    transformer = "transformer" if "transformer" in index else "transformer_2"
    return Model(
        name=name,
        source=source,
        index=index,
        vae=_read(source, "vae/config.json"),
        transformer=_read(source, f"{transformer}/config.json"),
        defaults=defaults,
        prompts=prompts,
    )


def pipeline_class(model: Model) -> Any:
    """The diffusers class of a model. The import takes seconds. Raises InputError."""
    import diffusers

    from vidsparse.pipelines import adapters

    name = str(model.index["_class_name"])
    found = getattr(diffusers, name, None)
    parts = [value[1] for value in model.index.values() if isinstance(value, list) and value[1:]]
    known = adapters()
    if found is None or not any(adapter.transformer.__name__ in parts for adapter in known):
        supported = ", ".join(name for adapter in known for name in adapter.pipelines)
        raise InputError(
            f"--model {model.source}: {name} is not supported; supported pipelines are {supported}"
        )
    for given in ("image", "video"):
        if given in inspect.signature(found.__call__).parameters:
            raise InputError(
                f"--model {model.source}: a {name} starts from {given}s, this command from text "
                "alone; call it from Python, after vidsparse.accelerate_pipeline"
            )
    return found


def check_size(model: Model, height: int, width: int, frames: int) -> int:
    """Number of tokens of the video. Raises InputError for what the model rounds or refuses."""
    spatial = int(model.vae.get("scale_factor_spatial") or 8)
    temporal = int(model.vae.get("scale_factor_temporal") or 4)
    _, *patch = model.transformer.get("patch_size") or (1, 2, 2)
    longest = int(model.transformer.get("rope_max_seq_len") or 1024)
    tokens = 1
    for name, size, side in (("height", height, patch[0]), ("width", width, patch[1])):
        multiple = math.lcm(SIZE_MULTIPLE, spatial * side)
        most = spatial * side * longest // multiple * multiple
        _check_multiple(name, size, multiple, 0, most)
        tokens *= size // (spatial * side)
    _check_multiple("frames", frames, temporal, 1, temporal * (longest - 1) + 1)
    return tokens * ((frames - 1) // temporal + 1)


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


def _defaults(name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Settings and prompts of configs/models/<name>.yaml; empty if there is no such file."""
    try:
        file = folder("configs/models") / f"{name}.yaml"
    except FileNotFoundError as error:
        raise InputError(str(error)) from error
    if not file.is_file():
        return {}, ()
    content: Any = OmegaConf.to_container(OmegaConf.load(file))
    return content.get("generate") or {}, tuple(content.get("prompts") or ())


def _read(source: str, file: str) -> dict[str, Any]:
    """A JSON file of a model; empty if the model has no such file."""
    path = Path(source) / file if Path(source).is_dir() else _fetch(source, file)
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"--model {source}: {file} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _fetch(source: str, file: str) -> Path | None:
    """A file of a model on the hub; None if the model has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, file))
    except (OSError, ValueError, EntryNotFoundError) as error:
        offline = isinstance(error, LocalEntryNotFoundError)
        if isinstance(error, EntryNotFoundError) and not offline:
            return None
        why = "cannot be reached" if offline else f"says: {str(error).splitlines()[0]}"
        raise InputError(
            f"--model {source}: there is no such folder, and the Hugging Face hub {why}"
        ) from error
