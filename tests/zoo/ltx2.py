"""LTX-2: video and sound in one forward; both kinds of rotary tables and of processors."""

from functools import partial
from typing import Any

import diffusers
import tiny
import torch
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

import zoo

WIDTH = 32
SOUND = 8
"""Rows of sound."""


def model(heads: int, head_dim: int, **options: Any) -> Any:
    return diffusers.LTX2VideoTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        cross_attention_dim=heads * head_dim,
        in_channels=4,
        out_channels=4,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=32,
        num_layers=2,
        caption_channels=WIDTH,
        **options,
    )


def arguments(model: Any, grid: zoo.Grid, batch: int, more: int = 0) -> dict[str, Any]:
    """more: rows behind the video."""
    frames, height, width = grid
    rows = frames * height * width
    coordinates = model.rope.prepare_video_coords(batch, frames, height, width, "cpu")
    return {
        "hidden_states": zoo.noise(batch, rows + more, 4),
        "audio_hidden_states": zoo.noise(batch, SOUND, 4),
        "encoder_hidden_states": zoo.noise(batch, zoo.TEXT, WIDTH),
        "audio_encoder_hidden_states": zoo.noise(batch, zoo.TEXT, WIDTH),
        "encoder_attention_mask": zoo.words(batch),
        "audio_encoder_attention_mask": zoo.words(batch),
        "timestep": zoo.times(batch),
        "audio_timestep": zoo.times(batch),
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": SOUND,
        "video_coords": coordinates[:, :, torch.arange(rows + more) % rows],
    }


def token_times(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    """The first sample keeps half of its values in the second block, in place of attention."""
    given = arguments(model, grid, batch)
    rows = given["hidden_states"].shape[1]
    return {
        **given,
        "timestep": torch.linspace(0, 900, rows).expand(batch, -1),
        "spatio_temporal_guidance_blocks": [1],
        "perturbation_mask": torch.linspace(0.5, 1, batch),
    }


def keyframes(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    """Of the video the first frame, and one behind it."""
    plane = grid[1] * grid[2]
    given = arguments(model, grid, batch, plane)
    mask = torch.zeros(1, given["hidden_states"].shape[1], 1)
    mask[:, :plane] = mask[:, -plane:] = 1
    return {**given, "video_keyframes_mask": mask}


def masked(model: Any, grid: zoo.Grid, batch: int) -> dict[str, Any]:
    given = arguments(model, grid, batch, 20)
    rows = given["hidden_states"].shape[1]
    mask = (torch.arange(rows)[:, None] >= torch.arange(rows) - 30).float().expand(batch, -1, -1)
    return {**given, "video_self_attention_mask": mask}


def pipeline(cls: Any, **call: Any) -> tuple[Any, dict[str, Any]]:
    vae = tiny.seeded(
        lambda: diffusers.AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            layers_per_block=(1,),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatial",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            patch_size=1,
        )
    )
    sound = tiny.seeded(
        lambda: diffusers.AutoencoderKLLTX2Audio(
            base_channels=4,
            ch_mult=(1,),
            num_res_blocks=1,
            resolution=32,
            latent_channels=2,
            mel_bins=8,
        )
    )
    heads = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1}
    settings = {
        f"{kind}_connector_{name}": value
        for kind in ("video", "audio")
        for name, value in {**heads, "num_learnable_registers": None}.items()
    }
    connectors = tiny.seeded(
        lambda: LTX2TextConnectors(
            caption_channels=WIDTH,
            text_proj_in_factor=2,
            connector_rope_base_seq_len=32,
            **settings,
        )
    )
    pipe = cls(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        audio_vae=sound,
        text_encoder=None,
        tokenizer=None,
        connectors=connectors,
        transformer=tiny.seeded(lambda: model(2, 32)),
        vocoder=None,
    )
    text = {
        f"{negative}prompt_{part}": value
        for negative, seed in (("", 1), ("negative_", 2))
        for part, value in (
            ("embeds", zoo.noise(1, 16, WIDTH * 2, seed=seed)),
            ("attention_mask", torch.ones(1, 16).long()),
        )
    }
    settings = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": zoo.STEPS}
    return pipe, {**text, **settings, "guidance_scale": 3.0, **call}


def t2v() -> tuple[Any, dict[str, Any]]:
    return pipeline(diffusers.LTX2Pipeline)


PLAIN = {"spatio_temporal_guidance_blocks": [1], "frame_rate": 25.0}
"""Of pipelines whose guidance skips a block, by default one that the tiny model does not have."""


def conditions() -> tuple[Any, dict[str, Any]]:
    """The first frame is given: its tokens have timestep 0."""
    first = LTX2VideoCondition(
        frames=zoo.noise(1, 3, 32, 32).sigmoid(), index=0, strength=1.0, crf=0
    )
    return pipeline(diffusers.LTX2ConditionPipeline, conditions=first, **PLAIN)


def in_context() -> tuple[Any, dict[str, Any]]:
    """A reference stands behind the video."""
    reference = LTX2ReferenceCondition(frames=zoo.noise(1, 3, 32, 32).sigmoid(), strength=1.0)
    return pipeline(diffusers.LTX2InContextPipeline, reference_conditions=reference, **PLAIN)


def hdr() -> tuple[Any, dict[str, Any]]:
    reference = LTX2HDRReferenceCondition(frames=zoo.noise(1, 3, 32, 32).sigmoid(), strength=1.0)
    return pipeline(diffusers.LTX2HDRPipeline, reference_conditions=reference)


def i2v() -> tuple[Any, dict[str, Any]]:
    return pipeline(diffusers.LTX2ImageToVideoPipeline, image=tiny.still(32, 32), image_crf=0)


VIDEO = ("hidden_states", "output of rope", "output of cross_attn_rope")
CASES = [
    zoo.Case("ltx2", model, arguments, controls=VIDEO),
    zoo.Case(
        "ltx2 token times",
        partial(model, rope_type="split", perturbed_attn=True),
        token_times,
        controls=(*VIDEO, "timestep"),
    ),
    zoo.Case(
        "ltx2 keyframes",
        partial(model, use_keyframes_abs_pos_embedding=True),
        keyframes,
        head_dims=(64,),
        controls=(*VIDEO, "video_keyframes_mask"),
    ),
    zoo.Case(
        "ltx2 masked",
        model,
        masked,
        head_dims=(64,),
        controls=(*VIDEO, "video_self_attention_mask"),
        dense={"masked": 2},
        sparse=False,
    ),
]
PIPELINES: zoo.Pipelines = {
    "ltx2": t2v,
    "ltx2 i2v": i2v,
    "ltx2 conditions": conditions,
    "ltx2 in context": in_context,
    "ltx2 hdr": hdr,
}
