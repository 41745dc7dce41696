"""The GPU suite measures what it can whatever breaks: each kind of failure, injected on a CPU."""

import csv
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels" / "gpu"))
import gpu_rows
import needs
from gpu_check_select import Rule, key_blocks, rounding, unjustified
from gpu_report import failed, report
from gpu_results import Machine
from gpu_rows import Check, Facts, Result, Tried
from gpu_units import RESTART, Hand, Unit, work
from gpu_watch import Watch, Watched

from vidsparse.plan import SKIP, Scores
from vidsparse.selector import pyramid, topp

KERNELS = Path(needs.__file__).parent
SUITE = KERNELS / "gpu"
FACTS = Facts("c0ffee", "5eed", "2026-01-01", "a GPU", "2.11", "13.0", "3.6")

SCRIPT = """
import argparse, os, signal, sys, time
sys.path[:0] = {kernels!r}
from dataclasses import replace
from pathlib import Path
from gpu_rows import Check, Facts
from gpu_units import Hand, Unit, to_pipe, work
parser = argparse.ArgumentParser()
for name in ("--events", "--left", "--run", "--again"):
    parser.add_argument(name, default="")
options = parser.parse_args()
FACTS = Facts("c0ffee", "5eed", "2026-01-01", "a GPU", "2.11", "13.0", "3.6")
folder = Path({folder!r})
end = time.monotonic() + float(options.left)
spoiled = []
class CompilationError(Exception): pass          # of Triton: a plain Exception
class OutOfResources(Exception): pass
def unit(name, act, family="", **more):
    blank = Check(**vars(FACTS), check=name, shape="tiny", dtype="bfloat16", impl=family, limit=1.0)
    def run():
        (folder / "log").open("a").write(name + "\\n")
        if spoiled:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        act()
        yield replace(blank, error=0.5, verdict="right")
    return Unit(name, blank, run, "gpu_checks", family, **more)
def fine(): pass
def raises(kind, text):
    def act(): raise kind(text)
    return act
def illegal():
    spoiled.append(1)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def hang(): time.sleep(600)
def crash(): os.kill(os.getpid(), signal.SIGSEGV)
def leave(): os._exit(3)
{units}
hand = Hand(folder, FACTS, options.run, to_pipe(int(options.events)),
            lambda: end - time.monotonic(),
            healthy=lambda error: not spoiled and not isinstance(error, MemoryError))
sys.exit(work(units, hand))
"""


def watched(folder: Path, units: str, seconds: float = 600.0) -> Watched:
    """A run of units in a folder; `units` is Python in the frame above."""
    script = folder / "script.py"
    code = SCRIPT.format(kernels=[str(KERNELS), str(SUITE)], folder=str(folder), units=units)
    script.write_text(code)
    run = f"{time.monotonic_ns()}"
    deadline = time.monotonic() + seconds
    return Watch([sys.executable, str(script)], folder, run, deadline).until_done()


def outcomes(seen: Watched) -> dict[str, str]:
    return {unit: outcome for unit, (outcome, _) in seen.outcomes.items()}


def begun(folder: Path) -> list[str]:
    """Units in the order in which they were begun, every time."""
    return (folder / "log").read_text().split()


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
units = [unit("hang", hang, "ws", limit=0.5), unit("more", fine, "ws"), unit("tma", fine, "tma"),
         *(unit(f"crash{n}", leave, "pointer") for n in range(5)), unit("other", fine, "dense")]""",
    )
    ends = {"hang": "hung", "more": "skipped", "tma": "done", "other": "done"}
    ends |= {f"crash{n}": "died" if n < 3 else "skipped" for n in range(5)}
    assert outcomes(seen) == ends
    assert seen.outcomes["more"][1] == "ws hung: hang"


def test_time(tmp_path: Path) -> None:
    """What is worth most first; no unit is begun without its time, and it is named."""
    events: list[dict[str, Any]] = []
    hand = Hand(tmp_path, FACTS, "1", events.append, lambda: 4.0)
    blank = Check(**vars(FACTS), check="a", shape="", dtype="bfloat16", impl="ws")
    more: dict[str, Any] = {"blank": blank, "act": lambda: [], "file": "gpu_checks"}
    units = [Unit("later", rank=7, seconds=1.0, **more), Unit("long", rank=1, **more),
             Unit("first", rank=0, seconds=1.0, **more)]  # fmt: skip
    assert work(units, hand) == 0
    assert [e["begin"] for e in events if "begin" in e] == ["first", "later"]
    late = [e["late"] for e in events if "late" in e]
    assert late == ["long"]
    seen = Watched(facts=vars(FACTS), late=late)
    assert not failed(seen, {})
    assert "Not run for lack of time (1):\n- long\n" in "\n".join(report(tmp_path, seen, {}))


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
    blank = Check(**vars(FACTS), check="late", shape="", dtype="bfloat16", impl="ws")
    unit = Unit("late", blank, lambda: [replace(blank, verdict="right")], "gpu_checks")
    lost = Hand(tmp_path, FACTS, "1", events.append, lambda: 60.0, settle, lambda error: False)
    assert work([unit], lost) == RESTART
    (row,) = gpu_rows.load(tmp_path / "gpu_checks.csv", Check)
    assert row.verdict == "failed" and "misaligned address" in row.message


def test_rows_of_a_killed_run(tmp_path: Path) -> None:
    """Each row is on disk before the next; half a line and older columns do no harm."""
    path = tmp_path / "gpu_bench.csv"
    row = Result(**vars(FACTS), shape="wan, 14b", tokens=7, heads=2, head_dim=64, dtype="bfloat16",
                 density=0.1, impl="triton-ws", stage="sparse")  # fmt: skip
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


def bare(tmp_path: Path, *command: str, without: tuple[str, ...]) -> subprocess.CompletedProcess:
    """A script from another folder, in a Python that has neither vidsparse nor some modules."""
    (tmp_path / "sitecustomize.py").write_text(f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {without!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
sys.meta_path = [f for f in sys.meta_path if "editable" not in type(f).__module__]
""")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=120)  # fmt: skip


