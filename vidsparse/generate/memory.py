"""Least memory that a generation takes, before anything is loaded, and what the device has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from vidsparse.generate.model import PRECISE, Model
from vidsparse.generate.model_files import InputError
from vidsparse.generate.sizes import config

GB = 1e9
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container says how much memory it may use."""


def check_memory(
    model: Model,
    counts: Mapping[str, int],
    size: tuple[int, int, int],
    tokens: int,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Raise InputError if the weights and the video can not fit into the device's memory.

    counts: numbers in the weights, by component; those of `PRECISE` are fp32. size: frames, height,
    width in pixels. The need is a lower bound: weights, and either the residual, query, key and
    value of each token or the decoded video in fp32. Whatever passes can still be too much.
    """
    number = torch.finfo(dtype).bits // 8
    classes = {name: kind for name, (_, kind) in model.components.items()}
    weights = sum(n * (4 if classes.get(k) in PRECISE else number) for k, n in counts.items())
    told = config(model, model.transformers[0])
    sides = [told.get(key) for key in ("num_attention_heads", "attention_head_dim")]
    channels = math.prod(side for side in sides if isinstance(side, int))
    frames, height, width = size
    activations = max(4 * tokens * channels * number, 3 * frames * height * width * 4)
    limit = capacity(device)
    if weights + activations <= limit:
        return
    figures = (
        f"weights {weights / GB:,.1f} GB and activations {activations / GB:,.1f} GB at least, "
        f"{device} has {limit / GB:,.1f} GB"
    )
    cure = "--dtype bf16, which halves them, or " if number == 4 else ""
    if weights > limit:
        raise model.refuse(f"does not fit: {figures}; take {cure}a smaller model")
    raise InputError(
        f"--height {height} --width {width} --frames {frames}: {tokens:,} tokens do not fit: "
        f"{figures}; take {cure}a smaller size or fewer frames"
    )


def capacity(device: str) -> int:
    """Bytes of memory that a process on the device can have at most, swap included."""
    if device != "cpu":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = int(psutil.virtual_memory().total + psutil.swap_memory().total)
    return min([total, *(n for n in map(_limit, LIMITS) if n)])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out; torch has no class for that on a CPU."""
    kinds = MemoryError | torch.OutOfMemoryError
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


def _limit(file: str) -> int:
    """Bytes that a cgroup file allows; 0 if it sets no limit."""
    try:
        text = Path(file).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return 0
    return int(text) if text.isdigit() else 0
