"""The GPU suite measures what it can whatever breaks: each kind of failure, injected on a CPU."""

import csv
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_suite import FACTS, begun, outcomes, watched

pytest.importorskip("triton", reason="triton is not installed")

import gpu_drive
import gpu_rows
from gpu_report import failed, report
from gpu_results import Machine
from gpu_rows import Check, Result, Tried
from gpu_units import RESTART, Hand, Unit, work
from gpu_watch import Watched


def test_what_fails_hides_nothing(tmp_path: Path) -> None:
    """Every kind of end of a unit is a row with its reason, and the units behind it are done."""
    seen = watched(
        tmp_path,
        """
units = [
    unit("plain", raises(CompilationError, "at 7:4: no such layout")),
    unit("resources", raises(OutOfResources, "shared memory, required 300000")),
    unit("driver", raises(AttributeError, "'NoneType' has no attribute 'launch'")),
    unit("leaves", raises(SystemExit, "bye")),
    unit("illegal", illegal),
    unit("memory", raises(MemoryError, "79 GiB")),
    unit("crash", crash),
    unit("exit", leave),
    unit("hang", hang, limit=1.0),
    unit("last", fine),
]""",
    )
    assert outcomes(seen) == {
        **dict.fromkeys(("plain", "resources", "driver", "leaves", "illegal", "memory"), "failed"),
        **dict.fromkeys(("crash", "exit"), "died"),
        "hang": "hung",
        "last": "done",
    }
    assert begun(tmp_path) == [*outcomes(seen)]
    rows = {row.check: row for row in gpu_rows.load(tmp_path / "gpu_checks.csv", Check)}
    assert {name: row.verdict for name, row in rows.items()} == {
        name: "right" if name == "last" else "failed" for name in outcomes(seen)
    }
    for name, text in {
        "plain": "CompilationError: at 7:4: no such layout",
        "illegal": "illegal memory access",
        "crash": "SIGSEGV",
        "exit": "exit status 3",
        "hang": "no end in 1 s",
    }.items():
        assert text in rows[name].message
    assert all(row.gpu == "a GPU" and row.commit == "c0ffee" for row in rows.values())
    assert failed(seen, {})
    text = "\n".join(report(tmp_path, seen, {}))
    assert "died: crash" in text and "a GPU, torch 2.11, CUDA 13.0, triton 3.6" in text


def test_goes_on_where_it_was(tmp_path: Path) -> None:
    """A second run does what is left, then what failed; other sources are another matter."""
    units = """units = [unit("bad", raises(ValueError, "no")), unit("good", fine),
                        unit("new", fine)][:{}]"""
    watched(tmp_path, units.format(2))
    seen = watched(tmp_path, units.format(3))
    assert outcomes(seen) == {"new": "done", "bad": "failed"}
    assert begun(tmp_path) == ["bad", "good", "new", "bad"]
    seen = watched(tmp_path, units.format(3).replace("units = ", 'FACTS.source = "0"; units = '))
    assert [*outcomes(seen)] == ["bad", "good", "new"]


def test_a_family_that_hangs_is_left_alone(tmp_path: Path) -> None:
    """It costs its limit once; three crashes end a family too, and the others go on."""
    seen = watched(
        tmp_path,
        """
units = [unit("hang", hang, "odd", limit=0.5), unit("more", fine, "odd"), unit("tma", fine, "tma"),
         *(unit(f"crash{n}", leave, "pointer") for n in range(5)), unit("other", fine, "dense")]""",
    )
    ends = {"hang": "hung", "more": "skipped", "tma": "done", "other": "done"}
    ends |= {f"crash{n}": "died" if n < 3 else "skipped" for n in range(5)}
    assert outcomes(seen) == ends
    assert seen.outcomes["more"][1] == "odd hung: hang"


def test_time(tmp_path: Path) -> None:
    """In the order of the units; none is begun without its time, and it is named."""
    events: list[dict[str, Any]] = []
    hand = Hand(tmp_path, FACTS, "1", events.append, lambda: 4.0)
    blank = Check(**vars(FACTS), check="a", shape="", dtype="bfloat16", impl="odd")
    more: dict[str, Any] = {"blank": blank, "act": lambda: [], "file": "gpu_checks"}
    units = [Unit("first", seconds=1.0, **more), Unit("long", **more),
             Unit("short", seconds=1.0, **more)]  # fmt: skip
    assert work(units, hand) == 0
    assert [e["begin"] for e in events if "begin" in e] == ["first", "short"]
    late = [e["late"] for e in events if "late" in e]
    assert late == ["long"]
    seen = Watched(facts=vars(FACTS), late=late)
    assert not failed(seen, {})
    assert "Not run for lack of time (1):\n- long\n" in "\n".join(report(tmp_path, seen, {}))


def test_a_process_of_its_own(tmp_path: Path) -> None:
    """What one unit does to its process reaches none of another."""
    seen = watched(
        tmp_path,
        """
def mark(): spoiled.append(1)
units = [unit("a", fine, process="x"), unit("b", mark, process="x"), unit("c", fine, process="y"),
         unit("d", mark), unit("e", fine)]""",
    )
    assert outcomes(seen) == {**dict.fromkeys("abcd", "done"), "e": "failed"}
    assert begun(tmp_path) == [*"abcde"] and not seen.trouble


