"""Wan 2.1 and 2.2: also with a timestep for each token. Whole pipelines stand in `tiny.py`."""

from functools import partial
from typing import Any

import tiny
import torch

import zoo


def model(heads: int, head_dim: int) -> Any:
    return tiny.transformer(heads=heads, head_dim=head_dim)


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": zoo.noise(batch, 16, frames, 2 * height, 2 * width),
        "timestep": zoo.times(batch),
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, tiny.TEXT_WIDTH),
    }


def token_times(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    times = torch.linspace(0, 900, frames * height * width).expand(batch, -1)
    return {**arguments(model, grid, batch), "timestep": times}


VIDEO = ("output of patch_embedding", "output of rope")
CASES = [
    zoo.Case("wan", model, arguments, controls=VIDEO),
    zoo.Case("wan token times", model, token_times),
]
PIPELINES = {name: partial(tiny.build, name) for name in tiny.WAN}
