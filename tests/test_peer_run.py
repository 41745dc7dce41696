"""A kept stock run that knows nothing of the tests in question is refused, in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parent / "peer" / "run.py"
FILE = "tests/pipelines/hunyuan_video1_5/test_hunyuan_1_5.py"
MODEL = "tests/models/transformers/test_models_transformer_hunyuan_1_5.py"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clone with the two files of the target `hunyuan_video1_5`; both can be collected."""
    for file in (FILE, MODEL):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("def test_one():\n    pass\n")
    return tmp_path


def keep(checkout: Path, *files: str) -> Path:
    """The report that pytest writes of these files."""
    report = checkout / "stock.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", *files]
    subprocess.run(command, cwd=checkout, stdout=subprocess.DEVNULL, check=False)
    return report


def refusal(checkout: Path, *more: str) -> str:
    """The one line with which run.py ends, before it runs a test."""
    command = [sys.executable, str(RUN), "--diffusers", str(checkout), "--modes", "dense"]
    command += ["--targets", "hunyuan_video1_5", "--stock", str(checkout / "stock.xml"), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("more", [(), ("--only", "test_one")], ids=["all", "only"])
def test_a_file_that_was_not_collected(checkout: Path, more: tuple[str, ...]) -> None:
    (checkout / FILE).write_text("import no_such_package\n")
    report = keep(checkout, FILE, MODEL)
    line = refusal(checkout, *more)
    assert line.startswith(f"{report}: {FILE.removesuffix('.py').replace('/', '.')} was not coll")
    assert "No module named 'no_such_package'" in line and line.endswith("to run them again")


def test_a_file_of_another_target(checkout: Path) -> None:
    report = keep(checkout, MODEL)
    assert refusal(checkout) == f"--stock {report} has no test of {FILE}: remove it to run them"


def test_no_file_of_the_target(checkout: Path) -> None:
    (checkout / "tests" / "test_other.py").write_text("def test_one():\n    pass\n")
    keep(checkout, "tests/test_other.py")
    assert f"has no test of {MODEL}, {FILE}" in refusal(checkout, "--only", "test_one")


def test_no_report(checkout: Path) -> None:
    (checkout / "stock.xml").write_text("<testsuites>")
    assert "stock.xml is no JUnit report (no element found" in refusal(checkout)
