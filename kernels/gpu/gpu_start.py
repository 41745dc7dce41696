"""How a GPU process starts: on a GPU, or in a dry run on the CPU in Triton's interpreter.

Imports nothing heavy: the interpreter has to be asked for before triton is imported.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from needs import ROOT

from vidsparse import forms

if TYPE_CHECKING:
    from gpu_results import Machine


def ways() -> tuple[str, ...]:
    """Names of what can run exact tiles: forms of the Triton engine, and the other engines."""
    folder = ROOT / "vidsparse" / "kernels" / "gpu" / "exact"
    found = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    return (*map(forms.way, forms.FORMS), *(name for name in found if name != "triton"))


def folder_for(dry: bool, out: Path | None) -> Path:
    """Of the results: `out`, else kernels/results, in a dry run one under /tmp."""
    return out or (Path("/tmp/vidsparse-dry-run") if dry else ROOT / "kernels" / "results")


def machine_for(
    dry: bool,
    folder: Path,
    seconds: float,
    wanted: tuple[str, ...],
    fail: Callable[[str], Any],
) -> Machine:
    """The machine of this process. wanted: names of `ways`.

    fail: told in words what is missing, and does not return.
    """
    deadline = time.monotonic() + seconds
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        fail("unset TRITON_INTERPRET, which is for --dry-run")
    import torch

    if dry:
        sys.path.append(str(ROOT / "tests"))
        import_module("interpreter").install()
        torch.set_num_threads(1)
        gpu = import_module("vidsparse.kernels.gpu.support")  # every stage in Triton, as on a GPU
        gpu.kernels = lambda name, x: (
            import_module(f"vidsparse.kernels.gpu.{name}") if x.dtype in gpu.DTYPES else None
        )
    elif not torch.cuda.is_available():
        fail("no CUDA GPU here; --dry-run runs everything small in Triton's CPU interpreter")
    from gpu_results import Machine

    torch.set_grad_enabled(False)
    device = torch.device("cpu") if dry else torch.device("cuda", 0)
    return Machine(device, folder, deadline, wanted)
