"""LTX-2: text, image or video to video with sound; a timestep for each token.

Only the video attends sparsely, over itself (`attn1` of each block) and over what is given with it:
keyframes and references, behind the video. Sound, and attention between sound, text and video,
stay untouched. A self-attention mask goes into the order of the tokens; its calls are dense.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers.models.transformers.transformer_ltx2 import (
    LTX2AudioVideoAttnProcessor,
    LTX2PerturbedAttnProcessor,
    LTX2VideoTransformer3DModel,
)

from vidsparse.grid import TokenGrid
from vidsparse.pipelines.adapter import Adapter, Arguments, Site
from vidsparse.pipelines.families.ltx import SPLIT, self_attention
from vidsparse.pipelines.processor import SparseProcessor


class LTX2SparseProcessor(SparseProcessor, LTX2AudioVideoAttnProcessor):
    """`LTX2AudioVideoAttnProcessor` with block-sparse self-attention of the video."""


class LTX2PerturbedSparseProcessor(SparseProcessor, LTX2PerturbedAttnProcessor):
    """`LTX2PerturbedAttnProcessor` with block-sparse self-attention of the video."""


def grid(transformer: Any, arguments: Arguments) -> TokenGrid:
    """As the arguments tell it; all further rows of [B, rows, C] stand behind the video."""
    sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes:
        raise ValueError(
            f"num_frames, height, width = {sizes} in a call of {type(transformer).__name__}: give "
            "all three, in latent frames, rows and columns, also beside video_coords; pipelines "
            "that do not are not supported"
        )
    video = TokenGrid(*sizes)  # type: ignore[arg-type]
    rows = arguments["hidden_states"].shape[1]
    return replace(video, after=max(0, rows - video.video_tokens))


ADAPTER = Adapter(
    pipelines=(
        "LTX2Pipeline",
        "LTX2ImageToVideoPipeline",
        "LTX2ConditionPipeline",
        "LTX2InContextPipeline",
        "LTX2HDRPipeline",
    ),
    components=("transformer",),
    transformer=LTX2VideoTransformer3DModel,
    sparse=(LTX2SparseProcessor, LTX2PerturbedSparseProcessor),
    self_attention=self_attention,
    grid=grid,
    entries=(
        Site("argument", "hidden_states", 1),
        Site("argument", "timestep", 1, optional=True),
        Site("argument", "video_keyframes_mask", 1, optional=True),
        Site("argument", "video_self_attention_mask", 1, optional=True),
        Site("argument", "video_self_attention_mask", 2, optional=True),
        Site("output", "rope", -2),
        Site("output", "cross_attn_rope", -2),
    ),
    exit=Site("input", "proj_out", 1),
    split=SPLIT,
)
