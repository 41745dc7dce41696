"""Which checkpoint a model is, by the facts of its config files, whatever its folder is called.

A card, `configs/models/<checkpoint>.yaml`, lists the facts that tell its checkpoint from all
others, its defaults, and how sparse it is run if nobody says; what the checkpoints of a family
share stands once, in `configs/families/<family>.yaml`, and what families share in the file that
they name as their own family. Two cards never fit one config: a test compares their facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from vidsparse.generate.model_files import InputError
from vidsparse.plain_values import read_file, stamp
from vidsparse.shipped import folder


@dataclass(frozen=True)
class Preset:
    """The method of a checkpoint.

    name, overrides: as for `SparseConfig.load`. source: who has found it good, on what.
    """

    name: str
    overrides: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Card:
    """A checkpoint, or several that their configs do not tell apart.

    name: of the file. checkpoints: ids on the hub for which the defaults are right. facts: file of
    a model -> key -> value; null is a key that the file lacks, or that is off. config: what else
    its files say that its cost depends on, and that is not the default of its classes. defaults:
    settings of a generation. prompts: examples. preset: None if the card names none.
    """

    name: str
    about: str
    checkpoints: tuple[str, ...]
    facts: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any]
    prompts: tuple[str, ...]
    preset: Preset | None = None
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def fits(self, files: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether all facts hold in the files of a model, by name; an absent file is empty."""
        return all(
            plain_fact(files.get(file, {}).get(key)) == plain_fact(value)
            for file, facts in self.facts.items()
            for key, value in facts.items()
        )


def recognise(files: Mapping[str, Mapping[str, Any]]) -> Card | None:
    """The card that fits the files of a model; None if no card does."""
    fitting = [card for card in cards() if card.fits(files)]
    assert len(fitting) < 2, f"cards are ambiguous: {[card.name for card in fitting]}"
    return fitting[0] if fitting else None


def cards() -> list[Card]:
    """All cards, by name. Raises InputError if they are not installed."""
    try:
        models, families = folder("configs/models"), folder("configs/families")
    except FileNotFoundError as error:
        raise InputError(str(error)) from error
    return [read_card(file, families) for file in sorted(models.glob("*.yaml"))]


def read_card(file: Path, families: Path) -> Card:
    """A card, with what it leaves to its family filled in."""
    content = _kept(file, stamp(file))
    family = _family(content, families)
    preset = content.get("preset") or family.get("preset")
    return Card(
        name=file.stem,
        about=content["about"],
        checkpoints=tuple(content.get("checkpoints", ())),
        facts=content["facts"],
        defaults={**family.get("generate", {}), **content["generate"]},
        prompts=tuple(content.get("prompts") or family.get("prompts", ())),
        preset=_preset(preset) if preset else None,
        config=content.get("config", {}),
    )


@lru_cache(maxsize=256)
def _kept(file: Path, when: object) -> dict[str, Any]:
    """The content of a file, which nobody changes; read again when the file is another."""
    return read_file(file)


def _family(content: Mapping[str, Any], families: Path) -> dict[str, Any]:
    """What a card or a family leaves to its own family; empty if it has none."""
    if "family" not in content:
        return {}
    file = families / f"{content['family']}.yaml"
    family = _kept(file, stamp(file))
    above = _family(family, families)
    settings = {**above.get("generate", {}), **family.get("generate", {})}
    return {**above, **family, "generate": settings}


def _preset(content: Mapping[str, Any]) -> Preset:
    return Preset(content["name"], tuple(content.get("set", ())), content["source"])


def plain_fact(value: Any) -> Any:
    """A component that a pipeline does without is written [null, null].

    A flag that is off is absent from files that are older than it.
    """
    return None if value is False or value == [None, None] else value
