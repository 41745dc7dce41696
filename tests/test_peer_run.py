"""What runs of diffusers' tests say: what only we fail, what was not sparse or not collected."""

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


SKYREELS = "tests/pipelines/skyreels_v2/test_skyreels_v2"
BOTH = f"""
import os, sys
sys.path.insert(0, {str(RUN.parent.parent)!r})
import tiny
import vidsparse

def test_runs():
    pipe, call = tiny.build("wan")
    tiny.run(pipe, call)
"""
IN_ONE = """
def test_looks_inside():
    pipe, _ = tiny.build("wan")
    assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"
"""
IN_THE_OTHER = """
def accelerated_again(pipe):
    if os.environ["VIDSPARSE_PEER"] != "stock":
        vidsparse.accelerate_pipeline(pipe, tiny.DENSE)
    return pipe
"""


@pytest.mark.slow
def test_what_only_we_fail_and_what_never_was_sparse(tmp_path: Path) -> None:
    dense = BOTH.replace("tiny.run(pipe", "tiny.run(accelerated_again(pipe)")
    model = "tests/models/transformers/test_models_transformer_skyreels_v2.py"
    files = {
        model: "def test_one():\n    pass\n",
        f"{SKYREELS}.py": BOTH + IN_ONE,
        f"{SKYREELS}_df.py": dense + IN_THE_OTHER,
    }
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    command = [sys.executable, str(RUN), "--diffusers", str(tmp_path), "--modes", "sparse"]
    done = subprocess.run(
        [*command, "--targets", "skyreels_v2"], capture_output=True, text=True, check=False
    )
    stock, sparse, *ours = done.stdout.splitlines()
    assert stock == "stock: 4 passed, 0 failed, 0 skipped", done.stderr
    assert sparse == "sparse: 3 passed, 1 failed, 0 skipped; 16 sparse calls"
    assert [line.split() for line in ours] == [
        ["OURS", f"{SKYREELS.replace('/', '.')}::test_looks_inside"],
        ["OURS", *f"no sparse call of attention in {SKYREELS}_df.py".split()],
    ]
    assert done.returncode == 1
