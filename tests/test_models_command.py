"""`vidsparse models`: every family and checkpoint is listed, by classes that diffusers has."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import support_table
import zoo
from typer.testing import CliRunner

import vidsparse
from vidsparse.cli import app
from vidsparse.config import presets
from vidsparse.generate.cards import cards
from vidsparse.pipelines.families import by_family

FAMILIES = Path(vidsparse.__file__).parent / "pipelines" / "families"


def test_as_json() -> None:
    result = CliRunner().invoke(app, ["models", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    files = {file.stem for file in FAMILIES.glob("*.py")} - {"__init__"}
    assert set(found["families"]) | set(found["missing"]) == files
    for classes in found["families"].values():
        for entry in classes:
            assert hasattr(diffusers, entry["transformer"])
            assert entry["pipelines"], entry["transformer"]
            for name in entry["pipelines"]:
                assert hasattr(diffusers, name), name
    known = {entry["transformer"] for family in found["families"].values() for entry in family}
    assert set(found["checkpoints"]) == {card.name for card in cards()}
    for name, entry in found["checkpoints"].items():
        assert entry["transformer"] in known, name
        assert entry["pipeline"] is None or hasattr(diffusers, entry["pipeline"]), name
        settings, preset = entry["settings"], entry["preset"]
        assert min(settings["height"], settings["width"], settings["steps"]) > 0, name
        assert preset["name"] in presets() and isinstance(preset["overrides"], list), name
    assert not known & set(found["refused"])


def test_as_text() -> None:
    text = CliRunner().invoke(app, ["models"]).stdout
    for name in (
        "WanTransformer3DModel",
        "SanaVideoTransformer3DModel",
        *(name for card in cards() for name in card.checkpoints),
    ):
        assert name in text
    lines = text.splitlines()
    found = lines[lines.index("  Wan-AI/Wan2.1-T2V-14B-Diffusers") + 1]
    card = next(card for card in cards() if card.name == "Wan2.1-T2V-14B-Diffusers")
    assert found == "    1280x720, 81 frames, 50 steps, " + " ".join(
        [card.preset.name, *card.preset.overrides]
    )
    assert max(map(len, text.splitlines())) <= 110


def test_the_support_table_is_of_the_present_code() -> None:
    """Its rows are the families that are tested, and all below them is what the code says now."""
    shown, _, facts = support_table.TABLE.read_text().partition(support_table.PIPELINES)
    rows = [line.split(" | ")[0] for line in shown.splitlines() if line.startswith("| ")]
    cure = "run `python tests/support_table.py`"
    assert rows == ["| family", *(f"| {name}" for name in zoo.files())], cure
    text = "\n".join(support_table.facts()) + "\n"
    assert support_table.PIPELINES + facts == text, f"{cure} --facts"


def test_each_family_is_proven() -> None:
    """Every class of transformers has a case among the tiny models, which the shared tests run."""
    proven = {type(case.build().model) for case in zoo.cases()}
    for name, family in by_family().items():
        for adapter in family:
            assert any(issubclass(cls, adapter.transformer) for cls in proven), (name, adapter)
