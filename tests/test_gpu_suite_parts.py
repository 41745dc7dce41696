"""The parts of the GPU suite: what they take, and that a failure in one reaches no other."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_suite import KERNELS, SUITE, outcomes, watched

pytest.importorskip("triton", reason="triton is not installed")

import gpu_bench
import gpu_cases
import gpu_check
import gpu_dense
import gpu_rows
import gpu_speed
import gpu_start
import gpu_ways
import suite
from gpu_check_stages import PLACES
from gpu_compare import LIMITS
from gpu_results import Machine
from gpu_rows import Check, Tried
from gpu_ways import Way

SECOND_CALL = 360.0
"""Seconds of a call that goes on: both fit a quarter of an hour."""

SHARES = 2
"""Of the checks, at least, that run side by side (`--share`)."""


def test_parts_fit_their_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a GPU that runs every engine, checks in shares side by side: what decides in the first
    call, all of it in two."""
    monkeypatch.setattr(Way, "sizes", lambda *_: list(gpu_cases.SIZES))
    monkeypatch.setattr(Way, "refusal", lambda *_, **__: None)
    monkeypatch.setattr(Way, "absence", lambda *_: None)
    monkeypatch.setattr(gpu_speed, "dense_names", lambda device: list(gpu_dense.DENSE))
    machine = Machine(torch.device("cuda"), tmp_path, 1e9, gpu_start.ways())
    taken = {part: sum(unit.seconds for unit in suite.units_of(part, machine))
             / (SHARES if part in ("check", "select") else 1) for part in suite.PARTS}  # fmt: skip
    first = [*suite.PARTS][: [*suite.PARTS].index("forms")]
    assert first == ["first", "table", "check", "select", "presets"]
    assert sum(taken[part] for part in first) <= suite.BUDGET
    assert sum(taken.values()) <= suite.BUDGET + SECOND_CALL
    names = [unit.name for part in suite.PARTS for unit in suite.units_of(part, machine)]
    assert len(names) == len(set(names))


def test_shares_are_all_units_once(monkeypatch: pytest.MonkeyPatch) -> None:
    units = [SimpleNamespace(name=f"unit {n}") for n in range(11)]
    monkeypatch.setattr(suite, "units_of", lambda part, machine: units)
    found = []
    for first in (1, 2, 3):
        options = SimpleNamespace(units=None, share=suite.share(f"{first}/3"))
        found += suite.chosen(options, "check", None)
    assert sorted(unit.name for unit in found) == sorted(unit.name for unit in units)


