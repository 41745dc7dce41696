"""Mochi 1: text to video; the real text of each sample behind its video.

Self-attention runs sample by sample, because texts differ in length. The patch embedding sees
single frames, so tokens are brought into their order at the first block.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import MochiAttnProcessor2_0
from diffusers.models.transformers.transformer_mochi import MochiTransformer3DModel

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, Site
from vidsparse.pipelines.processor import SparseProcessor


class MochiSparseProcessor(SparseProcessor, MochiAttnProcessor2_0):
    """`MochiAttnProcessor2_0` with block-sparse attention."""


def self_attention(transformer: Any) -> list[Any]:
    """`attn1` of every block."""
    return [block.attn1 for block in transformer.transformer_blocks]


def grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    """The latent video [B, C, frames, height, width], each frame in patches."""
    frames, height, width = arguments["hidden_states"].shape[2:]
    side = transformer.config.patch_size
    return TokenGrid(frames, height // side, width // side)


ADAPTER = Adapter(
    pipelines=("MochiPipeline",),
    components=("transformer",),
    transformer=MochiTransformer3DModel,
    sparse=(MochiSparseProcessor,),
    self_attention=self_attention,
    grid=grid,
    entries=(Site("input", "transformer_blocks.0", 1), Site("output", "rope", 0)),
    exit=Site("input", "proj_out", 1),
    text="last",
)
