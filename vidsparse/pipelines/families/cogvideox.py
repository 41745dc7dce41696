"""CogVideoX and CogVideoX 1.5: text, image or video to video; text before the video.

Positions are an argument of the forward (rotary tables), or stand in the patch embedding (2B).
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import (
    CogVideoXAttnProcessor2_0,
    FusedCogVideoXAttnProcessor2_0,
)
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, Site, Split
from vidsparse.pipelines.private import ContextParallelInput, ContextParallelOutput
from vidsparse.pipelines.processor import SparseProcessor


class CogVideoXSparseProcessor(SparseProcessor, CogVideoXAttnProcessor2_0):
    """`CogVideoXAttnProcessor2_0` with block-sparse attention."""


class FusedCogVideoXSparseProcessor(SparseProcessor, FusedCogVideoXAttnProcessor2_0):
    """`FusedCogVideoXAttnProcessor2_0`, of fused projections, with block-sparse attention."""


def self_attention(transformer: Any) -> list[Any]:
    """`attn1` of every block."""
    return [block.attn1 for block in transformer.transformer_blocks]


def grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    """The latent video [B, frames, C, height, width] in patches; a last half patch is padded."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    deep, wide = transformer.config.patch_size_t or 1, transformer.config.patch_size
    return TokenGrid(-(-frames // deep), height // wide, width // wide)


PLAN = {
    "": {"image_rotary_emb": [ContextParallelInput(0, expected_dims=2)] * 2},
    "transformer_blocks.0": dict.fromkeys(
        ("hidden_states", "encoder_hidden_states"), ContextParallelInput(1, expected_dims=3)
    ),
    "proj_out": ContextParallelOutput(1, expected_dims=3),
}
"""Stock attention of the family does not exchange anything, so it takes none of diffusers'."""

ADAPTER = Adapter(
    pipelines=(
        "CogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
        "CogVideoXFunControlPipeline",
    ),
    components=("transformer",),
    transformer=CogVideoXTransformer3DModel,
    sparse=(CogVideoXSparseProcessor, FusedCogVideoXSparseProcessor),
    self_attention=self_attention,
    grid=grid,
    entries=(
        Site("output", "patch_embed", 1, joint=True),
        Site("argument", "image_rotary_emb", 0, optional=True),
    ),
    exit=Site("input", "proj_out", 1),
    split=Split(PLAN),
    text="first",
)
