"""ChronoEdit: an image edited by way of a short video; a Wan transformer of image to video.

After the steps of temporal reasoning two frames are left, so the grid changes within a run. The
rotary embedding places the last of two frames far from the first; that is its own affair.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_chronoedit import (
    ChronoEditTransformer3DModel,
    WanAttention,
    WanAttnProcessor,
)

from vidsparse.pipelines.adapter import Adapter, Arguments, Site, Split
from vidsparse.pipelines.families.wan import attention_over_video, grid
from vidsparse.pipelines.processor import SparseProcessor


class ChronoEditSparseProcessor(SparseProcessor, WanAttnProcessor):
    """ChronoEdit's own `WanAttnProcessor` with block-sparse self-attention."""


def not_split(transformer: Any, arguments: Arguments) -> str:
    """Timesteps of tokens, which the plan of Wan splits, and this one does not."""
    return "a timestep for each token" if arguments["timestep"].ndim > 1 else ""


ADAPTER = Adapter(
    pipelines=("ChronoEditPipeline",),
    components=("transformer",),
    transformer=ChronoEditTransformer3DModel,
    sparse=(ChronoEditSparseProcessor,),
    self_attention=attention_over_video(WanAttention),
    grid=grid,
    entries=(
        Site("output", "patch_embedding", (2, 3, 4)),
        Site("output", "rope", 1),
        Site("output", "condition_embedder", 1, items=(0, 1), dims=3),
    ),
    exit=Site("input", "proj_out", 1),
    split=Split(lacks=not_split),
    branch_order={"ChronoEditPipeline": ("cond", "uncond")},
)