@pytest.mark.parametrize("script", ["gpu/suite.py", "gpu/tune.py", "aot/gate.py", "bench/cpu.py"])
def test_all_missing_packages_first(tmp_path: Path, script: str) -> None:
    """In one message with the cure, and nothing else, whatever the script imports first."""
    absent = ("torch", "triton", "omegaconf", "rich", "diffusers")
    done = bare(tmp_path, str(KERNELS / script), without=absent)
    assert done.returncode == 2, done.stderr
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    named = said.splitlines()[0].removeprefix("missing packages: ").split(", ")
    expected = {"torch", "omegaconf"} | ({"triton"} if script != "bench/cpu.py" else set())
    assert expected <= {*named}
    assert "pip install" in said and "'omegaconf>=" in said and "--needs" in said


def test_kernels_need_torch_and_triton_alone(tmp_path: Path) -> None:
    """The checks of the kernels list their units without any other package, from anywhere."""
    code = f"""
import sys
sys.path[:0] = [{str(KERNELS)!r}, {str(SUITE)!r}]
import needs
from gpu_start import FORMS, machine_for
from pathlib import Path
machine = machine_for(True, Path("."), 60.0, FORMS, print)
import gpu_check
names = [unit.name for unit in gpu_check.units(machine)]
assert len(names) == len(set(names)) > 20
print("listed")
"""
    absent = ("omegaconf", "yaml", "rich", "diffusers", "transformers", "accelerate", "typer")
    done = bare(tmp_path, "-c", code, without=absent)
    assert done.stdout == "listed\n", done.stderr


@pytest.mark.slow
def test_a_part_without_its_packages_is_named_and_the_others_run(tmp_path: Path) -> None:
    command = [str(SUITE / "suite.py"), "--dry-run", "--out", str(tmp_path / "out")]
    parts = ["--only", "check", "model", "--units", "block means; "]
    done = bare(tmp_path, *command, *parts, without=("diffusers", "omegaconf", "rich"))
    assert done.returncode == 1, done.stderr
    first, second, *_ = done.stdout.splitlines()
    assert first == "missing packages: omegaconf, diffusers"
    assert second == "  model needs omegaconf, diffusers"
    assert "1/1  done" in done.stdout
    assert "Not run for lack of packages (1):\n- model: omegaconf, diffusers" in done.stdout
    (row,) = gpu_rows.load(tmp_path / "out" / "gpu_checks.csv", Check)
    assert row.verdict == "right" and row.gpu == "interpreter" and row.check == "block means"


def test_needs_names_every_wheel() -> None:
    said = needs.report({"check": needs.KERNELS, "model": needs.MODELS})
    here, download = said.split("pip download")
    assert all(name in here for name in needs.MODELS)
    assert "'omegaconf>=2.4' 'diffusers>=" in download and "--no-index" in download
    assert "torch" not in download
    assert "nothing to bring" in needs.report({"check": needs.KERNELS})


RULES = {"topp": Rule((0,), (0.7,), 1, True), "mass": Rule((0, 1, 4), (0.3, 0.6, 0.95), 2, False)}
BLOCKS = 33


