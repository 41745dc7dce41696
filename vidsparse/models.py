"""Supported models: the families of `pipelines/families`, the cards of `configs/models`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def supported() -> dict[str, Any]:
    """Plain values.

    families: name -> a list of {transformer, pipelines, text}, one per class of transformers.
    checkpoints: name -> {about, ids, transformer}, for which `generate` has defaults. refused:
    class -> why. missing: family -> what the installed diffusers lacks of it.
    """
    from vidsparse.generate.cards import cards
    from vidsparse.pipelines.families import MISSING, REFUSED, by_family

    families = {
        name: [
            {
                "transformer": adapter.transformer.__name__,
                "pipelines": list(adapter.pipelines),
                "text": adapter.text,
            }
            for adapter in family
        ]
        for name, family in by_family().items()
    }
    checkpoints = {
        card.name: {
            "about": card.about,
            "ids": list(card.checkpoints),
            "transformer": card.facts.get("transformer/config.json", {}).get("_class_name"),
        }
        for card in cards()
    }
    return {
        "families": families,
        "checkpoints": checkpoints,
        "refused": dict(REFUSED),
        "missing": dict(MISSING),
    }


def describe(found: dict[str, Any]) -> str:
    """`supported()` as text."""
    console = Console(width=110, no_color=True)
    with console.capture() as capture:
        table = Table("family", "transformer", "pipelines", box=None, pad_edge=False)
        for name, classes in found["families"].items():
            for entry in classes:
                table.add_row(name, entry["transformer"], ", ".join(entry["pipelines"]))
        console.print("accelerate_pipeline takes", table, sep="\n")
        table = Table("checkpoint", "what it is", box=None, pad_edge=False)
        for name, entry in found["checkpoints"].items():
            table.add_row(name, entry["about"])
        console.print("\n`generate` knows the defaults of", table, sep="\n")
        table = Table("transformer", "why not", box=None, pad_edge=False)
        for name, why in found["refused"].items():
            table.add_row(name, why)
        console.print("\nnot accelerated are", table, sep="\n")
        for name, why in found["missing"].items():
            console.print(f"\nthe installed diffusers lacks {name}: {why}", highlight=False)
        console.print(
            '\nOthers: accelerate_pipeline(pipe, adapter="generic"), see vidsparse.generic_adapter.'
        )
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
