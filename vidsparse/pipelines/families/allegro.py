"""Allegro: text to video; text enters through cross-attention (`attn2`), which stays untouched.

Positions are an argument of the forward: rotary tables of each axis, and where in them each token
stands.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import AllegroAttnProcessor2_0
from diffusers.models.transformers.transformer_allegro import AllegroTransformer3DModel

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, Site
from vidsparse.pipelines.processor import SparseProcessor


class AllegroSparseProcessor(SparseProcessor, AllegroAttnProcessor2_0):
    """`AllegroAttnProcessor2_0` with block-sparse self-attention."""


def self_attention(transformer: Any) -> list[Any]:
    """`attn1` of every block."""
    return [block.attn1 for block in transformer.transformer_blocks]


def grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    """The latent video [B, C, frames, height, width] in patches.

    A mask over it, [B, frames, height, width], is in raster order.
    """
    if arguments.get("attention_mask") is not None:
        raise ValueError(
            f"attention_mask in a call of {type(transformer).__name__}: vidsparse does not bring a "
            "mask of the video into the order of its tokens; leave it out, as AllegroPipeline "
            "does, or restore_pipeline first"
        )
    frames, height, width = arguments["hidden_states"].shape[2:]
    deep, wide = transformer.config.patch_size_t, transformer.config.patch_size
    return TokenGrid(frames // deep, height // wide, width // wide)


ADAPTER = Adapter(
    pipelines=("AllegroPipeline",),
    components=("transformer",),
    transformer=AllegroTransformer3DModel,
    sparse=(AllegroSparseProcessor,),
    self_attention=self_attention,
    grid=grid,
    entries=(
        Site("input", "transformer_blocks.0", 1),
        Site("argument", "image_rotary_emb", -1, items=(1,), optional=True),
    ),
    exit=Site("input", "proj_out", 1),
)
