"""CogVideoX: text before the video, rotary tables as an argument or positions in the embedding."""

from typing import Any

import diffusers
import tiny

import zoo

WIDTH = 24


def model(heads: int, head_dim: int, **options: Any) -> Any:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=2,
        out_channels=4,
        time_embed_dim=8,
        max_text_seq_length=zoo.TEXT,
        **{
            "use_rotary_positional_embeddings": True,
            "text_embed_dim": WIDTH,
            "in_channels": 4,
            **options,
        },
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
    deep = getattr(model.config, "patch_size_t", None) or 1
    angle = zoo.noise(frames * height * width, model.config.attention_head_dim)
    rotary = model.config.use_rotary_positional_embeddings
    return {
        "hidden_states": zoo.noise(batch, frames * deep, 4, 2 * height, 2 * width),
        "timestep": zoo.times(batch),
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, WIDTH),
        "image_rotary_emb": (angle.cos(), angle.sin()) if rotary else None,
    }


def pipeline(cls: Any, transformer: Any, **more: Any) -> tuple[Any, dict[str, Any]]:
    """Latents are 8 times smaller in height and width than the video, and 4 times in time."""
    pipe = cls(
        tokenizer=tiny.tokenizer(),
        text_encoder=tiny.text_encoder("T5"),
        vae=tiny.seeded(
            lambda: diffusers.AutoencoderKLCogVideoX(
                latent_channels=4,
                block_out_channels=(8,) * 4,
                layers_per_block=1,
                norm_num_groups=2,
            )
        ),
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    return pipe, tiny.arguments(max_sequence_length=zoo.TEXT, **more)


def small(**options: Any) -> Any:
    settings = {"text_embed_dim": tiny.TEXT_WIDTH, **options}
    return tiny.seeded(lambda: model(2, 32, **settings))


def t2v() -> tuple[Any, dict[str, Any]]:
    return pipeline(diffusers.CogVideoXPipeline, small())


def t2v_paired() -> tuple[Any, dict[str, Any]]:
    """The pipeline adds latent frames, so that they make pairs, and takes them off again."""
    transformer = small(patch_size_t=2, patch_bias=False)
    return pipeline(diffusers.CogVideoXPipeline, transformer, num_frames=21)


def i2v() -> tuple[Any, dict[str, Any]]:
    transformer = small(in_channels=8)
    return pipeline(diffusers.CogVideoXImageToVideoPipeline, transformer, image=tiny.still(96, 64))


def v2v() -> tuple[Any, dict[str, Any]]:
    """Strength 0.75: three of the steps are executed."""
    video = [tiny.still(96, 64)] * 9
    pipe, call = pipeline(
        diffusers.CogVideoXVideoToVideoPipeline, small(), video=video, strength=0.75
    )
    del call["num_frames"]
    return pipe, call


def fun_control() -> tuple[Any, dict[str, Any]]:
    video = [tiny.still(96, 64)] * 9
    pipe, call = pipeline(
        diffusers.CogVideoXFunControlPipeline, small(in_channels=8), control_video=video
    )
    del call["num_frames"]
    return pipe, call


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
PIPELINES: zoo.Pipelines = {
    "cogvideox": t2v,
    "cogvideox 1.5": t2v_paired,
    "cogvideox i2v": i2v,
    "cogvideox v2v": v2v,
    "cogvideox fun control": fun_control,
}
