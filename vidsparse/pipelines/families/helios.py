"""Helios: a long video, piece by piece, behind what came before it, the older the coarser.

The rotary embedding is called for the piece first, then for each part of its history.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers.models.transformers.transformer_helios import (
    HeliosAttnProcessor,
    HeliosTransformer3DModel,
)

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, Site, Split
from vidsparse.pipelines.families import wan
from vidsparse.pipelines.processor import SparseProcessor

HISTORY = {"short": 1, "mid": 2, "long": 4}
"""Part -> how much coarser it is than the piece, along each axis."""


class HeliosSparseProcessor(SparseProcessor, HeliosAttnProcessor):
    """`HeliosAttnProcessor` with block-sparse self-attention."""


def self_attention(transformer: Any) -> list[Any]:
    """`attn1` of every block."""
    return [block.attn1 for block in transformer.blocks]


def grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    """The piece in patches, behind the rows of its history, whose last half patches are padded."""
    before = 0
    for name, coarser in HISTORY.items():
        latents = arguments.get(f"latents_history_{name}")
        if latents is not None and arguments.get(f"indices_latents_history_{name}") is not None:
            frames, height, width = (
                -(-size // (coarser * patch))
                for size, patch in zip(
                    latents.shape[2:], transformer.config.patch_size, strict=True
                )
            )
            before += frames * height * width
    return replace(wan.grid(transformer, arguments), before=before)


def not_split(transformer: Any, arguments: Arguments) -> str:
    """Keys of the history are amplified by their place among those of one process."""
    amplified = transformer.config.is_amplify_history
    return "the amplified history" if amplified else ""


ADAPTER = Adapter(
    pipelines=("HeliosPipeline", "HeliosPyramidPipeline", "HeliosModularPipeline"),
    components=("transformer",),
    transformer=HeliosTransformer3DModel,
    sparse=(HeliosSparseProcessor,),
    self_attention=self_attention,
    grid=grid,
    entries=(
        Site("output", "patch_embedding", (2, 3, 4)),
        Site("output", "rope", (2, 3, 4), once=True),
    ),
    exit=Site("input", "proj_out", 1),
    split=Split(lacks=not_split),
)