def test_resume(tmp_path: Path) -> None:
    """The CSVs of a call elsewhere count as this folder's own: what is done there is not repeated.

    Newer rows stay.
    """
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    units = """units = [unit("good", fine), unit("bad", raises(ValueError, "no")),
                        unit("new", fine)][:{}]"""
    watched(first, units.format(2))
    gpu_drive.bring(first, second)
    seen = watched(second, units.format(3))
    assert begun(second) == ["new", "bad"]
    assert outcomes(seen) == {"new": "done", "bad": "failed"}
    assert [row.check for row in gpu_rows.load(second / "gpu_checks.csv", Check)] == [
        "good", "new", "bad",
    ]  # fmt: skip
    gpu_drive.bring(second, second)
    gpu_drive.bring(first, second)
    assert len(gpu_rows.load(second / "gpu_units.csv", Tried)) == 3
    with pytest.raises(SystemExit, match=r"there is no gpu_units.csv, expected the --out"):
        gpu_drive.bring(tmp_path, second)


def test_what_runs_at_the_end_of_the_time_is_stopped(tmp_path: Path) -> None:
    start = time.monotonic()
    seen = watched(tmp_path, "units = [unit('runs', hang, seconds=0.0)]", seconds=2.0)
    assert time.monotonic() - start < 60
    assert not seen.outcomes and not seen.trouble


def test_a_process_that_does_not_start(tmp_path: Path) -> None:
    """Two in a row, then no more."""
    seen = watched(tmp_path, "sys.exit(5)")
    assert seen.trouble == ["a process ended with exit status 5 before it began a unit"] * 2
    assert failed(seen, {})


def test_a_process_that_lost_its_gpu_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure the GPU must answer and compute; memory that ran out asks for a new one."""
    machine = Machine(torch.device("cpu"), Path(), 0.0, ())
    assert machine.healthy(ValueError("no such tiling"))
    assert not machine.healthy(torch.OutOfMemoryError("CUDA out of memory"))

    def poisoned(self: Machine) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Machine, "settle", poisoned)
    assert not machine.healthy(ValueError("no such tiling"))


def test_an_error_that_shows_late_is_the_units_own(tmp_path: Path) -> None:
    """Kernels run behind the program: each row waits for the device before it counts as done."""

    def settle() -> None:
        raise RuntimeError("CUDA error: misaligned address")

    events: list[dict[str, Any]] = []
    blank = Check(**vars(FACTS), check="late", shape="", dtype="bfloat16", impl="odd")
    unit = Unit("late", blank, lambda: [replace(blank, verdict="right")], "gpu_checks")
    lost = Hand(tmp_path, FACTS, "1", events.append, lambda: 60.0, settle, lambda error: False)
    assert work([unit], lost) == RESTART
    (row,) = gpu_rows.load(tmp_path / "gpu_checks.csv", Check)
    assert row.verdict == "failed" and "misaligned address" in row.message


def test_rows_of_a_killed_run(tmp_path: Path) -> None:
    """Each row is on disk before the next; half a line and older columns do no harm."""
    path = tmp_path / "gpu_bench.csv"
    row = Result(**vars(FACTS), shape="wan, 14b", tokens=7, heads=2, head_dim=64, dtype="bfloat16",
                 density=0.1, impl="triton-tma", stage="sparse")  # fmt: skip
    gpu_rows.add(path, replace(row, ms_p50=1.5, rel_l2=2e-3))
    gpu_rows.add(path, replace(row, density=0.2, message="PTXASError: no"))
    gpu_rows.add(path, replace(row, ms_p50=1.25))
    with path.open("a") as file:
        file.write("c0ffee,5eed,2026")
    found = gpu_rows.load(path, Result)
    assert [(r.density, r.ms_p50, r.message) for r in found] == [
        (0.2, None, "PTXASError: no"),
        (0.1, 1.25, ""),
    ]
    gpu_rows.tidy(path, Result)
    assert gpu_rows.load(path, Result) == found
    with path.open(newline="") as file:
        old = [{k: v for k, v in line.items() if k != "message"} for line in csv.DictReader(file)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*old[0]])
        writer.writeheader()
        writer.writerows(old)
    gpu_rows.add(path, replace(row, density=0.3, dense_impl="sdpa-cudnn"))
    found = gpu_rows.load(path, Result)
    assert [(r.density, r.dense_impl) for r in found] == [
        (0.2, None), (0.1, None), (0.3, "sdpa-cudnn"),
    ]  # fmt: skip
    path.write_text(path.read_text().replace("0.3", "many"))
    assert "cannot be read" in gpu_rows.tidy(path, Result)
    assert not path.exists() and "many" in path.with_suffix(".unreadable").read_text()


def test_every_row_says_where_it_comes_from() -> None:
    wanted = {"commit", "source", "gpu", "torch", "cuda", "triton"}
    for kind in (Result, Check, Tried):
        names = set(kind.__dataclass_fields__)
        assert wanted < names and "message" in names
        if kind is not Tried:
            assert {"shape", "density"} < names
