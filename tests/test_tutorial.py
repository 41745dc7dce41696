"""The example of CONTRIBUTING.md, as it is written there, and what it says of a missing entry."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

TEXT = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLE = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
ENTRIES = re.findall(r"^ +vidsparse\.Site\(.*\),\n", EXAMPLE, re.MULTILINE)


def test_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {"__name__": "tutorial"}
    exec(compile(EXAMPLE, "CONTRIBUTING.md", "exec"), scope)
    assert "2 self-attention calls, 0 dense" in capsys.readouterr().out
    assert 0 < scope["vidsparse"].run_report(scope["pipe"]).density < 0.6


@pytest.mark.parametrize("entry", ENTRIES)
def test_without_an_entry(entry: str) -> None:
    assert len(ENTRIES) == 2
    with pytest.raises(AssertionError):
        exec(compile(EXAMPLE.replace(entry, ""), "CONTRIBUTING.md", "exec"), {"__name__": "t"})
