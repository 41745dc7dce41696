"""Cosmos 1, 2 and 2.5: text, image or video to world; text enters through cross-attention.

Positions are rotary tables and, in Cosmos 1, a learned embedding that every block adds. A timestep
for each frame is spread over its tokens inside the forward, so no token may leave its frame then.
Hidden states of a control network have a row for each token.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_cosmos import (
    CosmosAttnProcessor2_0,
    CosmosTransformer3DModel,
)

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, Site
from vidsparse.pipelines.families.ltx import self_attention
from vidsparse.pipelines.families.wan import grid
from vidsparse.pipelines.processor import SparseProcessor
from vidsparse.plan import Branch


class CosmosSparseProcessor(SparseProcessor, CosmosAttnProcessor2_0):
    """`CosmosAttnProcessor2_0` with block-sparse self-attention."""


def cuts(transformer: Any, arguments: Arguments, grid: TokenGrid) -> tuple[int, ...]:
    """After every frame, if each has a timestep of its own."""
    return tuple(range(1, grid.frames)) if arguments["timestep"].ndim == 5 else ()


GUIDED: tuple[Branch, ...] = ("cond", "uncond")

ADAPTER = Adapter(
    pipelines=(
        "CosmosTextToWorldPipeline",
        "CosmosVideoToWorldPipeline",
        "Cosmos2TextToImagePipeline",
        "Cosmos2VideoToWorldPipeline",
        "Cosmos2_5_PredictBasePipeline",
        "Cosmos2_5_TransferPipeline",
    ),
    components=("transformer",),
    transformer=CosmosTransformer3DModel,
    sparse=(CosmosSparseProcessor,),
    self_attention=self_attention,
    grid=grid,
    entries=(
        Site("output", "patch_embed", (1, 2, 3)),
        Site("output", "rope", 0),
        Site("output", "learnable_pos_embed", 1, optional=True),
        Site("argument", "block_controlnet_hidden_states", 1, optional=True),
    ),
    exit=Site("input", "proj_out", 1),
    cuts=cuts,
    branch_order={
        "CosmosTextToWorldPipeline": GUIDED,
        "CosmosVideoToWorldPipeline": GUIDED,
        "Cosmos2VideoToWorldPipeline": GUIDED,
        "Cosmos2_5_PredictBasePipeline": GUIDED,
        "Cosmos2_5_TransferPipeline": GUIDED,
    },
)
