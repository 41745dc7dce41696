"""What the Triton kernels run on, known without importing triton."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from vidsparse import registry
from vidsparse.kernels.executor import Executes

log = logging.getLogger(__name__)

CAPABILITY = (8, 0)
"""Oldest compute capability with the tensor cores that the kernels use."""

GENERATIONS = (8, 9, 10, 12)
"""Major compute capabilities with tilings of their own; another one takes the portable ones."""

AMD = (0, 0)
"""Stands for the compute capability of every AMD GPU, whose numbers mean another thing."""

AMD_GPUS = ("gfx942",)
"""Those for which the kernels are compiled, in portable tilings and the form "pointer"; none has
run."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 128
MOMENT_BYTES = 256 * 2**20
"""Of the block moments, and of the moments of query blocks, that are in memory at a time."""
EXECUTES = Executes(("none", "global", "row"), rest_bias=True, head_orders=True)


@lru_cache(maxsize=16)
def refusal(device: torch.device) -> str | None:
    """Why no Triton kernel runs on a device, None if it does.

    A CPU runs them in Triton's interpreter, if TRITON_INTERPRET=1 was set before the first import.
    """
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        on = os.environ.get("TRITON_INTERPRET") == "1"
        return None if on else "a CPU needs TRITON_INTERPRET=1, which is for tests"
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"no CUDA device {device}"
    if torch.version.hip:
        name = amd_name(device)
        known = " and ".join(AMD_GPUS)
        return None if name in AMD_GPUS else f"AMD {name}: the kernels compile for {known} alone"
    if capability(device) < CAPABILITY:
        return f"compute capability {capability(device)}, needed is {CAPABILITY} or newer"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device, `AMD` for theirs.

    A CPU, in Triton's interpreter, stands for a Hopper GPU.
    """
    if device.type == "cpu":
        return 9, 0
    return AMD if torch.version.hip else torch.cuda.get_device_capability(device)


def named(capability: tuple[int, int]) -> str:
    """In words."""
    return "an AMD GPU" if capability == AMD else f"compute capability {capability}"


def amd_name(device: torch.device) -> str:
    """The architecture of an AMD GPU, such as "gfx942"."""
    return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]


def remark(device: torch.device) -> str | None:
    """What users are to know of a device that runs the kernels, None if there is nothing."""
    have = capability(device)
    if have == AMD:
        return "untested on AMD GPUs: the kernels are compiled for them and have run on none"
    if have[0] in GENERATIONS:
        return None
    return (
        f"compute capability {have[0]}.{have[1]} is unknown to vidsparse: its Triton kernels run "
        "in their portable tilings, which may be slow"
    )


@lru_cache(maxsize=16)
def say_remark(device: torch.device) -> None:
    """Log it, once for a device."""
    if said := remark(device):
        log.warning("%s", said)


@lru_cache(maxsize=16)
def lacks(package: str, least: str, extra: str, module: str) -> str | None:
    """Why an optional package cannot be used, with the cure; None if it can.

    least: the oldest release; extra: that of vidsparse which installs it; module: what is imported
    of it, tried once where it is new enough: a package may be there and what it needs be missing.
    """
    cure = f'pip install "vidsparse[{extra}]"'
    try:
        here = version(package)
    except PackageNotFoundError:
        return f"{package} is not installed; {cure}"
    from packaging.version import Version

    if Version(here) < Version(least):
        return f"{package} {here}: needed is {least} or newer; {cure}"
    try:
        import_module(module)
    except Exception as error:  # of foreign code: whatever it is, the engine cannot run
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return f"{package} {here} cannot be imported ({why}); {cure}"
    return None


def runs(device: torch.device) -> bool:
    """Whether the stages of a call on this device may use Triton kernels."""
    return refusal(device) is None


def reason(device: torch.device, dtype: torch.dtype | None, head_dim: int | None) -> str | None:
    """Code of `vidsparse.reasons.REASONS` why a call cannot run in the Triton engine, or None.

    dtype, head_dim: of q; None: not known yet.
    """
    if not runs(device) or (dtype is not None and dtype not in DTYPES):
        return "no-kernel"
    if head_dim is not None and head_dim > MAX_HEAD_DIM:
        return "unsupported-head-dim"
    return None


def kernels(name: str, x: torch.Tensor) -> Any:
    """The module vidsparse.kernels.<name> if its Triton kernels are to run on the tensor, or None.

    A CPU tensor takes the code in torch, with Triton's interpreter on too.
    """
    known = (*DTYPES, torch.int8)
    if x.device.type == "cpu" or x.dtype not in known or not runs(x.device):
        return None
    return registry.module(f"vidsparse.kernels.gpu.{name}")
