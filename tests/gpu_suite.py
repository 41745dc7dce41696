"""The GPU suite's folders on the path, and runs of units that fail in every way, on a CPU."""

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels" / "gpu"))
from gpu_rows import Facts
from gpu_watch import Watch, Watched

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
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


def bare(tmp_path: Path, *command: str, without: tuple[str, ...]) -> subprocess.CompletedProcess:
    """A script from another folder, in a Python that has neither vidsparse nor some modules."""
    (tmp_path / "sitecustomize.py").write_text(f"""
import sys
from importlib.machinery import PathFinder
class Rest(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        gone = name.partition(".")[0] in {without!r}
        return None if gone else PathFinder.find_spec(name, path, target)
others = [f for f in sys.meta_path if "editable" not in type(f).__module__]
sys.meta_path = [Rest if f is PathFinder else f for f in others]
""")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
