"""Runs of diffusers' tests: what only we fail, what was not sparse or not collected, the table."""

from __future__ import annotations

import csv
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import diffusers
import pytest

from vidsparse.pipelines.families import MISSING, by_family

RUN = Path(__file__).resolve().parent / "peer" / "run.py"
FILE = "tests/pipelines/hunyuan_video1_5/test_hunyuan_1_5.py"
MODEL = "tests/models/transformers/test_models_transformer_hunyuan_1_5.py"
spec = importlib.util.spec_from_file_location("peer_run", RUN)
assert spec is not None and spec.loader is not None
run = sys.modules["peer_run"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clone with the two files of the target `hunyuan_video15`; both can be collected."""
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
    command += ["--targets", "hunyuan_video15", "--stock", str(checkout / "stock.xml"), *more]
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


VISUALCLOZE = "tests/pipelines/visualcloze/test_pipeline_visualcloze_combined.py"
GENERATION = "tests/pipelines/visualcloze/test_pipeline_visualcloze_generation.py"
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
    files = {VISUALCLOZE: BOTH + IN_ONE, GENERATION: dense + IN_THE_OTHER}
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    table = tmp_path / "results.csv"
    old = dict.fromkeys(run.COLUMNS, "1") | {"target": "wan_vace", "mode": "late"}
    of_no_target = old | {"target": "no_longer"}
    run.write(table, [of_no_target, old], ["no_longer", "wan_vace"])
    command = [sys.executable, str(RUN), "--diffusers", str(tmp_path), "--modes", "sparse"]
    done = subprocess.run(
        [*command, "--targets", "flux_visualcloze", "--table", str(table)],
        capture_output=True,
        text=True,
        check=False,
    )
    stock, sparse, *ours = done.stdout.splitlines()
    assert stock == "stock: 3 passed, 0 failed, 0 skipped", done.stderr
    assert sparse == "sparse: 2 passed, 1 failed, 0 skipped; 16 sparse calls"
    module = VISUALCLOZE.removesuffix(".py").replace("/", ".")
    assert ours[0].split(maxsplit=2)[:2] == ["OURS", f"{module}::test_looks_inside"]
    assert "WanSparseProcessor" in ours[0]
    assert ours[1].split() == [
        "OURS",
        *f"no sparse call of attention in {GENERATION}".split(),
    ]
    assert done.returncode == 1
    with table.open() as lines:
        new, kept = csv.DictReader(lines)
    assert kept == old
    figures = {"stock_passed": "3", "passed": "2", "cannot_hold": "0", "ours": "1"}
    calls = {"sparse_calls": "16", "dense_calls": "16"}
    names = {"target": "flux_visualcloze", "mode": "sparse", "tests": "all"}
    assert new == names | figures | calls | {"diffusers": diffusers.__version__}


EXPECTED = tomllib.loads((RUN.parent / "expected.toml").read_text())


def test_every_family_has_a_target_or_a_reason() -> None:
    families, untested = {*by_family(), *MISSING}, set(EXPECTED["untested"])
    of_target = {
        name: max((f for f in families if f"{name}_".startswith(f"{f}_")), key=len, default=None)
        for name in EXPECTED["targets"]
    }
    assert None not in of_target.values(), of_target
    assert {*of_target.values()} | untested == families
    assert not {*of_target.values()} & untested
    files = [file for target in EXPECTED["targets"].values() for file in target]
    assert len(files) == len(set(files))


def test_the_table_is_of_the_targets() -> None:
    with (RUN.parent / "results.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert rows and {row["target"] for row in rows} <= set(EXPECTED["targets"])
    assert len({(row["target"], row["mode"]) for row in rows}) == len(rows)
    for row in rows:
        assert run.run_in(row["mode"], EXPECTED["targets"][row["target"]]), row
        parts = ("passed", "cannot_hold", "ours")
        assert sum(int(row[part]) for part in parts) == int(row["stock_passed"]) > 0
        assert row["ours"] == "0", row
        assert int(row["sparse_calls" if row["mode"] == "sparse" else "dense_calls"]) > 0, row


def test_late_is_of_pipelines(checkout: Path) -> None:
    """A target of transformers alone has nothing to run there, and gets no row."""
    (checkout / "tests" / "pipelines").mkdir(exist_ok=True)
    model = EXPECTED["targets"]["wan_model"][0]
    (checkout / model).write_text("def test_one():\n    pass\n")
    keep(checkout, model)
    command = [sys.executable, str(RUN), "--diffusers", str(checkout), "--modes", "late"]
    command += ["--targets", "wan_model", "--stock", str(checkout / "stock.xml")]
    command += ["--table", str(checkout / "results.csv")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    stock, late = done.stdout.splitlines()
    assert stock == "stock: 1 passed, 0 failed, 0 skipped"
    assert late.startswith("late: nothing to run") and not (checkout / "results.csv").exists()
    assert run.run_in("late", [MODEL, FILE]) == [FILE]
    assert run.run_in("sparse", [MODEL, FILE]) == [MODEL, FILE]


@pytest.mark.parametrize("entry", EXPECTED["cannot_hold"], ids=lambda entry: entry["test"])
def test_what_cannot_hold_is_of_a_test_a_mode_and_an_error(entry: dict[str, str]) -> None:
    assert entry["why"] and entry["test"] and entry["error"]
    assert set(entry.get("modes", run.MODES)) <= set(run.MODES)
    assert not re.search(entry["test"], "tests.pipelines.a.test_a.TestA::test_callback_inputs")


@pytest.mark.parametrize(
    ("found", "wanted", "known"),
    [
        ("torch.Size([5, 3, 64, 64])", "(5, 3, 16, 16)", True),
        ("torch.Size([3, 32, 32])", "(3, 16, 16)", True),
        ("Tuples differ: (9, 64, 64, 3)", "(9, 32, 32, 3)", True),
        ("torch.Size([4, 3, 64, 64])", "(5, 3, 16, 16)", False),
        ("torch.Size([5, 3, 32, 32])", "(5, 3, 32, 32)", False),
        ("torch.Size([5, 3, 16, 16])", "(5, 3, 32, 32)", False),
        ("torch.Size([64, 64])", "(16, 16)", False),
    ],
)
def test_another_size_is_known_and_nothing_else_of_the_shape(
    found: str, wanted: str, known: bool
) -> None:
    case = "tests.pipelines.a.test_a.TestA::test_inference"
    error = f"AssertionError: {found} != {wanted}"
    why = run.reason(EXPECTED["cannot_hold"], "sparse", case, error)
    assert (why is not None and "size of the smaller video" in why) == known


def test_the_reason_is_of_the_error() -> None:
    known = [{"test": "test_inference$", "error": "^Assert", "modes": ["sparse"], "why": "pixels"}]
    case = "tests.pipelines.a.test_a.TestA::test_inference"
    assert run.reason(known, "sparse", case, "AssertionError: 1") == "pixels"
    assert run.reason(known, "dense", case, "AssertionError: 1") is None
    assert run.reason(known, "sparse", case, "ValueError: img_ids") is None
    assert run.reason(known, "sparse", case) is None
    assert run.reason(known, "sparse", f"{case}_batch", "AssertionError") is None
