"""Supported models: the families of `pipelines/families`, the cards of `configs/models`."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 110


def supported() -> dict[str, Any]:
    """Plain values.

    families: name -> a list of {transformer, pipelines, text}, one per class of transformers.
    checkpoints: card -> {about, ids, pipeline, transformer, settings, preset}, what `generate` does
    with a checkpoint if nobody says; a pipeline of None is any of the family. refused: class ->
    why. missing: family -> what the installed diffusers lacks of it.
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
            "pipeline": card.facts.get("model_index.json", {}).get("_class_name"),
            "transformer": card.facts.get("transformer/config.json", {}).get("_class_name"),
            "settings": dict(card.defaults),
            "preset": dataclasses.asdict(card.preset) if card.preset else None,
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
    console = Console(width=WIDTH, no_color=True)
    with console.capture() as capture:
        table = Table("family", "transformer", "pipelines", box=None, pad_edge=False)
        for name, classes in found["families"].items():
            for entry in classes:
                table.add_row(name, entry["transformer"], ", ".join(entry["pipelines"]))
        console.print("accelerate_pipeline takes", table, sep="\n")
        console.print("\n`generate` knows the size, the steps and the preset of")
        for line in _checkpoints(found["checkpoints"]):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
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


def size(settings: dict[str, Any]) -> str:
    """Width and height in pixels, and the frames of a video."""
    frames = f", {settings['frames']} frames" if "frames" in settings else ""
    return f"{settings['width']}x{settings['height']}{frames}"


def method(preset: dict[str, Any] | None) -> str:
    """A preset and its overrides, as `generate` is given them."""
    return " ".join([preset["name"], *preset["overrides"]]) if preset else "the default preset"


def _checkpoints(found: dict[str, Any]) -> list[str]:
    """Lines: ids below the class of their transformer, and what is done with them."""
    lines, last = [], None
    for name, entry in sorted(found.items(), key=lambda item: str(item[1]["transformer"])):
        if entry["transformer"] != last:
            last = entry["transformer"]
            lines.append(str(last))
        lines += [f"  {one}" for one in entry["ids"] or [name]]
        settings = entry["settings"]
        text = f"{size(settings)}, {settings['steps']} steps, {method(entry['preset'])}"
        lines += textwrap.wrap(text, WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 6)
    return lines
