"""ConsisID: an image of a face to video, made from CogVideoX; text before the video.

Faces enter through cross-attention between the blocks (`perceiver_cross_attention`), which has no
processor and stays untouched.
"""

from __future__ import annotations

from dataclasses import replace

from diffusers.models.transformers.consisid_transformer_3d import ConsisIDTransformer3DModel

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Arguments
from vidsparse.pipelines.families import cogvideox


def grid(transformer: ConsisIDTransformer3DModel, arguments: Arguments) -> TokenGrid:
    """The latent video [B, frames, C, height, width], each frame in patches."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    side = transformer.config.patch_size
    return TokenGrid(frames, height // side, width // side)


ADAPTER = replace(
    cogvideox.ADAPTER,
    pipelines=("ConsisIDPipeline",),
    transformer=ConsisIDTransformer3DModel,
    grid=grid,
)
