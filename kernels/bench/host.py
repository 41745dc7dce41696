"""What a sparse call costs the host on a GPU: Python, torch's operators, Triton's launches.

    python kernels/bench/host.py
    python kernels/bench/host.py --profile taylor    and which functions take it

The launchers run as on a Hopper GPU, on tensors of the CPU, and nothing is computed: a kernel that
would start there does not. One thread's milliseconds for one call; a GPU that is busy for longer
hides them. Triton: from the call of a kernel to its launch, what the
driver needs for that not in it. Operators: what torch takes from the call of an operator of ours to
its code and back. Each is the difference to calls that leave it out; ours is the rest.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from statistics import quantiles
from time import thread_time
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "aot"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import needs

needs.demand(needs.GATE)

import torch
import triton
from aot_launches import Unlaunched, recording
from aot_targets import ARCHITECTURES
from rich.console import Console
from rich.table import Table

from vidsparse.attention import attend
from vidsparse.config import SparseConfig
from vidsparse.grid import TokenGrid
from vidsparse.kernels import gpu
from vidsparse.kernels.cpu import machine
from vidsparse.kernels.gpu.executor import EXECUTOR
from vidsparse.kernels.gpu.operator import Operator

GRID = TokenGrid(21, 45, 80)
"""Of Wan 14B at 720p."""

CALLS = {
    "centroid": ("tiles", "compensation.name=centroid"),
    "taylor": ("tiles",),
    "levels": ("pyramid",),
    "int8": ("tiles", "kernel.qk=int8"),
}
FIXED = ("schedule.name=constant", "schedule.density=0.2", "schedule.min_tokens=0")
ROUNDS, CALLS_OF_A_ROUND = 20, 20


def main() -> int:
    options = arguments()
    table = Table("call", "kernels", "ms", "Triton", "operators", "ours", title=title())
    with on_a_gpu() as launched, torch.no_grad():
        for name in [options.profile] if options.profile else CALLS:
            call = call_of(name)
            call()
            launched.clear()
            call()
            count = len(launched)
            whole, bare, ours = milliseconds(call)
            parts = whole, whole - bare, bare - ours, ours
            table.add_row(name, str(count), *(f"{part:.3f}" for part in parts))
            if options.profile:
                profile(call)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=CALLS, help="functions of a call, ours alone")
    return parser.parse_args()


def title() -> str:
    return f"{machine.name()}, torch {torch.__version__}, triton {triton.__version__}"


@contextmanager
def on_a_gpu() -> Iterator[list[None]]:
    """The CPU is a Hopper GPU that launches nothing; what it is asked to launch is counted."""
    launched: list[None] = []
    with (
        recording(ARCHITECTURES["90"]),
        patch.object(Unlaunched, "run", lambda *_: launched.append(None)),
        patch.object(EXECUTOR, "preferred", {"cpu": -1}),
    ):
        yield launched


def call_of(name: str) -> Callable[[], object]:
    """A whole call, tokens in layout order, as in an accelerated pipeline."""
    preset, *changes = CALLS[name]
    config = SparseConfig.load(preset, [*FIXED, *changes])
    q, k, v = (torch.empty(1, GRID.tokens, 2, 128, dtype=torch.bfloat16) for _ in range(3))
    return lambda: attend(q, k, v, grid=GRID, config=config, hoisted=True)


@contextmanager
def direct() -> Iterator[None]:
    """Operators of ours are called without torch's dispatch."""
    with ExitStack() as stack:
        modules = [m for name, m in sys.modules.items() if name.startswith(gpu.__name__ + ".")]
        for module in modules:
            for name, value in vars(module).items():
                if isinstance(value, Operator):
                    stack.enter_context(patch.object(module, name, value.launcher))
        yield


def milliseconds(call: Callable[[], object]) -> list[float]:
    """Of whole calls, without Triton's launches, and without torch's operators either.

    In turn, as other processes come and go; of each the fastest tenth.
    """
    times: list[list[float]] = [[], [], []]
    for turn, way in product(range(ROUNDS), range(3)):
        with ExitStack() as stack:
            if way > 0:
                nothing = patch.object(triton.JITFunction, "run", lambda *_, **__: None)
                stack.enter_context(nothing)
            if way > 1:
                stack.enter_context(direct())
            for _ in range(CALLS_OF_A_ROUND):
                start = thread_time()
                call()
                times[way] += [thread_time() - start] * (turn > 0)
    return [quantiles(found, n=10)[0] * 1e3 for found in times]


def profile(call: Callable[[], object]) -> None:
    nothing = patch.object(triton.JITFunction, "run", lambda *_, **__: None)
    with nothing, direct(), cProfile.Profile() as found:
        for _ in range(ROUNDS * CALLS_OF_A_ROUND):
            call()
    pstats.Stats(found).sort_stats("cumtime").print_stats(60)


if __name__ == "__main__":
    raise SystemExit(main())
