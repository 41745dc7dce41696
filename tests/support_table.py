"""Writes docs/models.md: what the tests have shown of every family, and what is not supported.

    python tests/support_table.py
    python tests/support_table.py --junit FILE
    python tests/support_table.py --facts

Runs the tests of families and of their pipelines, which takes a few minutes, or takes the report
that a run of all tests has left (`pytest --junitxml=FILE`), and writes how they ended. Exit status
1 if one failed. With --facts it runs nothing and rewrites what no test has to show: pipelines,
checkpoints, and what is not accelerated.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import zoo

from vidsparse.models import method, size, supported

TESTS = Path(__file__).resolve().parent
TABLE = TESTS.parent / "docs" / "models.md"
FILES = ("test_families.py", "test_family_pipelines.py")
PROOFS = {
    "test_a_random_order_changes_nothing": "any token order",
    "test_each_entry_matters": "no entry left out",
    "test_cuts_matter_where_there_are_some": "parts kept apart",
    "test_density_one_and_restore": "density 1 is stock",
    "test_sparse_at_the_density_asked_for": "as sparse as asked",
    "test_what_each_call_reads": "text exact",
    "test_a_pipeline": "whole pipelines",
}
"""Test -> what it proves, in two or three words."""

HEAD = """# Supported models

Written by `python tests/support_table.py` from what the tests have shown on tiny random models of
each family, of diffusers {version}: the number of forms (ways to call the transformer, token grids,
head sizes) in which each holds. Weights of real checkpoints were not at hand. Columns:

