"""Allegro: rotary tables of each axis, and the positions of tokens in them, as an argument."""

from typing import Any

import diffusers
import tiny
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

import zoo


def model(heads: int, head_dim: int) -> Any:
    return diffusers.AllegroTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=2,
        cross_attention_dim=heads * head_dim,
        caption_channels=tiny.TEXT_WIDTH,
        sample_height=8,
        sample_width=12,
        sample_frames=3,
    )


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    *tables, t, y, x = get_3d_rotary_pos_embed_allegro(
        model.config.attention_head_dim, ((0, 0), (height, width)), (height, width), frames
    )
    places = torch.cartesian_prod(t.long(), y.long(), x.long()).T[:, None]
    return {
        "hidden_states": zoo.noise(batch, 4, frames, 2 * height, 2 * width),
        "timestep": zoo.times(batch),
        "encoder_hidden_states": zoo.noise(batch, 1, zoo.TEXT, tiny.TEXT_WIDTH),
        "encoder_attention_mask": zoo.words(batch),
        "image_rotary_emb": (tuple(tables), tuple(places)),
    }


def t2v() -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.AllegroPipeline(
        scheduler=diffusers.DDIMScheduler(),
        vae=None,
        text_encoder=tiny.text_encoder("T5"),
        tokenizer=tiny.tokenizer(),
        transformer=tiny.seeded(lambda: model(2, 48)),
    )
    return pipe, tiny.arguments(num_frames=12, clean_caption=False)


CASES = [
    # Of a single token it squeezes the axis of tokens out.
    zoo.Case("allegro", model, arguments, head_dims=(48, 96), takes=lambda grid: grid != (1, 1, 1))
]
PIPELINES: zoo.Pipelines = {"allegro": t2v}
