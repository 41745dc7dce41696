"""What both training scripts share: a clock with a budget, atomic checkpoints, a loss curve as a
picture.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
STATE_DIR = REPOSITORY / "build" / "demo-wan"
ASSET_DIR = REPOSITORY / "assets" / "demo-wan"
LONGEST_STEP_S = 60.0


class Budget:
    """Counts training time in seconds against a budget in minutes; a suspended process loses at
    most a minute.
    """

    def __init__(self, minutes: float, used_s: float = 0.0) -> None:
        if not minutes > 0:
            raise ValueError(f"the time budget must be positive, got {minutes} minutes")
        self.total_s, self.used_s = minutes * 60, used_s
        self._last = time.monotonic()

    def tick(self) -> float:
        """Add the time since the last tick; returns the used fraction of the budget, 0..1."""
        now = time.monotonic()
        self.used_s += min(now - self._last, LONGEST_STEP_S)
        self._last = now
        return min(self.used_s / self.total_s, 1.0)


def warmup_cosine(step: int, fraction: float, warmup_steps: int, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up over steps, cosine from 1 to `floor` over the used
    budget fraction.
    """
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))
    return min(1.0, (step + 1) / warmup_steps) * cosine


def save_atomically(state: Any, path: Path) -> None:
    """torch.save under a temporary name, then rename: an interrupted write never spoils the last
    checkpoint.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def forget_origin(directory: Path) -> None:
    """Remove the path that a model was loaded from, which diffusers keeps in every config.json."""
    for path in directory.rglob("config.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_state(path: Path) -> Any | None:
    """The checkpoint at `path`, on the CPU, or None where there is none."""
    if not path.is_file():
        return None
    return torch.load(path, map_location="cpu", weights_only=True)


def write_loss_curve(history: list[dict[str, float]], path: Path, title: str) -> None:
    """Plot every series of the history (dicts with `step` and values) against the step, and keep
    it as JSON.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(history))
    names = sorted({name for row in history for name in row if name not in ("step", "minutes")})
    figure, axes = plt.subplots(
        1, max(len(names), 1), figsize=(5 * max(len(names), 1), 3.2), squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=False):
        rows = [(row["step"], row[name]) for row in history if name in row]
        axis.plot(*zip(*rows, strict=False), linewidth=1)
        axis.set_xlabel("step")
        axis.set_title(f"{title}: {name}")
        axis.grid(alpha=0.3)
        if name == "loss" and min(value for _, value in rows) > 0:
            axis.set_yscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def record_process() -> None:
    """Append this process's id to build/demo-wan/pids, so that a person can pause the training."""
    STATE_DIR.mkdir(parents=True, exist_ok=True)
    with (STATE_DIR / "pids").open("a") as file:
        file.write(f"{os.getpid()}\n")
