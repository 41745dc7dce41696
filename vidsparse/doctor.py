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

from vidsparse import registry
from vidsparse.attention import decision_for
from vidsparse.config import SparseConfig
from vidsparse.grid import TokenGrid
from vidsparse.kernels.cpu import machine
from vidsparse.kernels.executor import Executor
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
HEADS, HEAD_DIMS, TOKENS = 12, (64, 128), (1024, 2048, 8192)
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float32)}


def examine(remeasure: bool = False) -> dict[str, Any]:
    """All facts, ready for JSON. "missing": list of {what, costs, cure}.

    remeasure: what was timed on this CPU before is deleted and timed again.
    """
    if remeasure:
        for executor in registry.executors().values():
            executor.forget()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "gpu": _gpu(),
        "dense_backends": {"device": device.type, **_backends(device)},
        "executors": {
            executor.name: {
                "about": executor.about,
                "missing": _missing_of(executor),
                "remark": _remark_of(executor),
                "figures": executor.figures(),
            }
            for executor in registry.executors().values()
        },
        "exact_engines": _exact_engines(),
        "auto": [cell for kind in dict.fromkeys(("cpu", device.type)) for cell in _auto(kind)],
        "ffmpeg": _ffmpeg(),
        "demo_model": _demo_model(),
    }
    facts["missing"] = _missing(facts)
    return facts


def report(facts: dict[str, Any]) -> str:
    """The facts for a person, a line each."""
    processor = facts["cpu"]
    gpu = facts["gpu"] or {"name": "none"}
    usable = [name for name, works in facts["dense_backends"].items() if works is True]
    lines = {
        "python": facts["python"],
        "packages": ", ".join(f"{name} {v or 'missing'}" for name, v in facts["packages"].items()),
        "CPU": f"{processor['name']}, {processor['cores']} cores, {processor['threads']} threads",
        "CPU has": ", ".join(processor["flags"]) or "no AVX",
        "GPU": ", ".join(str(value) for value in gpu.values()),
        "dense backends": f"{', '.join(usable)} on {facts['dense_backends']['device']}",
        "ffmpeg": facts["ffmpeg"] or "missing",
        "demo model": facts["demo_model"] or "missing",
    }
    text = [f"{name:15} {value}" for name, value in lines.items()]
    text += _lines("engine", facts["executors"])
    text += _lines("exact", facts["exact_engines"])
    for device in dict.fromkeys(cell["device"] for cell in facts["auto"]):
        text += _auto_lines(device, [c for c in facts["auto"] if c["device"] == device], facts)
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
    flags = machine.flags()
    return {
        "name": machine.name(),
        "cores": machine.cores(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "avx512": "avx512f" in flags,
        "bf16": bool(flags & {"avx512_bf16", "amx_bf16"}),
    }


def _missing_of(executor: Executor) -> str | None:
    """Why an executor runs nowhere on this machine, None if it runs somewhere."""
    reasons = [executor.available(device) for device in _devices_of(executor)]
    return None if None in reasons else reasons[0]


def _remark_of(executor: Executor) -> str | None:
    """What is to be known of an executor on the devices of this machine that it runs on."""
    devices = [one for one in _devices_of(executor) if executor.available(one) is None]
    return "; ".join(filter(None, map(executor.remark, devices))) or None


def _devices_of(executor: Executor) -> list[torch.device]:
    return [torch.device(name) for name in executor.preferred or ("cpu",)]


def _exact_engines() -> dict[str, Any]:
    """What runs the listed blocks of plans without levels on a GPU, and why not on this one."""
    found = {name: registry.engine(name) for name in registry.engines()}
    device = torch.device("cuda")
    return {
        name: {"about": one.about, "missing": one.available(device), "remark": None}
        for name, one in found.items()
    }


def _lines(kind: str, found: dict[str, Any]) -> list[str]:
    """What can execute sparse calls, or the exact blocks of such a call: each, and why not here."""
    return [
        f"{f'{kind} {name}':15} {facts['about']}"
        + (f"; not here: {why}" if (why := facts["missing"]) else "")
        + (f"; {said}" if (said := facts["remark"]) else "")
        for name, facts in found.items()
    ]


def _auto(device: str) -> list[dict[str, Any]]:
    """What `impl: auto` does with typical calls on a device: who executes them, and how.

    density: above which it goes dense; 0: always.
    """
    config, found = SparseConfig.load("balanced", ["schedule.name=constant"]), []
    for dtype, head_dim, tokens in product(DTYPES[device], HEAD_DIMS, TOKENS):
        q = torch.empty(1, tokens, HEADS, head_dim, dtype=dtype, device=device)
        decision = decision_for(q, grid=TokenGrid(tokens // 256, 16, 16), config=config)
        choice = decision.choice
        found.append({
            "device": device,
            "dtype": str(dtype).removeprefix("torch."),
            "head_dim": head_dim,
            "tokens": tokens,
            "executor": choice.executor,
            "passed": dict(choice.passed),
            "route": choice.route,
            "density": round(choice.crossover, 2) if choice.executor else 0.0,
            "block_q": decision.block_q,
        })  # fmt: skip
    return found


def _auto_lines(device: str, cells: list[dict[str, Any]], facts: dict[str, Any]) -> list[str]:
    """The table of a device, a line for each dtype and head dim, and each route once."""
    rows: dict[tuple[str, int], list[str]] = {}
    for cell in cells:
        shown = f"{cell['tokens']:,}: {cell['density'] or 'dense'}"
        rows.setdefault((cell["dtype"], cell["head_dim"]), []).append(shown)
    names = dict.fromkeys(cell["executor"] or "dense" for cell in cells)
    kept = [facts["executors"][name]["figures"].get("kept") for name in names if name != "dense"]
    note = f"; {kept[0]}; again: vidsparse doctor --remeasure" if any(kept) else ""
    lines = [
        f"{f'auto on {device}':15} {', '.join(names)}, sparse up to this density, by tokens "
        f"({HEADS} heads, {facts['cpu']['threads']} threads{note})"
    ]
    for (dtype, head_dim), found in rows.items():
        lines.append(f"{'':15} {dtype}, head dim {head_dim}: {', '.join(found)}")
    for route in dict.fromkeys((c["dtype"], c["route"]) for c in cells if c["route"]):
        lines.append(f"{'':15} {route[0]}: {route[1]}")
    for name, why in {item for cell in cells for item in cell["passed"].items()}:
        lines.append(f"{'':15} not {name}: {why}")
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
            facts["gpu"] is not None
            and all(not cell["executor"] for cell in facts["auto"] if cell["device"] == "cuda"),
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
