"""Kandinsky 6: text or image to video and sound, in blocks that denoise both together.

Only self-attention of the video is accelerated; the sound, the text, and what video and sound see
of each other stay untouched. A reference image is a further frame, the last one of the grid. What
tells it from the others is added to the tokens after the patch embedding, so they come in where the
first block does.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_kandinsky6 import (
    Kandinsky6AttnProcessor,
    Kandinsky6Transformer3DModel,
)

from vidsparse.pipelines.adapter import Adapter, Site
from vidsparse.pipelines.families.kandinsky5 import grid
from vidsparse.pipelines.processor import SparseProcessor


class Kandinsky6SparseProcessor(SparseProcessor, Kandinsky6AttnProcessor):
    """`Kandinsky6AttnProcessor` with block-sparse self-attention."""


def self_attention(transformer: Any) -> list[Any]:
    """Of the video, in the blocks that it shares with the sound."""
    return [block.video_dec_block.self_attention for block in transformer.visual_transformer_blocks]


ADAPTER = Adapter(
    pipelines=("Kandinsky6TI2VAPipeline",),
    components=("transformer",),
    transformer=Kandinsky6Transformer3DModel,
    sparse=(Kandinsky6SparseProcessor,),
    self_attention=self_attention,
    grid=grid,
    entries=(
        Site("input", "visual_transformer_blocks.0", 1),
        Site("output", "visual_rope_embeddings", (0, 1, 2)),
    ),
    exit=Site("input", "out_layer", (1, 2, 3)),
)
