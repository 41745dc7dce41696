"""Wan VACE: a Wan transformer with control blocks, whose self-attention is over the video too.

Their hints are added token by token. Layers count through the blocks of the video first.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, Site
from vidsparse.pipelines.families import wan


def grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    """Of the video. Raises ValueError for a control of another size: the order is that of both."""
    video, control = arguments["hidden_states"], arguments.get("control_hidden_states")
    if control is not None and control.shape[2:] != video.shape[2:]:
        raise ValueError(
            f"control_hidden_states of {tuple(control.shape[2:])} latent frames, rows and columns, "
            f"but hidden_states of {tuple(video.shape[2:])}: give a control for the whole video; "
            "empty frames are black ones with a white mask"
        )
    return wan.grid(transformer, arguments)


ADAPTER = Adapter(
    pipelines=("WanVACEPipeline", "Wan22VaceModularPipeline"),
    components=("transformer", "transformer_2"),
    transformer=WanVACETransformer3DModel,
    sparse=(wan.WanSparseProcessor,),
    self_attention=wan.self_attention,
    grid=grid,
    entries=(
        Site("output", "patch_embedding", (2, 3, 4)),
        Site("output", "vace_patch_embedding", (2, 3, 4)),
        Site("output", "rope", 1),
    ),
    exit=Site("input", "proj_out", 1),
)
