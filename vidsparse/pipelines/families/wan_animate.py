"""Wan-Animate: a character moves as a video shows; the pose is added to tokens, the face attended.

The pose has a frame less than the video and is added in the forward, so tokens come in at the first
block. A face adapter follows some blocks: it takes the tokens of each frame apart, by their place.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_wan_animate import (
    WanAnimateTransformer3DModel,
    WanAttention,
    WanAttnProcessor,
)

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, Site
from vidsparse.pipelines.families.wan import attention_over_video, grid
from vidsparse.pipelines.processor import SparseProcessor


class WanAnimateSparseProcessor(SparseProcessor, WanAttnProcessor):
    """Wan-Animate's own `WanAttnProcessor` with block-sparse self-attention."""


def cuts(transformer: Any, arguments: Arguments, grid: TokenGrid) -> tuple[int, ...]:
    """At every frame."""
    return tuple(range(1, grid.frames))


ADAPTER = Adapter(
    pipelines=("WanAnimatePipeline",),
    components=("transformer",),
    transformer=WanAnimateTransformer3DModel,
    sparse=(WanAnimateSparseProcessor,),
    self_attention=attention_over_video(WanAttention),
    grid=grid,
    entries=(Site("input", "blocks.0", 1), Site("output", "rope", 1)),
    exit=Site("input", "proj_out", 1),
    cuts=cuts,
)
