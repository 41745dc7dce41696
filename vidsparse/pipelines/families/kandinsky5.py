"""Kandinsky 5: text or image to video or image; text enters through cross-attention.

The video keeps its three axes up to the first block and from the last one on. The attention of the
text, and from video to text, stays untouched. The model's own sparse attention (NABLA) reorders
tokens by itself and is refused.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_kandinsky import (
    Kandinsky5AttnProcessor,
    Kandinsky5Transformer3DModel,
)

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, Site
from vidsparse.pipelines.processor import SparseProcessor


class Kandinsky5SparseProcessor(SparseProcessor, Kandinsky5AttnProcessor):
    """`Kandinsky5AttnProcessor` with block-sparse self-attention."""


def self_attention(transformer: Any) -> list[Any]:
    """Of the blocks of the video."""
    return [block.self_attention for block in transformer.visual_transformer_blocks]


def grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    """The latent video [B, frames, height, width, C] in patches."""
    if arguments.get("sparse_params") is not None:
        raise ValueError(
            f"sparse_params in a call of {type(transformer).__name__}: the model selects blocks by "
            "itself (NABLA), in an order of its own; for vidsparse in its place call "
            'transformer.register_to_config(attention_type="regular"), or restore_pipeline first'
        )
    sizes = arguments["hidden_states"].shape[1:4]
    patch = transformer.patch_size
    return TokenGrid(*(size // p for size, p in zip(sizes, patch, strict=True)))


ADAPTER = Adapter(
    pipelines=(
        "Kandinsky5T2VPipeline",
        "Kandinsky5I2VPipeline",
        "Kandinsky5T2IPipeline",
        "Kandinsky5I2IPipeline",
    ),
    components=("transformer",),
    transformer=Kandinsky5Transformer3DModel,
    sparse=(Kandinsky5SparseProcessor,),
    self_attention=self_attention,
    grid=grid,
    entries=(
        Site("output", "visual_embeddings", (1, 2, 3)),
        Site("output", "visual_rope_embeddings", (1, 2, 3)),
    ),
    exit=Site("input", "out_layer.out_layer", (1, 2, 3)),
)