def test_checks_in_two_processes(tmp_path: Path) -> None:
    """What one process would have done, each unit once; the rest follows in the same call."""
    command = [sys.executable, str(SUITE / "suite.py"), "--dry-run", "--jobs", "2", "--units",
               "block means", "--only", "check", "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    tried = gpu_rows.load(tmp_path / "gpu_units.csv", Tried)
    assert {row.outcome for row in tried} == {"done"} and len({row.run for row in tried}) <= 2
    names = [row.unit for row in tried]
    assert len(names) == len(set(names)) == 2 and all("block means" in name for name in names)
    assert done.stdout.count(": block means") == len(names)


@pytest.mark.parametrize("text", ["0/2", "3/2", "x", "1", "1/", "-1/2"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text!r}: expected K/N"):
        suite.share(text)


def test_every_dtype_and_grid_is_a_place() -> None:
    assert {dtype for _, dtype, _ in PLACES} == set(LIMITS)
    assert {depth for _, _, depth in PLACES} == {64, 96, 128}


def test_a_row_is_on_disk_at_once(tmp_path: Path) -> None:
    """What a unit found before it hangs stays, however the process ends."""
    seen = watched(
        tmp_path,
        """
import time
def rows():
    yield replace(blank, error=0.25, verdict="right")
    time.sleep(600)
blank = Check(**vars(FACTS), check="early", shape="", dtype="bfloat16", impl="x", limit=1.0)
units = [Unit("long", replace(blank, check="late"), rows, "gpu_checks", limit=2.0)]""",
    )
    assert outcomes(seen) == {"long": "hung"}
    found = {r.check: r.verdict for r in gpu_rows.load(tmp_path / "gpu_checks.csv", Check)}
    assert found == {"early": "right", "late": "failed"}


def test_an_engine_that_is_not_here_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its reason; one that cannot even be asked is a failure of its own, of no other."""
    machine = Machine(torch.device("cpu"), tmp_path, 1e9, ("triton-pointer", "absent", "broken"))

    def asked(self: Way, *given: Any, **more: Any) -> str | None:
        if self.name == "broken":
            raise AttributeError("no such thing")
        return "it is not installed" if self.name == "absent" else None

    monkeypatch.setattr(Way, "refusal", asked)
    units = list(gpu_check.first(machine))
    assert [unit.process for unit in units] == [*["triton-pointer"] * 3, "absent", "broken"]
    (row,) = units[3].act()
    assert isinstance(row, Check) and (row.verdict, gpu_rows.fault(row)) == ("absent", "")
    assert row.message == "it is not installed"
    with pytest.raises(AttributeError, match="no such thing"):
        list(units[4].act())
    assert [one.name for one in gpu_ways.here(machine)] == ["triton-pointer"]


def test_a_call_that_waits_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time stays; while torch forbids to wait, and no longer, the call is made."""
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    machine = Machine(torch.device("meta"), tmp_path, 1e9, ())
    bench = gpu_bench.Bench(machine, gpu_cases.TINY, (torch.zeros(1).bfloat16(),) * 3)
    monkeypatch.setattr(gpu_bench.Bench, "beside_dense", lambda self, acts: {"whole": [2.0, 3.0]})

    def call() -> None:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    how = 0.1, "triton-tma", "whole", 1.0, 1e-3, (128, 64)
    right, wrong = gpu_speed.timed(bench, call, *how)
    assert modes == [0, "error", 0]
    assert gpu_rows.fault(right) == "" and right.ms_p50 == wrong.ms_p50 == 2.5
    assert gpu_rows.fault(wrong).startswith("waits for the device: RuntimeError: called a sync")
    (right,) = gpu_speed.timed(bench, lambda: None, *how)
    assert gpu_rows.fault(right) == ""


INJECTED = """
import os, signal, sys, time
sys.path[:0] = {paths!r}
import suite
from dataclasses import replace
suite.__file__ = __file__
listed = suite.units_of
def crash():
    os.kill(os.getpid(), signal.SIGSEGV)
def fails():
    raise RuntimeError("CUDA error: an illegal instruction was encountered")
ACTS = {{"raises": fails, "crashes": crash, "hangs": lambda: time.sleep(600)}}
def units_of(part, machine):
    few = listed(part, machine)[: {few}]
    def bad(name):
        return replace(few[0], name=f"{{part}} {{name}}", act=ACTS[name], limit=1.5, process="",
                       family=f"{{part}} {{name}}")
    kinds = ("raises", *({kinds} or ("crashes", "hangs")[list(suite.PARTS).index(part) % 2 :][:1]))
    return [*map(bad, kinds), *few]
suite.units_of = units_of
sys.exit(suite.main())
"""


@pytest.mark.slow
def test_failures_in_each_part(tmp_path: Path) -> None:
    """Every part does what it has left; a dry run of all of it, in under three minutes of a CPU."""
    script = tmp_path / "injected.py"
    paths = [str(KERNELS), str(SUITE)]
    script.write_text(INJECTED.format(paths=paths, few=3, kinds=()))
    command = [sys.executable, str(script), "--dry-run", "--out", str(tmp_path)]
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    after = os.times()
    spent = after.children_user + after.children_system
    assert spent - before.children_user - before.children_system < 180
    assert done.returncode == 1, done.stderr
    tried = {row.unit: row.outcome for row in gpu_rows.load(tmp_path / "gpu_units.csv", Tried)}
    for n, part in enumerate(suite.PARTS):
        assert tried.pop(f"{part} raises") == "failed"
        kind, outcome = ("hangs", "hung") if n % 2 else ("crashes", "died")
        assert tried.pop(f"{part} {kind}") == outcome
    assert len(tried) == 3 * len(suite.PARTS) - 2  # models and forms are two each
    assert {*tried.values()} == {"done"}
    assert done.stdout.splitlines()[-1].startswith("levels_forward.py: TILINGS ")


def test_ended_from_outside(tmp_path: Path) -> None:
    """SIGTERM: what is known is said, and the process at work ends too."""
    script = tmp_path / "injected.py"
    paths = [str(KERNELS), str(SUITE)]
    script.write_text(INJECTED.format(paths=paths, few=1, kinds=("hangs",)).replace("1.5", "500"))
    command = [sys.executable, str(script), "--dry-run", "--out", str(tmp_path), "--only", "first"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "first raises" in line:
            break
    process.send_signal(signal.SIGTERM)
    said = process.stdout.read()
    assert process.wait(timeout=60) == 1
    assert "Trouble (1):\n- ended from outside: SystemExit: SIGTERM" in said
    assert "checks: 0 right, wrong or failed 1: engine runs here" in said
