"""diffusers' own tests, with everything accelerated, against the same tests on stock diffusers.

    python tests/peer/run.py --diffusers CHECKOUT                     all modes, all targets
    python tests/peer/run.py --diffusers CHECKOUT --modes dense late --targets wan

CHECKOUT is a clone of diffusers, of which only tests/ is used; the diffusers under test is the
installed one. A test that passes on stock and fails accelerated is ours, unless `expected.toml`
says why it cannot hold. Exit status 1 if there is one that is ours, or if the tests of a file never
ran the attention that a mode is about. With `--table FILE` the results become rows of that CSV,
one for each target and mode; of other targets and modes its rows stay. Needs the packages that the
tests import (peft, parameterized, torchvision and more).
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MODES = ("dense", "sparse", "late")
SECONDS = 3600
CALLS = r"vidsparse calls in (\S+): (\d+) sparse, (\d+) dense"
COLUMNS = ("target", "mode", "tests", "stock_passed", "passed", "cannot_hold", "ours")
COLUMNS += ("sparse_calls", "dense_calls", "diffusers")


@dataclass
class Outcome:
    """Of one run: test -> "passed", "failed" or "skipped".

    errors: test that did not pass -> the first words of why. calls: file of tests -> how many calls
    of attention were "sparse" and "dense".
    """

    tests: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    calls: dict[str, dict[str, int]] = field(default_factory=dict)


def main() -> int:
    options = arguments()
    expected = tomllib.loads((HERE / "expected.toml").read_text())
    targets: dict[str, list[str]] = expected["targets"]
    chosen = options.targets or list(targets)
    if unknown := set(chosen) - set(targets):
        sys.exit(f"--targets {', '.join(sorted(unknown))}: there are {', '.join(targets)}")
    files = [file for name in chosen for file in targets[name]]
    if options.stock and options.stock.is_file():
        stock = kept(options.stock, files, options.only)
    else:
        stock = run(options.diffusers, files, "stock", options.only, options.stock)
    print(f"stock: {tally(stock)}", flush=True)
    ours = 0
    for mode in options.modes:
        files_of = {name: run_in(mode, targets[name]) for name in chosen}
        if not (files := [file for name in chosen for file in files_of[name]]):
            print(f"{mode}: nothing to run, a transformer alone is accelerated by its first call")
            continue
        outcome = run(options.diffusers, files, mode, options.only)
        kind = "sparse" if mode == "sparse" else "dense"
        had = sum(found[kind] for found in outcome.calls.values())
        print(f"{mode}: {tally(outcome)}; {had} {kind} calls", flush=True)
        ran = outcome.tests if options.only else stock.tests  # a kept run may have been of more
        before = Outcome(
            {test: how for test, how in stock.tests.items() if is_of(test, files) and test in ran}
        )
        bad = faults(before, outcome, mode, expected["cannot_hold"])
        for test, why in bad:
            ours += why is None
            error = outcome.errors.get(test, "it did not run")
            print(f"  OURS  {test}  {error}" if why is None else f"  known {test}  {why}: {error}")
        called = {name: found for name, found in outcome.calls.items() if any(found.values())}
        without = [name for name, found in called.items() if not found[kind]]
        for where in without if called else ["the run"]:
            ours += 1
            print(f"  OURS  no {kind} call of attention in {where}", flush=True)
        if options.table:
            rows = [
                row(name, of, mode, options.only, before, outcome, bad)
                for name, of in files_of.items()
                if of
            ]
            write(options.table, [r for r in rows if r["stock_passed"] != "0"], list(targets))
    return 1 if ours else 0


def run_in(mode: str, files: list[str]) -> list[str]:
    """Those of these files that are run in a mode: `late` is of pipelines.

    A transformer alone is accelerated by its first call in every mode.
    """
    return [file for file in files if mode != "late" or not file.startswith("tests/models/")]


def faults(
    stock: Outcome, outcome: Outcome, mode: str, known: list[dict[str, str]]
) -> list[tuple[str, str | None]]:
    """Tests that pass on stock and not here, each with the reason why it cannot hold, or None."""
    passed = [test for test, how in stock.tests.items() if how == "passed"]
    bad = [test for test in passed if outcome.tests.get(test) != "passed"]
    return [(test, reason(known, mode, test, outcome.errors.get(test))) for test in bad]


def row(
    target: str,
    files: list[str],
    mode: str,
    only: str | None,
    stock: Outcome,
    outcome: Outcome,
    bad: list[tuple[str, str | None]],
) -> dict[str, str]:
    """What the table says of a target."""
    passed = [test for test, how in stock.tests.items() if how == "passed" and is_of(test, files)]
    here = [why for test, why in bad if is_of(test, files)]
    calls = [outcome.calls[file] for file in files if file in outcome.calls]
    values = (
        *(target, mode, only or "all", len(passed), len(passed) - len(here)),
        *(sum(why is not None for why in here), sum(why is None for why in here)),
        *(sum(found["sparse"] for found in calls), sum(found["dense"] for found in calls)),
        version("diffusers"),
    )
    return dict(zip(COLUMNS, map(str, values), strict=True))


def write(table: Path, rows: list[dict[str, str]], order: list[str]) -> None:
    """Put rows into the table, in the order of targets and modes."""
    found = {}
    if table.is_file():
        with table.open(newline="") as lines:
            found = {(old["target"], old["mode"]): old for old in csv.DictReader(lines)}
    found |= {(new["target"], new["mode"]): new for new in rows}
    with table.open("w", newline="") as lines:
        into = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
        into.writeheader()
        into.writerows(
            found[name, mode] for name in order for mode in MODES if (name, mode) in found
        )


def is_of(test: str, files: list[str]) -> bool:
    modules = [file.removesuffix(".py").replace("/", ".") for file in files]
    return test.startswith(tuple(f"{module}{end}" for module in modules for end in (".", "::")))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--diffusers", type=Path, required=True, help="clone of diffusers")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--targets", nargs="+", help="names of expected.toml; default: all")
    parser.add_argument("--only", help="as pytest -k")
    parser.add_argument("--stock", type=Path, help="file that keeps how the stock tests ended")
    parser.add_argument("--table", type=Path, help="CSV that keeps the results")
    options = parser.parse_args()
    if not (options.diffusers / "tests" / "pipelines").is_dir():
        parser.error(
            f"--diffusers {options.diffusers}: no clone of diffusers, it has no tests/pipelines"
        )
    return options


def kept(report: Path, files: list[str], only: str | None) -> Outcome:
    """Of an earlier stock run, the tests in these files; it must have had some of each.

    With --only, some of one of them.
    """
    ended = read(report, "remove it to run them again").tests
    tests: dict[str, str] = {}
    missing = []
    for file in files:
        found = {test: how for test, how in ended.items() if is_of(test, [file])}
        tests |= found
        missing += [] if found else [file]
    if missing and not (only and tests):
        sys.exit(f"--stock {report} has no test of {', '.join(missing)}: remove it to run them")
    return Outcome(tests)


def run(
    checkout: Path, files: list[str], mode: str, only: str | None, keep: Path | None = None
) -> Outcome:
    """Run the tests in a process of their own. keep: file for a copy of the report."""
    paths = [str(ROOT), str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ,
        "VIDSPARSE_PEER": mode,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "accelerate_everything", "-q", "--tb=line"]
        command += [
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *(["-k", only] if only else []),
        ]
        done = subprocess.run(
            [*command, *files],
            cwd=checkout,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
        if not report.is_file():
            sys.exit(f"pytest ended with {done.returncode} and no report:\n{done.stdout[-4000:]}")
        outcome = read(report, "install what it imports")
        if keep is not None:
            shutil.copyfile(report, keep)
    for name, sparse, dense in re.findall(CALLS, done.stdout):
        outcome.calls[name] = {"sparse": int(sparse), "dense": int(dense)}
    return outcome


def read(report: Path, cure: str) -> Outcome:
    """Of a JUnit report, but for the calls.

    Ends the program if it is none, or tells of a file whose tests could not be collected: of those
    nothing is known. cure: what to do then.
    """
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except ElementTree.ParseError as error:
        sys.exit(f"{report} is no JUnit report ({error}): {cure}")
    outcome = Outcome()
    for case in cases:
        for error in case.iter("error"):
            if error.get("message") == "collection failure":
                *_, why = (error.text or "").strip().splitlines() or [""]
                sys.exit(f"{report}: {case.get('name')} was not collected ({why}): {cure}")
        test = f"{case.get('classname')}::{case.get('name')}"
        ends = [child for child in case if child.tag in ("failure", "error", "skipped")]
        kinds = {child.tag for child in ends}
        outcome.tests[test] = (
            "passed" if not kinds else "skipped" if kinds == {"skipped"} else "failed"
        )
        if ends:
            outcome.errors[test] = (ends[0].get("message") or "").split("\n")[0]
    return outcome


def reason(
    known: list[dict[str, str]], mode: str, test: str, error: str | None = None
) -> str | None:
    """Why a test cannot hold in a mode, by expected.toml; None if it does not say.

    An entry is of a test, of the `modes` it names, and of the first line of the `error`.
    """
    for entry in known:
        of_mode = mode in entry.get("modes", MODES)
        if of_mode and re.search(entry["test"], test) and re.search(entry["error"], error or ""):
            return entry["why"]
    return None


def tally(outcome: Outcome) -> str:
    counts = Counter(outcome.tests.values())
    return ", ".join(f"{counts[how]} {how}" for how in ("passed", "failed", "skipped"))


if __name__ == "__main__":
    sys.exit(main())
