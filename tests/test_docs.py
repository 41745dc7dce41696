"""The site: every page is in its navigation, what is generated is current, commands exist."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.main import get_command

from vidsparse.cli import app

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def commands() -> list[tuple[str, str]]:
    """(page, command) of all blocks of shell; lines that go on are one."""
    found = []
    for page in [*PAGES, ROOT / "README.md"]:
        fenced = re.findall(r"^```(.*?)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        for block in (text for language, text in fenced if not language):
            whole = block.replace("\\\n", " ")
            for line in whole.splitlines():
                for part in line.split(";"):
                    if match := re.search(r"(?:^|-m )vidsparse (.*)", part.strip()):
                        found.append((page.name, match[1]))
    return found


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = {entry if isinstance(entry, str) else next(iter(entry.values())) for entry in nav}
    assert named == {page.name for page in PAGES}


def test_the_page_of_methods_is_what_the_methods_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "pipelines")
    import methods_page

    assert methods_page.PAGE.read_text() == methods_page.page()
    sys.modules.pop("methods_page")


def test_pictures_are_there() -> None:
    for page in PAGES:
        for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()):
            assert (DOCS / name).is_file(), f"{page.name}: {name}"


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_have_the_options_that_are_written(page: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    group = get_command(app)
    context = typer.Context(group)
    while words and hasattr(group, "commands"):
        name = words.pop(0)
        if name.startswith("-"):
            return
        assert name in group.commands, f"{page}: vidsparse {name}"
        group = group.commands[name]
    options = {option for one in group.get_params(context) for option in one.opts}
    for word in words:
        if re.match(r"-{1,2}[a-z]", word):
            assert word.split("=")[0] in options, f"{page}: {command}"


def test_commands_were_found() -> None:
    """So that the test above cannot pass by finding none."""
    assert len(commands()) > 20
