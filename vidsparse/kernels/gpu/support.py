"""What the Triton kernels run on, known without importing triton."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from vidsparse.kernels.executor import Executes

CAPABILITY = (8, 0)
"""Oldest compute capability with the tensor cores that the kernels use."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 128
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
        return "AMD GPUs are not supported: nobody has seen the kernels run on one"
    if capability(device) < CAPABILITY:
        return f"compute capability {capability(device)}, needed is {CAPABILITY} or newer"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; a CPU, in Triton's interpreter, stands for a Hopper GPU."""
    return (9, 0) if device.type == "cpu" else torch.cuda.get_device_capability(device)


@lru_cache(maxsize=16)
def lacks(package: str, least: str, extra: str) -> str | None:
    """Why an optional package cannot be used, with the cure; None if it can. Imports nothing of it.

    least: the oldest release; extra: that of vidsparse which installs it.
    """
    cure = f'pip install "vidsparse[{extra}]"'
    try:
        here = version(package)
    except PackageNotFoundError:
        return f"{package} is not installed; {cure}"
    from packaging.version import Version

    if Version(here) < Version(least):
        return f"{package} {here}: needed is {least} or newer; {cure}"
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
    return import_module(f"vidsparse.kernels.gpu.{name}")
