"""Scripts about offsets past 2^31 elements, each in a process of its own.

In address space of which only the pages in use are committed.
"""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import vidsparse

NO_RESERVE = 0x4000
"""MAP_NORESERVE of Linux."""

FRAME = """
import sys
sys.path[:0] = [{tests!r}, {package!r}]
import resource
import interpreter
import torch
interpreter.install()
from far import close, virtual
from vidsparse.kernels.gpu import oracles
from vidsparse.blocks import Blocks
torch.manual_seed(0)
{body}
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 * 2**20
print("right")
"""


def virtual(elements: int, dtype: torch.dtype) -> Tensor:
    """Memory that costs what is written of it."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags), dtype=dtype)


def close(found: Tensor, wanted: Tensor) -> bool:
    """Relative L2."""
    return bool((found.double() - wanted).norm() < 1e-3 * wanted.norm())


def assert_passes(body: str) -> None:
    """body: lines of Python with assertions, in the interpreter, after the imports of `FRAME`."""
    places = str(Path(__file__).parent), str(Path(vidsparse.__file__).parents[1])
    code = FRAME.format(tests=places[0], package=places[1], body=body)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "right", done.stderr
