"""Which CPU this is: its name, its instructions, and all that figures measured on it hold for."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

INFO = Path("/proc/cpuinfo")

RESTRICTING = ("ATEN_", "DNNL_", "ONEDNN_", "MKL_", "OMP_", "KMP_", "GOMP_", "OPENBLAS_")
"""Environment variables that change what torch's products run on begin with one of these."""


def described() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; none on other systems."""
    try:
        first = INFO.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def name() -> str:
    """The processor as its maker names it; family and model where the name alone says little."""
    facts = described()
    known = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts and "model" in facts:
        return f"{known} (family {facts['cpu family']}, model {facts['model']})"
    return known


def flags() -> frozenset[str]:
    """What the processor can do, in the words of /proc/cpuinfo; elsewhere as torch knows it."""
    listed = described().get("flags") or described().get("Features")
    if listed:
        return frozenset(listed.split())
    asked = getattr(torch.cpu, "get_capabilities", None)
    found = asked() if asked is not None else {}
    return frozenset(key.replace("avx512_f", "avx512f") for key, on in found.items() if on is True)


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fingerprint() -> dict[str, Any]:
    """What must be equal for figures to hold: processor, its number, torch, and its settings."""
    build = torch.__config__.show() + " ".join(sorted(flags()))
    return {
        "cpu": name(),
        "cores": cores(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "build": hashlib.sha256(build.encode()).hexdigest()[:16],
        "environment": {
            key: value for key, value in sorted(os.environ.items()) if key.startswith(RESTRICTING)
        },
    }
