"""Positions of an image or a video, where diffusers' own tests have none in their dummy inputs.

Random positions, or rows that stand nowhere, do for their tests; vidsparse reads the grid of a
picture from them. They are put in before the stock tests run, too.
"""

import functools
import sys
from math import isqrt
from typing import Any

import torch
from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

SIDE = 4
"""The video of MiniMax-H3 has so many frames, rows and columns of tokens."""


def straighten(case: Any) -> None:
    """Change the dummy inputs of a class of tests."""
    flux = case.__module__.endswith("test_models_transformer_flux")
    if flux and hasattr(case, "get_dummy_inputs"):
        case.get_dummy_inputs = of_an_image(case.get_dummy_inputs)
    if hasattr(case, "get_packed_layout"):
        pack(case)


def of_an_image(inputs: Any) -> Any:
    """Inputs of FLUX.1 with the img_ids [rows, 3] of a square image."""

    @functools.wraps(inputs)
    def changed(*args: Any, **kwargs: Any) -> Any:
        found = inputs(*args, **kwargs)
        ids = found["img_ids"]
        axis = torch.arange(isqrt(len(ids)))
        return {**found, "img_ids": torch.cartesian_prod(axis[:1], axis, axis).to(ids)}

    return changed


def pack(case: Any) -> None:
    """Rows of MiniMax-H3 as its pipeline packs them, of a video of `SIDE` cubed tokens."""
    module, inputs, layout = (
        sys.modules[case.__module__],
        case.get_dummy_inputs,
        case.get_packed_layout,
    )
    module.NUM_VIDEO_TOKENS = SIDE**3  # which the expected shapes are made of
    words, sound = torch.ones(module.NUM_TEXT_TOKENS).long(), module.NUM_AUDIO_TOKENS // 2
    positions, *_ = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        words, SIDE, 2 * SIDE, 2 * SIDE, sound, (1, 2, 2), 2, 2, 0
    )

    def get_packed_layout(self: Any, num_video_tokens: int) -> dict[str, Any]:
        return {**layout(self, num_video_tokens), "position_ids": positions.float()}

    def get_dummy_inputs(self: Any, batch_size: int = 2) -> dict[str, Any]:
        return inputs(self, SIDE**3, batch_size)

    case.get_packed_layout, case.get_dummy_inputs = get_packed_layout, get_dummy_inputs
