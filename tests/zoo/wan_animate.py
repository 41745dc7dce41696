"""Wan-Animate: tokens with a pose, and a face adapter that takes frames apart."""

from typing import Any

import diffusers
import tiny

import zoo
from zoo import wan

FACE = 16
"""Side of a picture of the face."""


def model(heads: int = 2, head_dim: int = 16) -> Any:
    return tiny.transformer(
        heads=heads,
        head_dim=head_dim,
        kind=diffusers.WanAnimateTransformer3DModel,
        in_channels=36,
        image_dim=8,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=FACE,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        **wan.arguments(model, grid, batch),
        "hidden_states": zoo.noise(batch, 36, frames, 2 * height, 2 * width),
        "pose_hidden_states": zoo.noise(batch, 16, frames - 1, 2 * height, 2 * width, seed=4),
        "face_pixel_values": zoo.noise(batch, 3, 4 * frames - 7, FACE, FACE, seed=5),
    }


def pipeline() -> Any:
    """Two segments, the second of which goes on from the first."""
    pipe = diffusers.WanAnimatePipeline(
        transformer=zoo.lively(model()), **tiny.vision(), **tiny.parts()
    )
    call = tiny.arguments(
        image=tiny.still(64, 96),
        pose_video=[tiny.still(64, 96)] * 9,
        face_video=[tiny.still(FACE, FACE)] * 9,
        segment_frame_length=5,
    )
    del call["num_frames"]
    return pipe, call


CASES = [
    # Faces and poses are those of all frames but the first.
    zoo.Case("wan_animate", model, arguments, cuts=True, takes=lambda grid: grid[0] > 1)
]
PIPELINES: zoo.Pipelines = {"wan_animate": pipeline}
