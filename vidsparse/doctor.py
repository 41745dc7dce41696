"""What this machine can run: versions, CPU, GPU, attention backends, and what is missing."""

from __future__ import annotations

import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vidsparse.config import SparseConfig
from vidsparse.decision import REASONS, decide
from vidsparse.kernels import cpu
from vidsparse.plan import TokenGrid
from vidsparse.shipped import demo_model

PACKAGES = (
    "vidsparse",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "triton",
    "omegaconf",
    "imageio-ffmpeg",
    "opencv-python-headless",
    "safetensors",
    "typer",
)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
TYPICAL = TokenGrid(21, 30, 52)  # Wan, 81 frames of 832x480


def examine() -> dict[str, Any]:
    """All facts, ready for JSON. "missing": list of {what, costs, cure}."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "gpu": _gpu(),
        "dense_backends": {"device": device.type, **_backends(device)},
        "sparse_engine": {"cpu": cpu.engine_info(), **_gpu_engine()},
        "ffmpeg": _ffmpeg(),
        "demo_model": _demo_model(),
    }
    facts["missing"] = _missing(facts)
    return facts


def report(facts: dict[str, Any]) -> str:
    """The facts for a person, a line each."""
    processor, engine = facts["cpu"], facts["sparse_engine"]["cpu"]
    gpu = facts["gpu"] or {"name": "none"}
    usable = [name for name, works in facts["dense_backends"].items() if works is True]
    gpu_engine = facts["sparse_engine"].get("cuda")
    lines = {
        "python": facts["python"],
        "packages": ", ".join(f"{name} {v or 'missing'}" for name, v in facts["packages"].items()),
        "CPU": f"{processor['name']}, {processor['cores']} cores, {processor['threads']} threads",
        "CPU has": ", ".join(processor["flags"]) or "no AVX",
        "GPU": ", ".join(str(value) for value in gpu.values()),
        "dense backends": f"{', '.join(usable)} on {facts['dense_backends']['device']}",
        "sparse on CPU": f"fp32 through {engine['fp32']} ({engine['onednn_gain']}x, "
        f"error {engine['onednn_error']:.1e}), bf16 values in {engine['bf16_values']} "
        f"({engine['bf16_gain']}x)",
        "sparse on GPU": gpu_engine or "no GPU",
        "ffmpeg": facts["ffmpeg"] or "missing",
        "demo model": facts["demo_model"] or "missing",
    }
    text = [f"{name:15} {value}" for name, value in lines.items()]
    if facts["missing"]:
        text += ["", "missing"]
    for item in facts["missing"]:
        text += [f"  {item['what']}", f"    costs: {item['costs']}", f"    cure:  {item['cure']}"]
    return "\n".join(text)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    name, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": name,
        "cores": allowed,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "avx512": "avx512f" in flags,
        "bf16": bool(flags & {"avx512_bf16", "amx_bf16"}),
    }


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "count": torch.cuda.device_count(),
    }


def _backends(device: torch.device) -> dict[str, bool]:
    """Which dense attention backends run a small call here, in the dtype that the device is for."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x = torch.zeros(1, 2, 128, 64, device=device, dtype=dtype)
    found = {}
    for name, backend in BACKENDS.items():
        try:
            with warnings.catch_warnings(), sdpa_kernel([backend]):
                warnings.simplefilter("ignore")  # reasons why it is not usable
                scaled_dot_product_attention(x, x, x)
            found[name] = True
        except RuntimeError:
            found[name] = False
    return found


def _gpu_engine() -> dict[str, str]:
    """Under "cuda", if there is a GPU: what a typical call of the default preset does there."""
    if not torch.cuda.is_available():
        return {}
    decision = decide(SparseConfig.load("balanced"), TYPICAL, device=torch.device("cuda"))
    return {"cuda": f"dense: {REASONS[decision.reason]}" if decision.reason else "sparse"}


def _ffmpeg() -> str | None:
    try:
        import imageio_ffmpeg

        return f"{imageio_ffmpeg.get_ffmpeg_version()}, {imageio_ffmpeg.get_ffmpeg_exe()}"
    except (ImportError, RuntimeError, OSError):
        return None


def _demo_model() -> str | None:
    try:
        return str(demo_model())
    except FileNotFoundError:
        return None


def _missing(facts: dict[str, Any]) -> list[dict[str, str]]:
    """What is not here: what it is, what that costs, the cure."""
    found: list[tuple[bool, str, str, str]] = [
        (
            facts["gpu"] is None and not Path("/proc/driver/nvidia").exists(),
            "a GPU",
            "models of real size take hours a video; the demo model is made for this",
            "a machine with an NVIDIA GPU",
        ),
        (
            facts["gpu"] is None and Path("/proc/driver/nvidia").exists(),
            "a torch that sees the GPU of this machine",
            "everything runs on the CPU",
            "install the CUDA build of torch, see pytorch.org/get-started",
        ),
        (
            facts["sparse_engine"].get("cuda", "sparse") != "sparse",
            "a sparse engine for the GPU",
            "pipelines on the GPU run dense: as fast as before, not faster",
            "a version of vidsparse with GPU kernels, and triton",
        ),
        (
            not facts["cpu"]["avx512"],
            "AVX-512",
            "the sparse engine on the CPU is slower, and so is dense attention",
            "a CPU that has it",
        ),
        (
            facts["ffmpeg"] is None,
            "ffmpeg",
            "no videos can be written",
            "pip install imageio-ffmpeg",
        ),
        (
            facts["demo_model"] is None,
            "the demo model",
            "`vidsparse generate` needs --model",
            "run vidsparse from a clone of its repository, which holds assets/demo-wan",
        ),
    ]
    return [
        {"what": what, "costs": costs, "cure": cure}
        for absent, what, costs, cure in found
        if absent
    ]