def oracle(name: str, scores: Scores, forced: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
    """The selector in torch with bounds that are off by a share."""
    bounds = tuple(bound * (1 + shift) for bound in RULES[name].bounds)
    module, params = topp, topp.Params(p=bounds[0])
    if name == "mass":
        module, params = (
            pyramid,
            pyramid.Params(mode="mass", mass=bounds, levels=(0, 1, 4), min_blocks=2),
        )
    levels = module.select(scores, forced, 0.2, key_blocks(BLOCKS), params)
    return levels.masked_fill(forced, 0)


def sharp(spread: float) -> tuple[Scores, torch.Tensor]:
    """Rows whose mass is in a few blocks, so that bounds come before the budget does."""
    torch.manual_seed(3)
    value = spread * torch.randn(2, 3, 50, BLOCKS, dtype=torch.float64)
    return Scores(value, "logit"), torch.rand(50, BLOCKS) < 0.03


@pytest.mark.parametrize("name", RULES)
def test_right_selections_are_right(name: str) -> None:
    for spread in (0.5, 2.0, 5.0):
        scores, forced = sharp(spread)
        found = oracle(name, scores, forced)
        assert not unjustified(found, scores, forced, key_blocks(BLOCKS), RULES[name]).any()


def test_either_side_of_a_bound_is_right() -> None:
    """Of ten equal blocks five or six: both follow from a mass within rounding of one half."""
    mass = torch.full((1, 1, 1, BLOCKS), 1e-9 / (BLOCKS - 10), dtype=torch.float64)
    mass[..., :10] = (1 - 1e-9) / 10
    scores, forced = Scores(mass, "mass"), torch.zeros(1, BLOCKS, dtype=torch.bool)

    def wrong(bound: float) -> set[int]:
        """Numbers of blocks that are no right selection."""
        return {
            blocks
            for blocks in range(1, 7)
            if unjustified(
                torch.where(torch.arange(BLOCKS) < blocks, 0, SKIP).to(torch.int8).expand_as(mass),
                scores, forced, key_blocks(BLOCKS), Rule((0,), (bound,), 1, True),
            ).any()
        }  # fmt: skip

    assert wrong(0.5) == {1, 2, 3, 4}
    assert wrong(0.5 + 1e-4) == {1, 2, 3, 4, 5}
    assert wrong(0.5 - 1e-4) == {1, 2, 3, 4, 6}


@pytest.mark.parametrize("name", RULES)
def test_wrong_selections_are_wrong(name: str) -> None:
    """Bounds off by 1e-3, another block, a hole, a level too fine, a forced block left out."""
    cut, rule = key_blocks(BLOCKS), RULES[name]
    scores, forced = sharp(5.0)
    right = oracle(name, scores, forced)
    for shift in (-0.01, 0.01):
        off = oracle(name, scores, forced, shift)
        differs = (off != right).any(-1)
        assert differs.any()
        assert torch.equal(unjustified(off, scores, forced, cut, rule), differs)
    ranked = scores.ranked(forced)

    def changed(rank: int, level: int) -> torch.Tensor:
        """The maps with one place of the ranking at a level, and which of them differ by it."""
        at = ranked[..., rank : rank + 1]
        return right.scatter(-1, at, level)

    for rank, level in ((0, SKIP), (BLOCKS - 1, 0), (0, 2), (BLOCKS - 1, 7)):
        assert unjustified(changed(rank, level), scores, forced, cut, rule).all()
    if forced.any():
        dropped = right.masked_fill(forced, SKIP)
        some = forced.any(-1).expand(right.shape[:-1])
        assert unjustified(dropped, scores, forced, cut, rule)[some].all()
    flat, none = sharp(0.0)[0], torch.zeros(50, BLOCKS, dtype=torch.bool)
    all_exact = torch.zeros(flat.value.shape, dtype=torch.int8)
    assert unjustified(all_exact, flat, none, cut, rule).all()  # far over the budget


def test_rounding_is_as_wide_as_float32_needs() -> None:
    """Sums in float32 of the longest rows stay within it, and it is no wider than 2e-5."""
    torch.manual_seed(0)
    value = 3 * torch.randn(1, 1, 20, 8192)
    scores = Scores(value.double(), "logit")
    cut = key_blocks(8192)
    exact = scores.mass(cut).cumsum(-1)
    b_mass = cut.count.float() * (value - value.amax(-1, keepdim=True)).exp()
    found = torch.stack([b_mass[..., :n].sum(-1) for n in range(64, 8192, 256)], -1)
    share = found.double() / b_mass.sum(-1, keepdim=True).double()
    want = torch.stack([exact[..., n - 1] for n in range(64, 8192, 256)], -1)
    slack = rounding(scores)
    assert bool(((share / want - 1).abs() <= slack).all())
    assert float(slack.max()) < 2e-5
