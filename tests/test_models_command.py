"""`vidsparse models`: every family and checkpoint is listed, by classes that diffusers has."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import zoo
from typer.testing import CliRunner

import vidsparse
from vidsparse.cli import app
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
    for name, entry in found["checkpoints"].items():
        assert entry["transformer"] in known or name == "demo-wan", name
    assert not known & set(found["refused"])


def test_as_text() -> None:
    text = CliRunner().invoke(app, ["models"]).stdout
    for name in (
        "WanTransformer3DModel",
        "Wan2.1-T2V-14B-Diffusers",
        "SanaVideoTransformer3DModel",
    ):
        assert name in text
    assert max(map(len, text.splitlines())) <= 110


def test_each_family_is_proven() -> None:
    """Every class of transformers has a case among the tiny models, which the shared tests run."""
    proven = {type(case.build().model) for case in zoo.cases()}
    for name, family in by_family().items():
        for adapter in family:
            assert any(issubclass(cls, adapter.transformer) for cls in proven), (name, adapter)
