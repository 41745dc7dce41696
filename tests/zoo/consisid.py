"""ConsisID: CogVideoX's blocks, with faces between them."""

from typing import Any

import diffusers
import tiny
import torch

import zoo
from zoo import cogvideox

FACE = 8
"""Width of what is known of a face."""


def model(heads: int, head_dim: int, width: int = cogvideox.WIDTH) -> Any:
    return diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=2,
        in_channels=8,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=width,
        max_text_seq_length=zoo.TEXT,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=8,
        cross_attn_num_heads=1,
        LFE_id_dim=FACE,
        LFE_vit_dim=FACE,
        LFE_depth=1,
        LFE_dim_head=8,
        LFE_num_heads=1,
        LFE_num_id_token=1,
        LFE_num_querie=1,
        LFE_output_dim=heads * head_dim * 2 // 3,
        LFE_ff_mult=1,
        LFE_num_scale=1,
    )


def face(batch: int) -> dict[str, Any]:
    return {"id_cond": zoo.noise(batch, FACE), "id_vit_hidden": [zoo.noise(batch, 3, FACE)]}


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    given = cogvideox.arguments(model, grid, batch)
    latents = given["hidden_states"]
    return {**given, **face(batch), "hidden_states": torch.cat([latents, latents.roll(1, 1)], 2)}


def i2v() -> tuple[Any, dict[str, Any]]:
    return cogvideox.pipeline(
        diffusers.ConsisIDPipeline,
        tiny.seeded(lambda: model(2, 32, tiny.TEXT_WIDTH)),
        image=tiny.still(96, 64),
        **face(1),
    )


CASES = [zoo.Case("consisid", model, arguments)]
PIPELINES: zoo.Pipelines = {"consisid": i2v}
