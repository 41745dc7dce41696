"""AnyFlow, both ways in time: text or frames to video in few steps; a relative of Wan.

Each frame has its timestep, which the condition embedding repeats for its tokens. The rotary
embedding gives a table for queries and one for keys. Both branches of guidance are one batch.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_anyflow import (
    AnyFlowAttnProcessor,
    AnyFlowTransformer3DModel,
)

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, Site
from vidsparse.pipelines.processor import SparseProcessor


class AnyFlowSparseProcessor(SparseProcessor, AnyFlowAttnProcessor):
    """`AnyFlowAttnProcessor` with block-sparse attention."""


def self_attention(transformer: Any) -> list[Any]:
    """`attn1` of every block."""
    return [block.attn1 for block in transformer.blocks]


def grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    """The latent video [B, frames, C, height, width] in patches."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    deep, high, wide = transformer.config.patch_size
    return TokenGrid(frames // deep, height // high, width // wide)


ADAPTER = Adapter(
    pipelines=("AnyFlowPipeline",),
    components=("transformer",),
    transformer=AnyFlowTransformer3DModel,
    sparse=(AnyFlowSparseProcessor,),
    self_attention=self_attention,
    grid=grid,
    entries=(
        Site("output", "patch_embedding", (2, 3, 4)),
        Site("output", "rope", 2),
        Site("output", "condition_embedder", 1, items=(0, 1)),
    ),
    exit=Site("input", "proj_out", 1),
    branch_order={"AnyFlowPipeline": ("both",)},
)
