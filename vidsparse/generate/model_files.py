"""What `--model` names, and the small files of it: a folder here, or an id on the hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vidsparse.options import path
from vidsparse.shipped import demo_model

INDEX = "model_index.json"
HUB = "the Hugging Face hub"
WEIGHT_FILES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".sft")
"""Endings of files that hold weights, and nothing that says what they are the weights of."""


class InputError(ValueError):
    """A mistake in what the user asked for: what was expected, what came, the cure, in one line."""


def named(option: str, text: str) -> Path:
    """`options.path`. Raises InputError."""
    try:
        return path(option, text)
    except ValueError as error:
        raise InputError(str(error)) from error


def first_line(error: BaseException, longest: int = 300) -> str:
    """Kind and first line of an error of another library."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= longest else text[:longest] + " ..."


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first of many names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def locate(source: str | None, say: Callable[[str], None]) -> str:
    """Folder or hub id that `--model` names; None is the demo model.

    The answer is a folder exactly if `Path(answer).is_dir()`. Raises InputError.
    """
    if source is None:
        try:
            return str(demo_model())
        except FileNotFoundError as error:
            raise InputError(f"{error}; or choose a model with --model") from error
    if not source.strip() or "\0" in source:
        raise InputError(
            f"--model {source!r}: expected a folder or {HUB}'s owner/name; leave --model out for "
            "the demo model"
        )
    path = Path(os.path.expanduser(source))
    try:
        if path.is_dir():
            return str(path)
        if path.exists():
            raise InputError(f"--model {source}: {_what_file(path)}")
        # owner/name is an id on the hub, unless it starts with a folder that exists here
        here = path.parts[0] in (".", "..", "/", "~") or Path(path.parts[0]).is_dir()
    except OSError as error:
        raise InputError(f"--model {source[:80]}: {error.strerror}") from error
    url = re.match(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)", source)
    if url:
        raise InputError(f"--model {source}: write the id alone, --model {url[1]}")
    if here or source.endswith(WEIGHT_FILES):
        raise InputError(f"--model {source}: there is no such {_wanted(source)}")
    _check_id(source)
    say(f"looking for {source} on {HUB}")
    return source


def _wanted(source: str) -> str:
    return "file, and it would have to be a folder" if source.endswith(WEIGHT_FILES) else "folder"


def _check_id(source: str) -> None:
    """Raise InputError unless the hub may have a model of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(source)
        valid = source.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise InputError(
            f"--model {source}: there is no such folder, and no model on {HUB} has such a name: "
            "they are called owner/name"
        )


def _what_file(path: Path) -> str:
    """Why a file that exists is no model."""
    if path.name == INDEX:
        return f"give the folder that holds this file, --model {path.parent}"
    if path.suffix in WEIGHT_FILES:
        return (
            "single files of weights are not supported, a model is the folder that save_pretrained "
            "wrote; in Python, load the file with the from_single_file of diffusers, then call "
            "vidsparse.accelerate_pipeline, or save_pretrained and give that folder"
        )
    return "this is a file; give the folder that save_pretrained wrote"


def what_folder(folder: Path) -> str:
    """Why a folder without model_index.json is no model, and what would be."""
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return f"the folder is empty; give the folder that save_pretrained wrote, with {INDEX}"
    if "modular_model_index.json" in names:
        return "this is a modular pipeline, which is not supported; give an ordinary one"
    inside = [name for name in names if (folder / name / INDEX).is_file()]
    snapshots = folder / "snapshots"
    if snapshots.is_dir():
        inside = [f"snapshots/{p.name}" for p in snapshots.iterdir() if (p / INDEX).is_file()]
    if inside:
        return f"there is no {INDEX} in it, but a pipeline below it: --model {folder / inside[0]}"
    if _is_lora(folder, names):
        return (
            "this is a LoRA, not a pipeline; in Python, load its base model, call "
            "pipe.load_lora_weights, then vidsparse.accelerate_pipeline"
        )
    for file in ("config.json", "scheduler_config.json", "tokenizer_config.json"):
        kind = _kind_of_part(folder / file)
        if kind:
            whole = (folder.resolve().parent / INDEX).is_file()
            cure = f"--model {folder.resolve().parent}" if whole else f"one with {INDEX}"
            return f"this is one part of a pipeline, {kind}; give the whole pipeline, {cure}"
    if any(name.endswith(WEIGHT_FILES) for name in names):
        return (
            "this folder holds weights in another format than that of diffusers; take the "
            "checkpoint whose name ends with -Diffusers, or convert it"
        )
    return (
        f"there is no {INDEX} of a diffusers pipeline in it; give the folder that save_pretrained "
        "wrote"
    )


def _is_lora(folder: Path, names: list[str]) -> bool:
    """By the names of PEFT and diffusers, or of the tensors in a file that is called otherwise."""
    from safetensors import SafetensorError, safe_open

    if {"adapter_config.json", "pytorch_lora_weights.safetensors"} & {*names}:
        return True
    for name in names:
        if name.endswith(".safetensors"):
            with suppress(SafetensorError, OSError), safe_open(folder / name, "pt") as tensors:
                return any("lora" in key.lower() for key in tensors.keys())  # noqa: SIM118
    return False


def _kind_of_part(file: Path) -> str | None:
    """Class that a component's config names; None if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    architectures = content.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    kind = content.get("_class_name") or first or content.get("tokenizer_class")
    return kind if isinstance(kind, str) else None


def read(source: str, file: str) -> dict[str, Any]:
    """A JSON file of a model; empty if the model has no such file. Raises InputError."""
    path = Path(source) / file if Path(source).is_dir() else _fetch(source, file)
    if path is None or not path.is_file():
        return {}
    return read_json(path, f"--model {source}: {file}")


def read_json(path: Path, where: str) -> dict[str, Any]:
    """A JSON object. where: begins the message of the InputError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {error}; download it again") from error
    if not isinstance(content, dict) or not content:
        raise InputError(f"{where} holds no JSON object with keys; download it again")
    return content


def _fetch(source: str, file: str) -> Path | None:
    """A file of a model on the hub; None if the model has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, file))
    except Exception as error:  # of the network, the hub, the cache: none of them is ours
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise hub_error(source, error) from error


def hub_error(source: str, error: Exception) -> InputError:
    """What went wrong between this machine and the hub, and the cure."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    nowhere = f"--model {source}: there is no such folder, and"
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        why = f"{HUB} cannot be reached: HF_HUB_OFFLINE is set, and the model is not in the cache"
        return InputError(f"{nowhere} {why}")
    if isinstance(error, LocalEntryNotFoundError):
        return InputError(f"{nowhere} {HUB} cannot be reached, nor is the model in the cache")
    if isinstance(error, GatedRepoError):
        return InputError(
            f"--model {source}: accept its terms on {HUB}, then log in with `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"{nowhere} {HUB} has no such model; for a private one log in with `hf auth login`"
        )
    return InputError(f"{nowhere} {HUB} says: {first_line(error)}")
