"""CogVideoX: text before the video, rotary tables as an argument or positions in the embedding."""

from typing import Any

import diffusers

import zoo

WIDTH = 24


def model(heads: int, head_dim: int, **options: Any) -> Any:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=2,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        max_text_seq_length=zoo.TEXT,
        **{"use_rotary_positional_embeddings": True, **options},
    )


def absolute(heads: int, head_dim: int) -> Any:
    return model(
        heads,
        head_dim,
        use_rotary_positional_embeddings=False,
        sample_width=14,
        sample_height=10,
        sample_frames=9,
    )


def paired(heads: int, head_dim: int) -> Any:
    """Two latent frames a token, as in CogVideoX 1.5."""
    return model(heads, head_dim, patch_size_t=2, patch_bias=False)


def arguments(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    deep = model.config.patch_size_t or 1
    angle = zoo.noise(frames * height * width, model.config.attention_head_dim)
    rotary = model.config.use_rotary_positional_embeddings
    return {
        "hidden_states": zoo.noise(batch, frames * deep, 4, 2 * height, 2 * width),
        "timestep": zoo.times(batch),
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, WIDTH),
        "image_rotary_emb": (angle.cos(), angle.sin()) if rotary else None,
    }


CASES = [
    zoo.Case("cogvideox", model, arguments),
    zoo.Case(
        "cogvideox absolute",
        absolute,
        arguments,
        grids=((3, 5, 7),),
        controls=("output of patch_embed",),
    ),
    zoo.Case("cogvideox 1.5", paired, arguments),
]
PIPELINES: zoo.Pipelines = {}
