"""The small files of published checkpoints, as `checkpoints.yaml` lists them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import yaml

INDEX = "model_index.json"
FILE = Path(__file__).with_suffix(".yaml")


def published() -> dict[str, dict[str, Any]]:
    """Id on the hub -> its entry, with the classes of its group."""
    groups = yaml.safe_load(FILE.read_text())
    classes = ("transformer", "vae", "scheduler")
    return {
        name: {**{key: group[key] for key in classes}, **entry}
        for group in groups
        for name, entry in group["checkpoints"].items()
    }


def files(entry: dict[str, Any], young: bool = True) -> dict[str, dict[str, Any]]:
    """File -> content, as save_pretrained writes them; without what is off, if they are old."""
    nothing = [None, None]
    index = {
        "_class_name": entry["pipeline"],
        "transformer": ["diffusers", entry["transformer"]],
        "transformer_2": nothing,
        "vae": ["diffusers", entry["vae"]],
        "scheduler": ["diffusers", entry["scheduler"]],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "boundary_ratio": None,
        **entry.get("index", {}),
    }
    transformer = _config(entry["transformer"], entry.get("config", {}))
    found = {
        INDEX: index,
        "transformer/config.json": transformer,
        "vae/config.json": _config(entry["vae"], entry.get("vae_config", {})),
        "scheduler/scheduler_config.json": _config(
            entry["scheduler"], entry.get("scheduler_config", {})
        ),
        "text_encoder/config.json": {"d_model": 4096},
    }
    if index["transformer_2"] != nothing:
        found["transformer_2/config.json"] = transformer
    if not young:
        off = (None, False, nothing)
        found = {
            name: {key: value for key, value in content.items() if value not in off}
            for name, content in found.items()
        }
    return json.loads(json.dumps(found))


def write(folder: Path, entry: dict[str, Any]) -> Path:
    """The files in a folder."""
    for name, content in files(entry).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def _config(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of its class, but those that are no plain values."""
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters.values()
    plain = (bool, int, float, str, list, tuple, type(None))
    defaults = {p.name: p.default for p in parameters if isinstance(p.default, plain)}
    unknown = set(given) - {p.name for p in parameters}
    open_ = {p.name for p in parameters if p.default is p.empty} - {"self", *given}
    assert not unknown and not open_, f"{kind} has no {unknown}, and needs {open_}"
    return {"_class_name": kind, **defaults, **given}
