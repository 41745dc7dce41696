"""Wan 2.1 and 2.2: also with a timestep for each token. Whole Wan pipelines stand in `tiny.py`."""

from functools import partial
from typing import Any

import diffusers
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


def lucy() -> Any:
    """The video to edit is given in further channels, with a timestep for each token."""
    pipe = diffusers.LucyEditPipeline(
        transformer=tiny.transformer(in_channels=96, out_channels=48),
        expand_timesteps=True,
        **tiny.parts(tiny.unipc(), wide=True),
    )
    return pipe, tiny.arguments(128, 192, video=[tiny.still(128, 192)] * 9)


VIDEO = ("output of patch_embedding", "output of rope")
CASES = [
    zoo.Case("wan", model, arguments, controls=VIDEO),
    zoo.Case("wan token times", model, token_times),
]
PIPELINES = {**{name: partial(tiny.build, name) for name in tiny.WAN}, "lucy_edit": lucy}
