"""Wan VACE: a Wan transformer with control blocks, whose self-attention is over the video too.

Their hints are added token by token. Layers count through the blocks of the video first.
"""

from __future__ import annotations

from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel

from vidsparse.pipelines.adapter import Adapter, Site
from vidsparse.pipelines.families.wan import WanSparseProcessor, grid, self_attention

ADAPTER = Adapter(
    pipelines=("WanVACEPipeline", "Wan22VaceModularPipeline"),
    components=("transformer", "transformer_2"),
    transformer=WanVACETransformer3DModel,
    sparse=(WanSparseProcessor,),
    self_attention=self_attention,
    grid=grid,
    entries=(
        Site("output", "patch_embedding", (2, 3, 4)),
        Site("output", "vace_patch_embedding", (2, 3, 4)),
        Site("output", "rope", 1),
    ),
    exit=Site("input", "proj_out", 1),
)
