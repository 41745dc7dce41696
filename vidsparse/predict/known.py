"""A published model without any file of it: its card, and the defaults of its classes."""

from __future__ import annotations

import inspect
import typing
from typing import Any

from vidsparse.generate.cards import Card, cards
from vidsparse.generate.model import Model
from vidsparse.generate.model_files import INDEX
from vidsparse.pipelines.adapter import Adapter
from vidsparse.pipelines.families import adapters

LIBRARIES = ("diffusers", "transformers")


def known(source: str | None) -> Model | None:
    """The model of a card that has this name, or lists this id on the hub; None if no card does."""
    for card in cards() if source else ():
        ids = {name.lower() for name in (*card.checkpoints, card.name)}
        ids |= {name.rpartition("/")[2] for name in ids}
        if str(source).lower() in ids and card.checkpoints:
            return from_card(card)
    return None


def from_card(card: Card) -> Model:
    """Its config files hold the facts of the card; what they leave out are defaults of classes."""
    import diffusers

    facts = {
        name: {**card.facts.get(name, {}), **card.config.get(name, {})}
        for name in {**card.facts, **card.config}
    }
    transformer = facts["transformer/config.json"]
    family = next(a for a in adapters() if a.transformer.__name__ == transformer["_class_name"])
    index = facts.setdefault(INDEX, {})
    index["_class_name"] = index.get("_class_name") or family.pipelines[0]
    for name, kind in _components(getattr(diffusers, index["_class_name"]), family).items():
        index.setdefault(name, [kind.__module__.partition(".")[0], kind.__name__])
    if isinstance(index.get("transformer_2"), list) and index["transformer_2"] != [None, None]:
        facts.setdefault("transformer_2/config.json", dict(transformer))
    facts["vae/config.json"] = {"_class_name": index["vae"][1], **facts.get("vae/config.json", {})}
    return Model(card.name, card.checkpoints[0], facts, card)


def _components(pipeline: Any, family: Adapter) -> dict[str, type]:
    """Component -> class, by the annotations of a pipeline's `__init__`; without optional ones."""
    hints = typing.get_type_hints(pipeline.__init__)
    found: dict[str, type] = {}
    for name, parameter in inspect.signature(pipeline.__init__).parameters.items():
        if name == "self" or parameter.default is not parameter.empty:
            continue
        classes = (hints.get(name), *typing.get_args(hints.get(name)))
        able = [
            kind
            for kind in classes
            if isinstance(kind, type) and kind.__module__.partition(".")[0] in LIBRARIES
        ]
        if able:
            found[name] = able[0]
    found["transformer"] = family.transformer
    return found