- any token order: a random one gives what stock gives;
- no entry left out: without one of them the output differs;
- parts kept apart: an order that mixes what the model treats apart is noticed;
- density 1 is stock: and so is the model after restoring, bit by bit;
- as sparse as asked: and stock if one block is all there is;
- text exact: its rows are those of dense attention;
- whole pipelines: of diffusers, run sparse, interrupted and restored.
"""


def main() -> int:
    import diffusers

    parser = argparse.ArgumentParser(description="Writes docs/models.md.")
    parser.add_argument("--junit", type=Path, help="report of a finished run of the tests")
    parser.add_argument("--facts", action="store_true", help="rewrite what no test has to show")
    asked = parser.parse_args()
    if asked.facts:
        shown, _, _ = TABLE.read_text(encoding="utf-8").partition(PIPELINES)
        TABLE.write_text(shown + "\n".join(facts()) + "\n", encoding="utf-8")
        print(TABLE)
        return 0
    given: Path | None = asked.junit
    outcomes = run() if given is None else read(given)
    lines = ["| family | " + " | ".join(PROOFS.values()) + " |", "|---" * (len(PROOFS) + 1) + "|"]
    failed = 0
    for name, file in zoo.files().items():
        subjects = {str(case) for case in file.CASES} | set(file.PIPELINES)
        cells = []
        for test in PROOFS:
            ends = [passed for subject, passed in outcomes[test] if subject in subjects]
            failed += ends.count(False)
            bad = f", {ends.count(False)} FAIL" if not all(ends) else ""
            cells.append(f"{ends.count(True)}{bad}" if ends else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *facts()]
    TABLE.parent.mkdir(exist_ok=True)
    text = HEAD.format(version=diffusers.__version__) + "\n" + "\n".join(lines) + "\n"
    TABLE.write_text(text, encoding="utf-8")
    print(f"{TABLE}: {failed} failed")
    return 1 if failed else 0


PIPELINES = "## Pipelines"


def facts() -> list[str]:
    """What is supported and what is not, by the code and its cards, line by line."""
    found = supported()
    lines = [PIPELINES, "", "| family | transformer | pipelines |", "|---|---|---|"]
    for name, classes in found["families"].items():
        for entry in classes:
            pipelines = ", ".join(f"`{pipeline}`" for pipeline in entry["pipelines"])
            lines.append(f"| {name} | `{entry['transformer']}` | {pipelines} |")
    lines += ["", "Other pipelines that hold one of these transformers are taken, too.", ""]
    lines += peers()
    lines += checkpoints()
    lines += ["## Not accelerated", "", "| transformer | because |", "|---|---|"]
    lines += [f"| `{name}` | {why} |" for name, why in found["refused"].items()]
    return [
        *lines,
        "",
        'Any other: `accelerate_pipeline(pipe, adapter="generic")`, see `generic_adapter`, or an',
        "adapter of your own, see CONTRIBUTING.",
    ]


def peers() -> list[str]:
    """The section of diffusers' own tests."""
    with (TESTS / "peer" / "results.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    parts = sorted({row["tests"] for row in rows} - {"all"})
    lines = [
        "## Diffusers' own tests",
        "",
        "What `python tests/peer/run.py --table tests/peer/results.csv` has found with the tests",
        "of a clone of diffusers: of those that pass on stock, how many pass when all pipelines",
        "and transformers are accelerated as they are built, at density 1 (dense) or 0.5 (sparse),",
        "and at density 1 by the first call, after all that a test sets (late; of pipelines alone,",
        "as a transformer that a test builds is accelerated by its first call in every mode). The",
        "others cannot hold; `tests/peer/expected.toml` says why, and which families have no tests",
        "there. What has no figure has not been run since the table is kept, or none of the tests",
        "that are run passes on stock.",
        "",
        *("\\*" * n + f' Only `-k "{part}"`.\n' for n, part in enumerate(parts, 1)),
        "| tests | dense | late | sparse | calls of attention there |",
        "|---|---|---|---|---|",
    ]
    expected = tomllib.loads((TESTS / "peer" / "expected.toml").read_text())
    for target in expected["targets"]:
        of_mode = {row["mode"]: row for row in rows if row["target"] == target}
        cells = []
        for mode in ("dense", "late", "sparse"):
            if (row := of_mode.get(mode)) is None:
                cells.append("-")
                continue
            mark = "" if row["tests"] == "all" else "*" * (1 + parts.index(row["tests"]))
            bad = f", {row['ours']} FAIL" if row["ours"] != "0" else ""
            cells.append(f"{row['passed']} of {row['stock_passed']}{mark}{bad}")
        sparse = of_mode.get("sparse")
        calls = f"{sparse['sparse_calls']} sparse, {sparse['dense_calls']} dense" if sparse else "-"
        lines.append(f"| {target} | {' | '.join(cells)} | {calls} |")
    return [*lines, ""]


def checkpoints() -> list[str]:
    """The section of checkpoints."""
    lines = [
        "## Checkpoints",
        "",
        "What `vidsparse generate` does with them if nobody says otherwise, from their publishers:",
        "`configs/models` has the source of each number. None has been run here: the weights were",
        "not at hand. The presets are those that authors of other methods have published for them,",
        "where there are any, and ours elsewhere.",
        "",
        "| checkpoint | what it is | size | fps | steps | guidance | shift | preset |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in supported()["checkpoints"].values():
        settings = entry["settings"]
        ids = "<br>".join(f"`{name}`" for name in entry["ids"]) or "the shipped demo model"
        keys = ("fps", "steps", "guidance", "flow_shift")
        numbers = [f"{settings[key]:g}" if key in settings else "-" for key in keys]
        cells = [ids, entry["about"], size(settings), *numbers, f"`{method(entry['preset'])}`"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


Outcomes = dict[str, list[tuple[str, bool]]]
"""Test -> (case or pipeline, whether it passed), for each form."""


def run() -> Outcomes:
    """Of a run of the tests now."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", f"--junitxml={report}"]
        subprocess.run([*command, *(str(TESTS / file) for file in FILES)], check=False)
        return read(report)


def read(report: Path) -> Outcomes:
    """Of a JUnit report."""
    found: Outcomes = defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        named = re.match(r"(\w+)\[(.*?)(?:-\(\d+, \d+, \d+\)-\d+)?\]$", case.get("name", ""))
        if named and named[1] in PROOFS and not any(child.tag == "skipped" for child in case):
            failed = any(child.tag in ("failure", "error") for child in case)
            found[named[1]].append((named[2], not failed))
    return found


if __name__ == "__main__":
    sys.exit(main())
