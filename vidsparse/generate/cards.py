"""Which checkpoint a model is, by the facts of its config files, whatever its folder is called.

A card, `configs/models/<checkpoint>.yaml`, lists the facts that tell its checkpoint from all
others, and its defaults; what the checkpoints of a family share stands once, in
`configs/families/<family>.yaml`. Two cards never fit one config: a test compares their facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidsparse.generate.model_files import InputError
from vidsparse.plain_values import read_file
from vidsparse.shipped import folder


@dataclass(frozen=True)
class Card:
    """A checkpoint, or several that their configs do not tell apart.

    name: of the file. checkpoints: ids on the hub. facts: file of a model -> key -> value; a key
    that a file lacks counts as null. defaults: settings of a generation. prompts: examples.
    """

    name: str
    about: str
    checkpoints: tuple[str, ...]
    facts: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any]
    prompts: tuple[str, ...]

    def fits(self, files: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether all facts hold in the files of a model, by name; an absent file is empty."""
        return all(
            _plain(files.get(file, {}).get(key)) == value
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
    content = read_file(file)
    family = read_file(families / f"{content['family']}.yaml") if "family" in content else {}
    return Card(
        name=file.stem,
        about=content["about"],
        checkpoints=tuple(content.get("checkpoints", ())),
        facts=content["facts"],
        defaults={**family.get("generate", {}), **content["generate"]},
        prompts=tuple(content.get("prompts") or family.get("prompts", ())),
    )


def _plain(value: Any) -> Any:
    """A component that a pipeline does without is written [null, null]."""
    return None if value == [None, None] else value
