"""EasyAnimate 5: text to video, control and inpainting; text before the video, without a mask.

Latents of control and inpainting are channels of the same patches. The patch embedding sees single
frames, so tokens are brought into their order at the first block.
"""

from __future__ import annotations

from diffusers.models.transformers.transformer_easyanimate import (
    EasyAnimateAttnProcessor2_0,
    EasyAnimateTransformer3DModel,
)

from vidsparse.pipelines.adapter import Adapter, Site
from vidsparse.pipelines.families.mochi import grid, self_attention
from vidsparse.pipelines.processor import SparseProcessor


class EasyAnimateSparseProcessor(SparseProcessor, EasyAnimateAttnProcessor2_0):
    """`EasyAnimateAttnProcessor2_0` with block-sparse attention."""


ADAPTER = Adapter(
    pipelines=("EasyAnimatePipeline", "EasyAnimateInpaintPipeline"),
    components=("transformer",),
    transformer=EasyAnimateTransformer3DModel,
    sparse=(EasyAnimateSparseProcessor,),
    self_attention=self_attention,
    grid=grid,
    entries=(Site("input", "transformer_blocks.0", 1), Site("output", "rope_embedding", 0)),
    exit=Site("input", "proj_out", 1),
    text="first",
)
