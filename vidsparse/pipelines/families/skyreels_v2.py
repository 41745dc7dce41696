"""SkyReels-V2: text or image to video, and diffusion forcing, where each frame has its timestep.

Self-attention (`attn1` of each block) is over the video alone. In diffusion forcing, timesteps are
repeated for the tokens of each frame inside the forward. With blocks of frames that see no later
ones (`causal_block_size`) attention is masked, so it stays dense.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_skyreels_v2 import (
    SkyReelsV2Attention,
    SkyReelsV2AttnProcessor,
    SkyReelsV2Transformer3DModel,
)

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, Site
from vidsparse.pipelines.families.wan import attention_over_video, grid
from vidsparse.pipelines.processor import SparseProcessor


class SkyReelsV2SparseProcessor(SparseProcessor, SkyReelsV2AttnProcessor):
    """`SkyReelsV2AttnProcessor` with block-sparse self-attention."""


def cuts(transformer: Any, arguments: Arguments, grid: TokenGrid) -> tuple[int, ...]:
    """At every frame that has a timestep of its own, or at every causal block of frames."""
    step = transformer.config.num_frame_per_block
    if arguments.get("enable_diffusion_forcing"):
        return tuple(range(1, grid.frames))
    return tuple(range(step, grid.frames, step)) if step > 1 else ()


ADAPTER = Adapter(
    pipelines=(
        "SkyReelsV2Pipeline",
        "SkyReelsV2ImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    ),
    components=("transformer",),
    transformer=SkyReelsV2Transformer3DModel,
    sparse=(SkyReelsV2SparseProcessor,),
    self_attention=attention_over_video(SkyReelsV2Attention),
    grid=grid,
    entries=(Site("output", "patch_embedding", (2, 3, 4)), Site("output", "rope", 1)),
    exit=Site("input", "proj_out", 1),
    cuts=cuts,
)
