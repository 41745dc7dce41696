"""What this machine can run: versions, CPU, GPU, attention backends, and what is missing."""

from __future__ import annotations

import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vidsparse.attention import decision_for
from vidsparse.config import SparseConfig
from vidsparse.decision import decide
from vidsparse.kernels import cpu, cpu_crossover, cpu_machine, cpu_matmul, cpu_store
from vidsparse.plan import TokenGrid
from vidsparse.reasons import REASONS
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
HEADS, HEAD_DIMS, TOKENS = 12, (64, 128), (1024, 2048, 8192)
DTYPES = (torch.float32, torch.bfloat16)


def examine(remeasure: bool = False) -> dict[str, Any]:
    """All facts, ready for JSON. "missing": list of {what, costs, cure}.

    remeasure: what was timed on this CPU before is deleted and timed again.
    """
    if remeasure:
        cpu_store.forget(disk=True)
        cpu_matmul.forget()
        cpu_crossover.forget()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "gpu": _gpu(),
        "dense_backends": {"device": device.type, **_backends(device)},
        "sparse_engine": {
            "cpu": cpu.engine_info(),
            "crossover": _crossover(),
            "figures_in": str(cpu_store.folder()),
            **_gpu_engine(),
        },
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
        "sparse on CPU": _routes(engine),
        "sparse on GPU": gpu_engine or "no GPU",
        "ffmpeg": facts["ffmpeg"] or "missing",
        "demo model": facts["demo_model"] or "missing",
    }
    text = [f"{name:15} {value}" for name, value in lines.items()]
    text += _crossover_lines(facts["sparse_engine"])
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
    flags = cpu_machine.flags()
    return {
        "name": cpu_machine.name(),
        "cores": cpu_machine.cores(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "avx512": "avx512f" in flags,
        "bf16": bool(flags & {"avx512_bf16", "amx_bf16"}),
    }


def _routes(engine: dict[str, Any]) -> str:
    """The routes of matrix products that are taken, with their figures, and why others are not."""
    if engine["fp32"] == "onednn":
        fp32 = (
            f"fp32 through oneDNN, {engine['onednn_gain']}x as fast as torch's own products, "
            f"error {engine['onednn_error']:.1e}"
        )
    else:
        fp32 = f"fp32 by torch's own products (oneDNN rejected: {engine['refusal']})"
    gain = f"{engine['bf16_gain']}x as fast"
    if engine["bf16_values"] == "bfloat16":
        return f"{fp32}; for bf16 weights times values in bfloat16, {gain} as in float32"
    return f"{fp32}; for bf16 weights times values in float32 (bfloat16 rejected: {gain})"


def _crossover() -> list[dict[str, Any]]:
    """For typical calls the density above which `impl: auto` goes dense on this CPU; 0: always."""
    config, found = SparseConfig.load("balanced", ["schedule.name=constant"]), []
    for dtype, head_dim, tokens in product(DTYPES, HEAD_DIMS, TOKENS):
        q = torch.empty(1, tokens, HEADS, head_dim, dtype=dtype)
        decision = decision_for(q, grid=TokenGrid(tokens // 256, 16, 16), config=config)
        name = str(dtype).removeprefix("torch.")
        found.append({"dtype": name, "head_dim": head_dim, "tokens": tokens,
                      "density": round(decision.crossover, 2)})  # fmt: skip
    return found


def _crossover_lines(engine: dict[str, Any]) -> list[str]:
    rows: dict[tuple[str, int], list[str]] = {}
    for cell in engine["crossover"]:
        shown = f"{cell['tokens']:,}: {cell['density'] or 'dense'}"
        rows.setdefault((cell["dtype"], cell["head_dim"]), []).append(shown)
    info = engine["cpu"]
    kept = info["problem"] or f"kept in {engine['figures_in']}"
    lines = [
        f"{'auto on CPU':15} sparse up to this density, by tokens ({HEADS} heads, "
        f"{info['threads']} threads; {kept}; again: vidsparse doctor --remeasure)"
    ]
    for (dtype, head_dim), cells in rows.items():
        lines.append(f"{'':15} {dtype}, head dim {head_dim}: {', '.join(cells)}")
    return lines


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
